// Packed codes of up to 4 bits times weights of 8 bits, in whole numbers: `codes.h` for processors that multiply bytes. A row is a
// channel of keys or a slot of values, as there.
//
// Weights are rounded to int8 in blocks of 512 >> bits rows that share a step, their greatest over 127: so the two sums of 16 bits
// that a lane has never overflow within a block, and rounding stays well below the error of the codes (docs/kernels.md). What
// rounding takes from the weights is made up for as if every code were the middle one, which all lanes share.
#pragma once

#include "unpack.h"

namespace {

#if defined(__AVX2__)
constexpr bool WHOLE = true;
constexpr int LANES = 8, PAD = 32;  // sums of a vector; weights are padded with zeros to a multiple of PAD

inline __m256 loaded(const float *p, int count) {  // the first `count` numbers, zeros behind
    if (count >= LANES) return _mm256_loadu_ps(p);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
}

// The greatest lanes of up to four vectors.
template <int R>
inline __m128 greatest(const __m256 *x) {
    const auto pairs = [](__m256 a, __m256 b) { return _mm256_max_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd)); };
    const __m256 four = pairs(pairs(x[0], x[R > 1]), pairs(x[R > 2 ? 2 : 0], x[R > 3 ? 3 : 0]));
    return _mm_max_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
}

// R rows of int8 weights, and the steps of their blocks.
template <int R, int STRIDE>
struct Whole {
    alignas(32) int8_t weights[R * STRIDE];
    alignas(16) float steps[STRIDE / 32 + 1][4];
    float base[R];  // what all lanes share: the sum of weight * zero, and of what rounding took, times the middle code
};

// Weights w[r * stride + i] * scale[i] of R rows.
template <int R, int STRIDE, bool PADDED>
inline void fold_blocks(const float *w, int stride, const float *scale, const float *zero, int n, int bits, Whole<R, STRIDE> &out) {
    const auto eight_of = [](const float *p, int count) { return PADDED ? _mm256_loadu_ps(p) : loaded(p, count); };
    const int block = 512 >> bits;
    const float middle = float((1 << bits) - 1) / 2;
    alignas(32) float x[R][256];
    __m256 shared[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) shared[r] = _mm256_setzero_ps();
    for (int at = 0, b = 0; at < n; at += block, b++) {
        const int count = n - at < block ? n - at : block, padded = (count + PAD - 1) / PAD * PAD;
        __m256 most[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) most[r] = _mm256_setzero_ps();
        for (int i = 0; i < padded; i += LANES) {
            const __m256 s = eight_of(scale + at + i, count - i), z = eight_of(zero + at + i, count - i);
            const __m256 offset = _mm256_fmadd_ps(s, _mm256_set1_ps(middle), z);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const __m256 weight = eight_of(w + r * stride + at + i, count - i), y = _mm256_mul_ps(weight, s);
                _mm256_store_ps(x[r] + i, y);
                shared[r] = _mm256_fmadd_ps(weight, offset, shared[r]);
                most[r] = _mm256_max_ps(most[r], _mm256_andnot_ps(_mm256_set1_ps(-0.0f), y));
            }
        }
        const __m128 top = _mm_max_ps(greatest<R>(most), _mm_set1_ps(1e-30f));  // fainter weights are rounded to nothing
        alignas(16) float by[4];
        _mm_store_ps(by, _mm_div_ps(_mm_set1_ps(127), top));
        _mm_store_ps(out.steps[b], _mm_mul_ps(top, _mm_set1_ps(1.0f / 127)));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const __m256 each = _mm256_set1_ps(by[r]), taken = _mm256_set1_ps(-middle * out.steps[b][r]);
            for (int i = 0; i < padded; i += 32) {
                const auto rounded = [&](int k) { return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(x[r] + i + k), each)); };
                __m256i pack = _mm256_packs_epi16(_mm256_packs_epi32(rounded(0), rounded(8)), _mm256_packs_epi32(rounded(16), rounded(24)));
                pack = _mm256_permutevar8x32_epi32(pack, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
                _mm256_store_si256(reinterpret_cast<__m256i *>(out.weights + r * STRIDE + at + i), pack);
                const __m256i sum = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), pack), _mm256_set1_epi16(1));
                shared[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), taken, shared[r]);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(shared[r]), _mm256_extractf128_ps(shared[r], 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        out.base[r] = _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
}

template <int R, int STRIDE>
void fold_whole(const float *w, int stride, const float *scale, const float *zero, int n, int bits, Whole<R, STRIDE> &out) {
    if (n % PAD) return fold_blocks<R, STRIDE, false>(w, stride, scale, zero, n, bits, out);
    fold_blocks<R, STRIDE, true>(w, stride, scale, zero, n, bits, out);
}

// Bytes [0, 8) of four rows as eight times four bytes.
inline __m256i eight(const uint8_t *row, int64_t stride) {
    const auto half = [](const uint8_t *a, const uint8_t *b) {
        return _mm_castpd_si128(_mm_loadh_pd(_mm_load_sd(reinterpret_cast<const double *>(a)), reinterpret_cast<const double *>(b)));
    };
    const __m128i first = half(row, row + stride), last = half(row + 2 * stride, row + 3 * stride);
    const __m256i all = _mm256_permutevar8x32_epi32(_mm256_inserti128_si256(_mm256_castsi128_si256(first), last, 1),
                                                    _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    return _mm256_shuffle_epi8(all, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}
// Bytes [0, 4) of four rows as four times four bytes, twice.
inline __m256i four_twice(const uint8_t *row, int64_t stride) {
    int32_t x[4];
    for (int i = 0; i < 4; i++) memcpy(x + i, row + i * stride, 4);
    const __m256i all = _mm256_broadcastsi128_si256(_mm_setr_epi32(x[0], x[1], x[2], x[3]));
    return _mm256_shuffle_epi8(all, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}
inline __m256i bits_of(__m256i x, int shift, int mask) {
    return _mm256_and_si256(_mm256_srli_epi16(x, shift), _mm256_set1_epi8(char(mask)));
}
inline void put(uint8_t *out, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), x); }

// The planes of four rows of n codes of BITS bits, as n times four codes; n * BITS / 8 is a multiple of 8.
template <int BITS>
inline void interleave(const uint8_t *row, int64_t stride, int n, uint8_t *out) {
    const int m = n * BITS / 8;
    const auto planes = [&](__m256i raw, int i) {
#pragma GCC unroll 8
        for (int j = 0; j < 8 / BITS; j++) put(out + (j * m + i) * 4, BITS == 8 ? raw : bits_of(raw, BITS * j, (1 << BITS) - 1));
    };
    int i = 0;
    for (; i + 16 <= m; i += 16) {
        const auto two = [&](int a, int b) {
            const auto at = [&](int k) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(row + k * stride + i)); };
            return _mm256_inserti128_si256(_mm256_castsi128_si256(at(a)), at(b), 1);
        };
        const __m256i even = two(0, 2), odd = two(1, 3);
        const auto fours = [](__m256i x) {  // pairs of rows 0 and 1 in the low half, of 2 and 3 in the high one
            const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
            return _mm256_shuffle_epi8(_mm256_permute4x64_epi64(x, 0xd8), _mm256_broadcastsi128_si256(order));
        };
        planes(fours(_mm256_unpacklo_epi8(even, odd)), i), planes(fours(_mm256_unpackhi_epi8(even, odd)), i + 8);
    }
    if (i < m) planes(eight(row + i, stride), i);
}
inline void interleave_three(const uint8_t *row, int64_t stride, int n, uint8_t *out) {  // n is a multiple of 64
    const int m = n / 8;
    for (int i = 0; i < m; i += 8) {
        const __m256i low[2] = {eight(row + i, stride), eight(row + m + i, stride)}, high = eight(row + 2 * m + i, stride);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            const __m256i top = _mm256_slli_epi16(bits_of(high, j, 1), 2);
            put(out + (j * m + i) * 4, _mm256_or_si256(bits_of(low[j % 2], j / 2 * 2, 3), top));
        }
    }
}
// 32 codes of 1 bit or 3 bits: a plane of single bits is 4 bytes, two fill a vector.
template <int BITS>
inline void interleave_32(const uint8_t *row, int64_t stride, uint8_t *out) {
    const __m256i single = four_twice(row + (BITS == 3 ? 8 : 0), stride), low = BITS == 3 ? eight(row, stride) : single;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m256i by = _mm256_setr_epi32(2 * j, 2 * j, 2 * j, 2 * j, 2 * j + 1, 2 * j + 1, 2 * j + 1, 2 * j + 1);
        const __m256i one = _mm256_and_si256(_mm256_srlv_epi32(single, by), _mm256_set1_epi8(1));
        put(out + j * 32, BITS == 1 ? one : _mm256_or_si256(_mm256_slli_epi16(one, 2), bits_of(low, 2 * j, 3)));
    }
}

// Rows of n codes, one behind the other -> [rows / 4, n, 4], four rows side by side; the codes behind the last row are any.
inline void side_by_side(const uint8_t *data, int bits, int n, int rows, uint8_t *out) {
    const int stride = n * bits / 8, whole = rows / 4;
    const auto each = [&](auto f) {
        for (int i = 0; i < whole; i++) f(data + i * 4 * stride, out + i * 4 * n);
    };
    int done = whole;
    if (bits == 4 && n % 16 == 0) each([&](const uint8_t *from, uint8_t *to) { interleave<4>(from, stride, n, to); });
    else if (bits == 2 && n % 32 == 0) each([&](const uint8_t *from, uint8_t *to) { interleave<2>(from, stride, n, to); });
    else if (bits == 1 && n % 64 == 0) each([&](const uint8_t *from, uint8_t *to) { interleave<1>(from, stride, n, to); });
    else if (bits == 3 && n % 64 == 0) each([&](const uint8_t *from, uint8_t *to) { interleave_three(from, stride, n, to); });
    else if (bits == 1 && n == 32) each([&](const uint8_t *from, uint8_t *to) { interleave_32<1>(from, stride, to); });
    else if (bits == 3 && n == 32) each([&](const uint8_t *from, uint8_t *to) { interleave_32<3>(from, stride, to); });
    else done = 0;
    for (int row = 4 * done; row < rows; row += 4) {  // what doesn't divide well: a byte for each code first
        static thread_local Scratch<uint8_t> scratch;
        uint8_t *room = scratch.room(4 * n);
        for (int i = 0; i < 4 && row + i < rows; i++) unpack(data + (row + i) * stride, bits, n, room + i * n);
        interleave<8>(room, n, n, out + row * n);
    }
}

#if defined(__AVX512VNNI__) || defined(EMULATED)
#define FOURS
// sum + the four products of each lane's bytes, the first of them unsigned.
inline __m256i add_fours(__m256i sum, __m256i codes, __m256i weights) {
#if defined(__AVX512VNNI__)
    return _mm256_dpbusd_epi32(sum, codes, weights);
#else  // the same for codes of up to 7 bits: two products fit in 16
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, weights), _mm256_set1_epi16(1)));
#endif
}
#endif

// total[r] = sum over rows of 8 V neighbouring lanes; codes as from `side_by_side`, `stride` bytes from four rows to the next.
template <int R, int V, int STRIDE>
inline void multiply_whole(const uint8_t *codes, int64_t stride, int rows, int bits, const Whole<R, STRIDE> &by, __m256 (*total)[V]) {
    const int fours = (rows + PAD - 1) / PAD * (PAD / 4), block = 128 >> bits;
#pragma GCC unroll 8
    for (int r = 0; r < R * V; r++) total[r / V][r % V] = _mm256_setzero_ps();
    for (int at = 0, b = 0; at < fours; at += block, b++) {
        const int end = at + block < fours ? at + block : fours;
        __m256i sum[R][V];
#pragma GCC unroll 8
        for (int r = 0; r < R * V; r++) sum[r / V][r % V] = _mm256_setzero_si256();
        for (int i = at; i < end; i += 8) {
#pragma GCC unroll 8
            for (int k = i; k < i + 8; k++) {
                __m256i code[V];
#pragma GCC unroll 2
                for (int v = 0; v < V; v++) code[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes + k * stride + v * 32));
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    int32_t four;
                    memcpy(&four, by.weights + r * STRIDE + 4 * k, 4);
                    const __m256i weight = _mm256_set1_epi32(four);
#pragma GCC unroll 2
                    for (int v = 0; v < V; v++) {
#if defined(FOURS)
                        sum[r][v] = add_fours(sum[r][v], code[v], weight);
#else
                        sum[r][v] = _mm256_add_epi16(sum[r][v], _mm256_maddubs_epi16(code[v], weight));
                        asm("" : "+x"(sum[r][v]));  // GCC would add in another order, which takes more registers than there are
#endif
                    }
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const __m256 step = _mm256_set1_ps(by.steps[b][r]);
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) {
#if !defined(FOURS)
                sum[r][v] = _mm256_madd_epi16(sum[r][v], _mm256_set1_epi16(1));
#endif
                total[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][v]), step, total[r][v]);
            }
        }
    }
}

// The same for all lanes [from, to), multiples of 8, of n: f(row, first lane, sums with `base`).
template <int R, int STRIDE, class F>
inline void each_eight(const uint8_t *codes, int n, int from, int to, int rows, int bits, const Whole<R, STRIDE> &by, F f) {
    int first = from;
    for (; first + 2 * LANES <= to; first += 2 * LANES) {
        __m256 total[R][2];
        multiply_whole<R, 2>(codes + first * 4, n * 4, rows, bits, by, total);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < 2; v++) f(r, first + v * LANES, _mm256_add_ps(total[r][v], _mm256_set1_ps(by.base[r])));
    }
    if (first < to) {
        __m256 total[R][1];
        multiply_whole<R, 1>(codes + first * 4, n * 4, rows, bits, by, total);
        for (int r = 0; r < R; r++) f(r, first, _mm256_add_ps(total[r][0], _mm256_set1_ps(by.base[r])));
    }
}
#else
constexpr bool WHOLE = false;
#endif

}  // namespace
