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

// A row of n codes, W at a time in registers: f(index of the first, codes, with whatever lies above their BITS). `room`: n bytes
// and W more.
template <int BITS, class F>
inline void each_code(const uint8_t *row, int n, uint8_t *room, F f) {
    constexpr int LOW = BITS == 3 ? 2 : BITS;
    const int width = n * LOW / 8, high = n / 8;
    if (BITS < 8 && width % W == 0 && (BITS != 3 || high % W == 0)) {
        for (int at = 0; at < width; at += W) {
            const vi raw = bytes(row + at);
#pragma GCC unroll 8
            for (int j = 0; j < 8 / LOW; j++) {
                vi code = raw >> (LOW * j);
                if (BITS == 3) {
                    const int later = at >= high;  // a plane of low bits is two of high ones
                    code = (code & 3) | (((bytes(row + width + at - later * high) >> (2 * j + later)) & 1) << 2);
                }
                f(j * width + at, code);
            }
        }
        return;
    }
    unpack(row, BITS, n, room);
    for (int i = 0; i < n; i += W) f(i, bytes(room + i));
}
// The same for any number of bits that is packed.
template <class F>
inline void with_bits(int bits, F f) {
    if (bits == 1) f(std::integral_constant<int, 1>());
    else if (bits == 2) f(std::integral_constant<int, 2>());
    else if (bits == 3) f(std::integral_constant<int, 3>());
    else if (bits == 4) f(std::integral_constant<int, 4>());
    else f(std::integral_constant<int, 8>());
}

// The slots [t, t + n) of a run with groups along channels: x [n, D], rows `step` apart.
inline void decode_channels(const Run &run, int head, int64_t t, int64_t n, int D, float *x, int step) {
    const int G = run.group, bytes = D * run.bits / 8, groups = D / G;
    static thread_local Scratch<float> scratch;
    const int count = int(n) * groups;
    float *scale = scratch.room(size_t(2) * count + D / 4 + W), *zero = scale + count;
    uint8_t *row = reinterpret_cast<uint8_t *>(zero + count);
    numbers(run.small, run.scale + head * run.scale_head, t * groups, count, scale);
    numbers(run.small, run.zero + head * run.zero_head, t * groups, count, zero);
    if (G % W == 0) {
        const uint8_t *codes = run.data + head * run.head + t * bytes;
        uint16_t group_of[MAX_WIDTH / W];
        for (int i = 0; i < D / W; i++) group_of[i] = uint16_t(i * W / G);
        return with_bits(run.bits, [&](auto BITS) {
            const int mask = (1 << BITS.value) - 1;
            for (int64_t i = 0; i < n; i++, scale += groups, zero += groups, codes += bytes, x += step)
                each_code<BITS.value>(codes, D, row, [&](int d, vi code) {
                    const int g = group_of[unsigned(d) / W];
                    store(x + d, floats(code & mask) * scale[g] + zero[g]);
                });
        });
    }
    for (int64_t i = 0; i < n; i++, scale += groups, zero += groups) {
        unpack(run.data + head * run.head + (t + i) * bytes, run.bits, D, row);
        for (int g = 0; g < groups; g++) scaled(row + g * G, G, scale[g], zero[g], x + i * step + g * G);
    }
}

#if defined(__AVX2__)
// Codes of eight channels and eight slots, rows `stride` bytes apart, times scales and with minima: x [8 slots, 8 channels].
inline void eight_by_eight(const uint8_t *codes, int stride, const float *scale, const float *zero, float *x, int step) {
    const auto row = [&](int i) { return _mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes + i * stride)); };
    const __m128i a = _mm_unpacklo_epi8(row(0), row(1)), b = _mm_unpacklo_epi8(row(2), row(3));
    const __m128i c = _mm_unpacklo_epi8(row(4), row(5)), d = _mm_unpacklo_epi8(row(6), row(7));
    const __m128i ab[2] = {_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b)}, cd[2] = {_mm_unpacklo_epi16(c, d), _mm_unpackhi_epi16(c, d)};
    const __m256 by = _mm256_loadu_ps(scale), least = _mm256_loadu_ps(zero);
    const auto give = [&](__m128i eight, int slot) {
        _mm256_storeu_ps(x + slot * step, _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight)), by, least));
    };
    for (int half = 0; half < 2; half++) {
        const __m128i low = _mm_unpacklo_epi32(ab[half], cd[half]), high = _mm_unpackhi_epi32(ab[half], cd[half]);
        give(low, 4 * half), give(_mm_srli_si128(low, 8), 4 * half + 1);
        give(high, 4 * half + 2), give(_mm_srli_si128(high, 8), 4 * half + 3);
    }
}
#endif

// The slots [t, t + n) of one unit of a run with groups along tokens: x [n, D], rows `step` apart.
inline void decode_tokens(const Run &run, int head, int64_t t, int n, int D, float *x, int step) {
    const int G = run.group, bytes = G * run.bits / 8;
    const int64_t u = t / G;
    const int from = int(t - u * G);
    static thread_local Scratch<float> scratch;
    float *scale = scratch.room(size_t(2) * D + size_t(2) * G + 8), *zero = scale + D;
    uint8_t *row = reinterpret_cast<uint8_t *>(zero + D);  // eight channels
    numbers(run.small, run.scale + head * run.scale_head, u * D, D, scale);
    numbers(run.small, run.zero + head * run.zero_head, u * D, D, zero);
    int d = 0;
#if defined(__AVX2__)
    for (; d + 8 <= D; d += 8) {
        for (int i = 0; i < 8; i++) unpack(run.data + head * run.head + (u * D + d + i) * bytes, run.bits, G, row + i * G);
        int i = 0;
        for (; i + 8 <= n; i += 8) eight_by_eight(row + from + i, G, scale + d, zero + d, x + i * step + d, step);
        for (; i < n; i++)
            for (int j = 0; j < 8; j++) x[i * step + d + j] = row[j * G + from + i] * scale[d + j] + zero[d + j];
    }
#endif
    for (; d < D; d++) {
        unpack(run.data + head * run.head + (u * D + d) * bytes, run.bits, G, row);
        for (int i = 0; i < n; i++) x[i * step + d] = row[from + i] * scale[d] + zero[d];
    }
}

// What every byte of TRITS stands for, plus 1.
struct Trits {
    uint8_t of[256][8] = {};
    Trits() {
        for (int b = 0; b < 256; b++)
            for (int i = 0, rest = b; i < 5; i++, rest /= 3) of[b][i] = uint8_t(rest % 3);
    }
};

// The same of a run of TRITS.
inline void decode_trits(const Run &run, int head, int64_t t, int n, int D, float *x, int step) {
    static const Trits trits;
    const int G = run.group, from = int(t % G), count = D * G;
    const int64_t u = t / G;
    static thread_local Scratch<float> scratch;
    float *size = scratch.room(size_t(2) * D + count / 4 + 16), *zero = size + D;
    uint8_t *codes = reinterpret_cast<uint8_t *>(zero + D);
    numbers(run.small, run.scale + head * run.scale_head, u * D, D, size);
    for (int d = 0; d < D; d++) zero[d] = -size[d];
    const uint8_t *data = run.data + head * run.head + u * run.row;
    for (int i = 0; 5 * i < count; i++) memcpy(codes + 5 * i, trits.of[data[i]], 8);
    int d = 0;
#if defined(__AVX2__)
    for (; d + 8 <= D; d += 8) {
        const uint8_t *rows = codes + d * G + from;
        int i = 0;
        for (; i + 8 <= n; i += 8) eight_by_eight(rows + i, G, size + d, zero + d, x + i * step + d, step);
        for (; i < n; i++)
            for (int j = 0; j < 8; j++) x[i * step + d + j] = rows[j * G + i] * size[d + j] + zero[d + j];
    }
#endif
    for (; d < D; d++)
        for (int i = 0; i < n; i++) x[i * step + d] = codes[d * G + from + i] * size[d] + zero[d];
}

}  // namespace
