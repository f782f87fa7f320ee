// Vectors of W floats, in the vector types that GCC and Clang share (other compilers: lanes.h). Included once per instruction set.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;  // two registers of 4 on machines that have no wider ones
#endif

}  // namespace

#if !defined(__GNUC__) || defined(PLAIN)
#include "lanes.h"
#define KVLOOM_APART
#else
#define KVLOOM_APART __attribute__((noinline))

namespace {

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
// The same in memory, at any address.
typedef float mf __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t mu __attribute__((vector_size(W * 4), aligned(2), may_alias));  // pairs of 16 bits, too
typedef uint16_t vh __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef uint8_t vb __attribute__((vector_size(W), aligned(1), may_alias));

inline vf at(const float *p) { return *reinterpret_cast<const mf *>(p); }
inline vu at(const uint32_t *p) { return *reinterpret_cast<const mu *>(p); }
inline vh at(const uint16_t *p) { return *reinterpret_cast<const vh *>(p); }
inline vb at(const uint8_t *p) { return *reinterpret_cast<const vb *>(p); }
inline void to(float *p, vf x) { *reinterpret_cast<mf *>(p) = x; }
inline void to(void *p, vh x) { *reinterpret_cast<vh *>(p) = x; }

template <class V, class T>
V converted(T from) {
    return __builtin_convertvector(from, V);
}
inline vf select(vi mask, vf a, vf b) { return mask ? a : b; }
inline void prefetch(const void *p) { __builtin_prefetch(p); }

}  // namespace
#endif

namespace {

inline vf splat(float x) { return x - vf{}; }
inline vf load(const float *p) { return at(p); }
inline void store(float *p, vf x) { to(p, x); }

// W bytes, or W 16-bit numbers, widened to 32 bits. Left to themselves, compilers do this one lane at a time.
inline vi bytes(const uint8_t *p) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
#else
    return converted<vi>(at(p));
#endif
}
inline vu halves(const uint16_t *p) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#else
    return converted<vu>(at(p));
#endif
}
inline vf floats(vi x) { return converted<vf>(x); }

struct F32 { float x; };
struct F16 { uint16_t x; };
struct BF16 { uint16_t x; };

inline float scalar(const float *p) { return *p; }
inline float scalar(const F32 *p) { return p->x; }
inline float scalar(const BF16 *p) {
    uint32_t bits = uint32_t(p->x) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
inline float scalar(const F16 *p) {  // any half, subnormals and infinities included, by one exact product
#if defined(__F16C__)
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(p->x)));
#endif
    uint32_t sign = uint32_t(p->x & 0x8000) << 16, rest = uint32_t(p->x & 0x7fff) << 13;
    float out;
    memcpy(&out, &rest, 4);
    out *= 0x1p112f;
    if ((p->x & 0x7c00) == 0x7c00) {
        rest |= 0x7f800000;
        memcpy(&out, &rest, 4);
    }
    memcpy(&rest, &out, 4);
    rest |= sign;
    memcpy(&out, &rest, 4);
    return out;
}

inline uint16_t to_bfloat16(float x) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t to_float16(float x) {
#if defined(__F16C__)
    return uint16_t(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), 0), 0));
#endif
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above
    if (bits < 0x38800000) {                                 // subnormal: adding 0.5 leaves the rounded code in the low bits
        float y;
        memcpy(&y, &bits, 4);
        y += 0.5f;
        memcpy(&bits, &y, 4);
        return uint16_t(sign | (bits - 0x3f000000));
    }
    return uint16_t(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}

// sum + a b, where a lane is one number, or a pair of bfloat16 (the first in the lower half) of which both products are added.
inline vf add(vf sum, vf a, vf b) { return sum + a * b; }
inline vf add(vf sum, vu a, vu b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else  // the same but for numbers below 2 ** -126, which the instruction takes for zeros
    const vu mask = vu{} + 0xffff0000u;
    sum += (vf)(a & mask) * (vf)(b & mask);
    return sum + (vf)(a << 16) * (vf)(b << 16);
#endif
}
#if defined(__AVX512BF16__) || defined(EMULATED)
constexpr bool PAIRS = true;  // whether bfloat16 is multiplied in pairs
#else
constexpr bool PAIRS = false;
#endif

// One number, or one pair, in all lanes.
inline vf all(const float *p) { return splat(*p); }
inline vu all(const uint32_t *p) {
    uint32_t x;
    memcpy(&x, p, 4);
    return vu{} + x;
}
inline vu load(const uint32_t *p) { return at(p); }

// W numbers of at least 0 as they are multiplied: fp32, or bfloat16.
inline void put(float *p, vf x) { store(p, x); }
inline void put(uint32_t *p, vf x) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    const vu bits = (vu)x;
    to(static_cast<void *>(p), converted<vh>((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
#endif
}

inline vf load(const F32 *p) { return load(reinterpret_cast<const float *>(p)); }
inline vf load(const BF16 *p) {
    vu bits = halves(&p->x) << 16;
    return (vf)bits;
}
inline vf load(const F16 *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#else
    vf out;
    for (int i = 0; i < W; i++) out[i] = scalar(p + i);
    return out;
#endif
}

inline float sum(vf x) {
    float lanes[W];
    store(lanes, x);
    float four[4];
    for (int i = 0; i < 4; i++) four[i] = lanes[i];
    for (int i = 4; i < W; i++) four[i % 4] += lanes[i];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// The sums of R vectors. Four at a time where the machine adds neighbours: a third of the work of one by one.
template <int R>
void sums(const vf *x, float *out) {
#if defined(__AVX2__)
    if (R == 4) {
        __m256 half[4];
        for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)
            const __m512 whole = (__m512)x[i];
            half[i] = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
#else
            half[i] = (__m256)x[i];
#endif
        }
        const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
        return;
    }
#endif
    for (int i = 0; i < R; i++) out[i] = sum(x[i]);
}

inline vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select(a > b, a, b);
#endif
}
inline vf smaller(vf a, vf b) { return -larger(-a, -b); }

// The greatest numbers of R vectors.
template <int R>
void tops(const vf *x, float *out) {
#if defined(__AVX2__)
    if (R == 4) {
        __m256 half[4];
        for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)
            const __m512 whole = (__m512)x[i];
            half[i] = _mm256_max_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
#else
            half[i] = (__m256)x[i];
#endif
        }
        const auto pairs = [](__m256 a, __m256 b) { return _mm256_max_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd)); };
        const __m256 four = pairs(pairs(half[0], half[1]), pairs(half[2], half[3]));
        _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
        return;
    }
#endif
    for (int i = 0; i < R; i++) {
        float lanes[W];
        store(lanes, x[i]);
        out[i] = lanes[0];
        for (int j = 1; j < W; j++) out[i] = lanes[j] > out[i] ? lanes[j] : out[i];
    }
}

// e ** x for x <= 0 (and a little above): 2 ** n by the exponent's bits, 2 ** f by a polynomial; relative error 2e-7.
inline vf exp(vf x) {
    vf t = x * 1.44269504f;
    t = select(t < -126.0f, splat(-126.0f), t);
    vi n = converted<vi>(t - 0.5f);  // towards zero: for t <= 0 the nearest whole number
    vf f = t - floats(n);
    vf p = splat(1.535336188e-4f);
    p = p * f + 1.339887440e-3f;
    p = p * f + 9.618437357e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472028e-1f;
    p = p * f + 1.0f;
    vi bits = (n + 127) << 23;
    vf out = p * (vf)bits;
    return select(x < -87.0f, splat(0.0f), out);
}

// Room that a thread keeps. No std::vector: its functions, compiled for one instruction set, could be linked into another.
template <class T>
struct Scratch {
    T *data = nullptr;
    size_t size = 0;
    ~Scratch() { free(data); }
    T *room(size_t n) {
        if (n > size) {
            free(data);
            data = static_cast<T *>(malloc((n + 64) * sizeof(T)));
            if (!data) abort();
            size = n;
        }
        return data;
    }
};

}  // namespace
