// Packed codes as vectors of floats.
//
// A row of n codes of b bits takes n * b / 8 bytes, as 8 / b planes: byte i holds code i in its lowest bits, code
// n * b / 8 + i in the next, and so on. 3 bits are a row of 2 bits followed by a row of 1 bit.
#pragma once

#include <cmath>
#include <type_traits>

#include "job.h"
#include "vec.h"

namespace {

using namespace kvloom;

constexpr int BLOCK = 32;  // slots that are decoded at a time where codes can't be used as they are

inline void planes_of(const uint8_t *row, int bits, int width, uint8_t *out) {
    const uint64_t mask = 0x0101010101010101u * ((1u << bits) - 1);
    if (width == 4 && bits < 8) {  // two planes at a time: whole words go on faster than halves
        uint32_t all;
        memcpy(&all, row, 4);
        for (int j = 0; j < 8 / bits; j += 2) {
            const uint64_t x = ((all >> (bits * j)) & uint32_t(mask)) | (uint64_t((all >> (bits * j + bits)) & uint32_t(mask)) << 32);
            memcpy(out + j * 4, &x, 8);
        }
        return;
    }
    for (int j = 0; j < 8 / bits; j++) {
        int i = 0;
        for (; i + 8 <= width; i += 8) {
            uint64_t x;
            memcpy(&x, row + i, 8);
            x = (x >> (bits * j)) & mask;
            memcpy(out + j * width + i, &x, 8);
        }
        for (; i < width; i++) out[j * width + i] = uint8_t(row[i] >> (bits * j)) & uint8_t(mask);
    }
}

inline uint64_t word(const uint8_t *p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

// 3 bits: eight codes at a time, both parts of each in one word, since a word is read back faster than it was written in parts.
inline void three_bits(const uint8_t *row, int n, uint8_t *out) {
    const int low = n / 4, high = n / 8;
    const uint8_t *top = row + low;
    const uint64_t ones = 0x0101010101010101u;
    for (int i = 0; i < n; i += 8) {
        uint64_t x = 0;
        if (low % 8 == 0 && high % 4 == 0) {
            x = (word(row + i % low) >> (i / low * 2)) & (ones * 3);
            if (high % 8 == 0) {
                x |= ((word(top + i % high) >> (i / high)) & ones) << 2;
            } else {
                uint32_t a, b;
                memcpy(&a, top + i % high, 4);
                memcpy(&b, top + (i + 4) % high, 4);
                a = (a >> (i / high)) & uint32_t(ones), b = (b >> ((i + 4) / high)) & uint32_t(ones);
                x |= (uint64_t(b) << 32 | a) << 2;
            }
        } else {
            for (int k = 0; k < 8; k++) {
                const int j = i + k, code = ((row[j % low] >> (j / low * 2)) & 3) | ((top[j % high] >> (j / high)) & 1) << 2;
                x |= uint64_t(code) << (8 * k);
            }
        }
        memcpy(out + i, &x, 8);
    }
}

// One row of n codes, a byte each; n is a multiple of 8.
inline void unpack(const uint8_t *row, int bits, int n, uint8_t *out) {
    if (bits == 8) {
        memcpy(out, row, n);
    } else if (bits == 3) {
        three_bits(row, n, out);
    } else {
        planes_of(row, bits, n * bits / 8, out);
    }
}

// Asks memory for bytes that are needed soon.
inline void ask(const uint8_t *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64) prefetch(from + i);
}

template <class T>
void convert(const T *from, int count, float *out) {
    int i = 0;
    for (; i + W <= count; i += W) store(out + i, load(from + i));
    for (; i < count; i++) out[i] = scalar(from + i);
}

// Numbers [from, from + count) of a plane of scales, as fp32.
inline void numbers(Kind kind, const uint8_t *data, int64_t from, int count, float *out) {
    if (kind == FLOAT16) return convert(reinterpret_cast<const F16 *>(data) + from, count, out);
    if (kind == BFLOAT16) return convert(reinterpret_cast<const BF16 *>(data) + from, count, out);
    convert(reinterpret_cast<const F32 *>(data) + from, count, out);
}

// Numbers [0, n) of a row of any dtype, as fp32.
inline void row_of(const Matrix &x, int head, int64_t row, int n, float *out) {
    const uint8_t *at = x.data + head * x.head + row * x.row;
    if (x.kind == FLOAT32) return (void)memcpy(out, at, n * sizeof(float));
    numbers(x.kind, at, 0, n, out);
}

// x[i] = code * scale + zero for n codes that share both.
inline void scaled(const uint8_t *codes, int n, float scale, float zero, float *x) {
    int i = 0;
    for (; i + W <= n; i += W) store(x + i, floats(bytes(codes + i)) * scale + zero);
    for (; i < n; i++) x[i] = codes[i] * scale + zero;
}

// The slots [t, t + n) of a run with groups along channels: x [n, D], rows `step` apart.
inline void decode_channels(const Run &run, int head, int64_t t, int64_t n, int D, float *x, int step) {
    const int G = run.group, bytes = D * run.bits / 8, groups = D / G;
    static thread_local Scratch<float> scratch;
    float *scale = scratch.room(size_t(2) * groups + D), *zero = scale + groups;
    uint8_t *row = reinterpret_cast<uint8_t *>(zero + groups);
    for (int64_t i = 0; i < n; i++) {
        unpack(run.data + head * run.head + (t + i) * bytes, run.bits, D, row);
        numbers(run.small, run.scale + head * run.scale_head, (t + i) * groups, groups, scale);
        numbers(run.small, run.zero + head * run.zero_head, (t + i) * groups, groups, zero);
        for (int g = 0; g < groups; g++) scaled(row + g * G, G, scale[g], zero[g], x + i * step + g * G);
    }
}

// The slots [t, t + n) of one unit of a run with groups along tokens: x [n, D], rows `step` apart.
inline void decode_tokens(const Run &run, int head, int64_t t, int n, int D, float *x, int step) {
    const int G = run.group, bytes = G * run.bits / 8;
    const int64_t u = t / G;
    const int from = int(t - u * G);
    static thread_local Scratch<float> scratch;
    float *scale = scratch.room(size_t(2) * D + G), *zero = scale + D;
    uint8_t *row = reinterpret_cast<uint8_t *>(zero + D);
    numbers(run.small, run.scale + head * run.scale_head, u * D, D, scale);
    numbers(run.small, run.zero + head * run.zero_head, u * D, D, zero);
    for (int d = 0; d < D; d++) {
        unpack(run.data + head * run.head + (u * D + d) * bytes, run.bits, G, row);
        for (int i = 0; i < n; i++) x[i * step + d] = row[from + i] * scale[d] + zero[d];
    }
}

}  // namespace
