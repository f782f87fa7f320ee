// Packed codes as vectors of floats.
//
// A row of n codes of b bits takes n * b / 8 bytes, as 8 / b planes: byte i holds code i in its lowest bits, code
// n * b / 8 + i in the next, and so on. 3 bits are a row of 2 bits followed by a row of 1 bit.
#pragma once

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

// `rows` rows of n codes each, fetched as two vectors at a time. With BITS (1, 2, 4), where planes are whole vectors, the two
// are two planes of the same bytes; with 0 they are neighbours in a row of bytes, unpacked before if need be.
template <int BITS>
struct Codes {
    const uint8_t *data;
    int stride;

    Codes(const uint8_t *packed, int bits, int n, int rows) : data(packed), stride(n * bits / 8) {
        if (BITS || (bits == 8 && n % (2 * W) == 0)) return;
        static thread_local Scratch<uint8_t> scratch;
        const int bytes_of_row = stride;
        stride = (n + 2 * W - 1) / (2 * W) * (2 * W);
        uint8_t *room = scratch.room(size_t(rows) * stride);
        for (int i = 0; i < rows; i++) unpack(packed + size_t(i) * bytes_of_row, bits, n, room + size_t(i) * stride);
        data = room;
    }

    static constexpr int PASSES = BITS ? 4 / BITS : 1;  // over the same bytes, for two planes each

    // Pairs of vectors that make up a row, and the code with which each begins; codes behind n are to be ignored.
    int pairs() const { return BITS ? stride / W * PASSES : stride / (2 * W); }
    int first(int pair, int half) const {
        return BITS ? (2 * (pair % PASSES) + half) * stride + pair / PASSES * W : (2 * pair + half) * W;
    }

    struct Place {
        const uint8_t *at;
        int shift;
    };
    Place place(int pair) const {
        return BITS ? Place{data + pair / PASSES * W, 2 * (pair % PASSES) * BITS} : Place{data + 2 * pair * W, 0};
    }
    void fetch(const Place &p, int row, vf &x, vf &y) const {
        const uint8_t *from = p.at + size_t(row) * stride;
        vi raw = bytes(from);
        if (!BITS) {
            x = floats(raw);
            y = floats(bytes(from + W));
            return;
        }
        if (PASSES > 1) raw >>= p.shift;
        constexpr int MASK = (1 << BITS) - 1;
        x = floats(raw & MASK);
        y = floats(BITS == 4 ? raw >> 4 : (raw >> BITS) & MASK);
    }
};

// Calls f with the `Codes` that fits rows of n codes.
template <class F>
void with_codes(int bits, int n, F f) {
    const bool whole = bits < 8 && bits != 3 && n * bits / 8 % W == 0;
    if (whole && bits == 4) return f(std::integral_constant<int, 4>());
    if (whole && bits == 2) return f(std::integral_constant<int, 2>());
    if (whole && bits == 1) return f(std::integral_constant<int, 1>());
    f(std::integral_constant<int, 0>());
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

// The slots [t, t + n) of a run with groups along channels: x [n, D].
inline void decode_channels(const Run &run, int head, int64_t t, int64_t n, int D, float *x) {
    const int bytes = D * run.bits / 8, groups = D / run.group;
    uint8_t row[MAX_DIM];
    float scale[MAX_DIM / 8], zero[MAX_DIM / 8];
    for (int64_t i = 0; i < n; i++) {
        unpack(run.data + head * run.head + (t + i) * bytes, run.bits, D, row);
        numbers(run.small, run.scale + head * run.scale_head, (t + i) * groups, groups, scale);
        numbers(run.small, run.zero + head * run.zero_head, (t + i) * groups, groups, zero);
        for (int d = 0; d < D; d++) x[i * D + d] = row[d] * scale[d / run.group] + zero[d / run.group];
    }
}

}  // namespace
