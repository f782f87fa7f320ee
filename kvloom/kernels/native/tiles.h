// What prefill and observation share: blocks of keys with slots in the lanes, and logits of a strip of query rows over them.
#pragma once

#include "job.h"
#include "unpack.h"

namespace {

using namespace kvloom;

constexpr int STRIP = 6, BLOCK_KEYS = PREFILL_KEYS;  // 6 x 2 vectors of sums fill the registers; a block of keys and values stays in L1

// Keys [first, first + BLOCK_KEYS) times `scale`, transposed: out [D, BLOCK_KEYS]; slots from n on are zeros.
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

// c[r * stride + j] (+)= sum over i < n of a[r * STEP + i] * b[i * width + j], for a strip of rows and 2 W columns.
template <bool ADD>
inline void product(const float *a, int step, const float *b, int width, int n, float *c, int stride, const float *factor) {
    vf x[STRIP], y[STRIP];
#pragma GCC unroll 6
    for (int r = 0; r < STRIP; r++) {
        x[r] = ADD ? load(c + r * stride) * factor[r] : vf{};
        y[r] = ADD ? load(c + r * stride + W) * factor[r] : vf{};
    }
    for (int i = 0; i < n; i++) {
        const vf u = load(b + i * width), v = load(b + i * width + W);
#pragma GCC unroll 6
        for (int r = 0; r < STRIP; r++) {
            const vf w = splat(a[r * step + i]);
            x[r] += w * u;
            y[r] += w * v;
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
inline void logits(const Prefill &p, const float *q, const float *keys, int64_t first, int64_t at, float *s) {
    for (int j = 0; j < BLOCK_KEYS; j += 2 * W) product<false>(q, p.dim, keys + j, BLOCK_KEYS, p.dim, s + j, BLOCK_KEYS, nullptr);
    if (p.softcap > 0)
        for (int i = 0; i < STRIP * BLOCK_KEYS; i += W) store(s + i, capped(load(s + i), p.softcap));
    for (int r = 0; r < STRIP; r++) {
        int64_t limit = p.n - first;
        if (p.causal && p.past + at + r + 1 - first < limit) limit = p.past + at + r + 1 - first;
        for (int64_t i = limit > 0 ? limit : 0; i < BLOCK_KEYS; i++) s[r * BLOCK_KEYS + i] = -INFINITY;
    }
}

// The rows of a strip as fp32; behind the last row it is repeated.
inline void strip_of(const Prefill &p, int query_head, int64_t at, float *q) {
    for (int r = 0; r < STRIP; r++) row_of(p.q, query_head, at + r < p.m ? at + r : p.m - 1, p.dim, q + r * p.dim);
}

}  // namespace
