// What prefill and observation share: blocks of keys with slots in the lanes, and logits of a strip of query rows over them.
#pragma once

#include "job.h"
#include "unpack.h"

namespace {

using namespace kvloom;

constexpr int STRIP = 6, BLOCK_KEYS = PREFILL_KEYS;  // 6 x 2 vectors of sums fill the registers; a block of keys and values stays in L1

// What a step of a product multiplies, E: numbers, or pairs of bfloat16, which are two numbers in one.
template <class E>
constexpr int PER = std::is_same<E, float>::value ? 1 : 2;

// Keys [first, first + BLOCK_KEYS) transposed: out [D / PER, BLOCK_KEYS], numbers times `scale`; slots from n on are zeros.
inline void transposed(const Matrix &k, int head, int64_t first, int64_t n, int D, float scale, float *out) {
    alignas(64) float row[MAX_DIM];
    for (int i = 0; i < BLOCK_KEYS; i++) {
        if (first + i < n) {
            row_of(k, head, first + i, D, row);
            for (int d = 0; d < D; d++) out[d * BLOCK_KEYS + i] = row[d] * scale;
        } else {
            for (int d = 0; d < D; d++) out[d * BLOCK_KEYS + i] = 0;
        }
    }
}

inline void transposed(const Matrix &k, int head, int64_t first, int64_t n, int D, float, uint32_t *out) {
    uint32_t row[MAX_DIM / 2];
    for (int i = 0; i < BLOCK_KEYS; i++) {
        if (first + i < n) memcpy(row, k.data + head * k.head + (first + i) * k.row, D * 2);
        else memset(row, 0, D * 2);
        for (int d = 0; d < D / 2; d++) out[d * BLOCK_KEYS + i] = row[d];
    }
}

// Values [first, first + n) of V channels, padded with zeros to BLOCK_KEYS of `width`: out [BLOCK_KEYS / PER, width].
inline void rows_of(const Matrix &v, int head, int64_t first, int n, int V, int width, float *out) {
    for (int i = 0; i < n; i++) row_of(v, head, first + i, V, out + i * width);
    for (int i = n * width; i < BLOCK_KEYS * width; i++) out[i] = 0;
}
inline void rows_of(const Matrix &v, int head, int64_t first, int n, int V, int width, uint32_t *out) {
    uint16_t low[MAX_DIM], high[MAX_DIM];
    for (int i = 0; i < BLOCK_KEYS; i += 2) {
        for (int k = 0; k < 2; k++) {
            uint16_t *to = k ? high : low;
            if (i + k < n) memcpy(to, v.data + head * v.head + (first + i + k) * v.row, V * 2);
            else memset(to, 0, V * 2);
        }
        for (int d = 0; d < V; d++) out[i / 2 * width + d] = low[d] | uint32_t(high[d]) << 16;
    }
}

// c[r * stride + j] (+)= sum over i < n of a[r * step + i] * b[i * width + j], for a strip of rows and 2 W columns.
template <bool ADD, class E>
inline void product(const E *a, int step, const E *b, int width, int n, float *c, int stride, const float *factor) {
    vf x[STRIP], y[STRIP];
#pragma GCC unroll 6
    for (int r = 0; r < STRIP; r++) {
        x[r] = ADD ? load(c + r * stride) * factor[r] : vf{};
        y[r] = ADD ? load(c + r * stride + W) * factor[r] : vf{};
    }
    for (int i = 0; i < n; i++) {
        const auto u = load(b + i * width), v = load(b + i * width + W);
#pragma GCC unroll 6
        for (int r = 0; r < STRIP; r++) {
            const auto w = all(a + r * step + i);
            x[r] = add(x[r], w, u);
            y[r] = add(y[r], w, v);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < STRIP; r++) store(c + r * stride, x[r]), store(c + r * stride + W, y[r]);
}

inline vf capped(vf s, float limit) {  // limit * tanh(s / limit)
    const vf x = s * (1 / limit), e = exp(-2.0f * larger(x, -x)), t = limit * (1.0f - e) / (1.0f + e);
    return select(x < 0.0f, -t, t);
}

// Logits of a strip of rows at positions `at`, `at` + 1, ... against one block of keys: s [STRIP, BLOCK_KEYS]. A row sees the
// slots below its limit: `past` + its position + 1 if causal, else n.
template <class E>
inline void logits(const Prefill &p, const E *q, const E *keys, int64_t first, int64_t at, float *s) {
    const int n = p.dim / PER<E>;
    for (int j = 0; j < BLOCK_KEYS; j += 2 * W) product<false>(q, n, keys + j, BLOCK_KEYS, n, s + j, BLOCK_KEYS, nullptr);
    if (PER<E> == 2)
        for (int i = 0; i < STRIP * BLOCK_KEYS; i += W) store(s + i, load(s + i) * p.scale);
    if (p.softcap > 0)
        for (int i = 0; i < STRIP * BLOCK_KEYS; i += W) store(s + i, capped(load(s + i), p.softcap));
    for (int r = 0; r < STRIP; r++) {
        int64_t limit = p.n - first;
        if (p.causal && p.past + at + r + 1 - first < limit) limit = p.past + at + r + 1 - first;
        for (int64_t i = limit > 0 ? limit : 0; i < BLOCK_KEYS; i++) s[r * BLOCK_KEYS + i] = -INFINITY;
    }
}

// The rows of a strip as they are multiplied; behind the last row it is repeated.
inline void strip_of(const Prefill &p, int query_head, int64_t at, float *q) {
    for (int r = 0; r < STRIP; r++) row_of(p.q, query_head, at + r < p.m ? at + r : p.m - 1, p.dim, q + r * p.dim);
}
inline void strip_of(const Prefill &p, int query_head, int64_t at, uint32_t *q) {
    for (int r = 0; r < STRIP; r++)
        memcpy(q + r * (p.dim / 2), p.q.data + query_head * p.q.head + (at + r < p.m ? at + r : p.m - 1) * p.q.row, p.dim * 2);
}

}  // namespace
