// Logits of R query rows against a stretch of a key plane.
#pragma once

#include "job.h"
#include "codes.h"
#include "dots.h"

namespace {

using namespace kvloom;

constexpr int AHEAD = 2048;  // bytes by which memory is asked for keys before they are needed

// s[r * stride + t] = q[r] . k[t] for R rows; q [R, D] fp32, k [n, D].
template <int R, class T>
void dense_dot(const float *q, const T *k, int64_t n, int D, float *s, int stride) {
    const int rest = D % W, vectors = D - rest, last = D - W, whole = last > 0 ? D : vectors;
    const bool over = rest && last > 0;  // then the last vector begins before the others end, and those numbers count once
    alignas(64) float ends[R * W];
    if (over)
        for (int i = 0; i < R * W; i++) ends[i] = i % W < W - rest ? 0 : q[i / W * D + last + i % W];
    int64_t t = 0;
    for (; t + 2 <= n; t += 2) {
        const T *k0 = k + t * D, *k1 = k0 + D;
        for (int d = 0; d < 2 * D; d += 64 / int(sizeof(T))) prefetch(k0 + d + AHEAD / sizeof(T));
        vf a[R] = {}, b[R] = {};
        for (int d = 0; d < vectors; d += W) {
            const vf x = load(k0 + d), y = load(k1 + d);
            for (int r = 0; r < R; r++) {
                const vf w = load(q + r * D + d);
                a[r] += w * x;
                b[r] += w * y;
            }
        }
        if (over)
            for (int r = 0; r < R; r++) a[r] += load(ends + r * W) * load(k0 + last), b[r] += load(ends + r * W) * load(k1 + last);
        float x[R], y[R];
        sums<R>(a, x), sums<R>(b, y);
        for (int r = 0; r < R; r++) {
            for (int d = whole; d < D; d++) x[r] += q[r * D + d] * scalar(k0 + d), y[r] += q[r * D + d] * scalar(k1 + d);
            s[r * stride + t] = x[r], s[r * stride + t + 1] = y[r];
        }
    }
    if (t < n)
        for (int r = 0; r < R; r++) {
            vf a = {};
            for (int d = 0; d < vectors; d += W) a += load(q + r * D + d) * load(k + t * D + d);
            if (over) a += load(ends + r * W) * load(k + t * D + last);
            float x = sum(a);
            for (int d = whole; d < D; d++) x += q[r * D + d] * scalar(k + t * D + d);
            s[r * stride + t] = x;
        }
}

// Queries [R, D] as pairs of bfloat16; false where that would round one.
inline bool paired(const float *q, int n, uint32_t *out) {
    uint32_t lost = 0;
    for (int i = 0; i < n; i += 2) {
        uint32_t x[2];
        memcpy(x, q + i, 8);
        lost |= (x[0] | x[1]) & 0xffff;
        out[i / 2] = x[0] >> 16 | (x[1] & 0xffff0000u);
    }
    return lost == 0;
}

// The same for bfloat16 keys and queries that are bfloat16 as well, both in pairs, before `scale`: no product is rounded.
template <int R>
void paired_dot(const uint32_t *q, const uint8_t *k, int64_t n, int D, float scale, float *s, int stride) {
    const int pairs = D / 2, whole = pairs / W * W;
    for (int64_t t = 0; t < n; t++) {
        const uint8_t *key = k + t * D * 2;
        for (int d = 0; d < D * 2; d += 64) prefetch(key + d + AHEAD);
        vf a[R] = {};
        for (int d = 0; d < whole; d += W) {
            const vu x = load(reinterpret_cast<const uint32_t *>(key + d * 4));
            for (int r = 0; r < R; r++) a[r] = add(a[r], load(q + r * pairs + d), x);
        }
        if (whole < pairs) {
            uint32_t rest[W] = {}, other[W] = {};
            memcpy(rest, key + whole * 4, (pairs - whole) * 4);
            for (int r = 0; r < R; r++) {
                memcpy(other, q + r * pairs + whole, (pairs - whole) * 4);
                a[r] = add(a[r], load(other), load(rest));
            }
        }
        float x[R];
        sums<R>(a, x);
        for (int r = 0; r < R; r++) s[r * stride + t] = x[r] * scale;
    }
}

// One unit of keys packed along tokens: the slots [from, to) of it. The scale of a channel folds into the query, its minimum
// into one number for the unit; then codes are multiplied as they are, with slots in the lanes.
template <int R>
void packed_dot(const float *q, const uint8_t *data, const float *scale, const float *zero, int bits, int G, int D, int from,
                int to, float *s, int stride) {
    alignas(64) float weights[R * MAX_DIM];
    float base[R];
    fold<R, MAX_DIM>(q, D, scale, zero, D, weights, base);
    each_lanes<R, MAX_DIM>(
        data, bits, G, D, [&](int) { return weights; },
        [&](int first, const float *sums) {
            const int low = from > first ? from : first, high = to < first + W ? to : first + W;
            for (int r = 0; r < R; r++) {
                float *mine = s + r * stride - from;
                if (low == first && high == first + W) {
                    store(mine + first, load(sums + r * W) + base[r]);
                } else {
                    for (int i = low; i < high; i++) mine[i] = sums[r * W + i - first] + base[r];
                }
            }
        });
}

#if defined(__AVX2__)
// The same in whole numbers.
template <int R>
void packed_dot_whole(const float *q, const uint8_t *data, const float *scale, const float *zero, int bits, int G, int D, int from,
                      int to, float *s, int stride) {
    Whole<R, MAX_DIM> by;
    static thread_local Scratch<uint8_t> scratch;
    uint8_t *codes = scratch.room(size_t(D + PAD - 1) / PAD * PAD * G);
    fold_whole(q, D, scale, zero, D, bits, by);
    side_by_side(data, bits, G, D, codes);
    each_eight(codes, G, from / LANES * LANES, (to + LANES - 1) / LANES * LANES, D, bits, by, [&](int r, int first, __m256 found) {
        float *mine = s + r * stride - from;
        if (from <= first && first + LANES <= to) return _mm256_storeu_ps(mine + first, found);
        float lanes[LANES];
        _mm256_storeu_ps(lanes, found);
        for (int i = from > first ? from : first; i < to && i < first + LANES; i++) mine[i] = lanes[i - first];
    });
}
#endif

// Logits of queries `from` [R, D] times `scale` against the slots [a, b) of a run.
template <int R>
void key_rows(const Run &run, const float *from, float scale_by, int head, int64_t a, int64_t b, int D, float *s, int stride) {
    if constexpr (PAIRS) {
        alignas(64) uint32_t pairs[R * MAX_DIM / 2];
        if (run.kind == BFLOAT16 && paired(from, R * D, pairs))
            return paired_dot<R>(pairs, run.data + head * run.head + a * D * 2, b - a, D, scale_by, s, stride);
    }
    alignas(64) float q[R * MAX_DIM];
    for (int i = 0; i < R * D; i++) q[i] = from[i] * scale_by;
    const uint8_t *data = run.data + head * run.head;
    switch (run.kind) {
    case FLOAT32: return dense_dot<R>(q, reinterpret_cast<const F32 *>(data) + a * D, b - a, D, s, stride);
    case FLOAT16: return dense_dot<R>(q, reinterpret_cast<const F16 *>(data) + a * D, b - a, D, s, stride);
    case BFLOAT16: return dense_dot<R>(q, reinterpret_cast<const BF16 *>(data) + a * D, b - a, D, s, stride);
    case TOKENS: {
        const int G = run.group;
        alignas(64) float scale[MAX_DIM], zero[MAX_DIM];
        const int64_t bytes = int64_t(D) * G * run.bits / 8;
        const uint8_t *scales = run.scale + head * run.scale_head, *zeros = run.zero + head * run.zero_head;
        for (int64_t u = a / G; u * G < b; u++) {
            ask(data + (u + 1) * bytes, bytes), ask(scales + (u + 1) * D * 2, D * 2), ask(zeros + (u + 1) * D * 2, D * 2);
            numbers(run.small, scales, u * D, D, scale), numbers(run.small, zeros, u * D, D, zero);
            const int from = u * G < a ? int(a - u * G) : 0, to = (u + 1) * G > b ? int(b - u * G) : G;
            const auto dot = [&](auto f) { f(q, data + u * bytes, scale, zero, run.bits, G, D, from, to, s + (u * G + from - a), stride); };
#if defined(__AVX2__)
            if (run.whole) {
                dot(packed_dot_whole<R>);
                continue;
            }
#endif
            dot(packed_dot<R>);
        }
        return;
    }
    case CHANNELS:
        for (int64_t t = a; t < b; t += BLOCK) {
            alignas(64) float x[BLOCK * MAX_DIM];
            const int64_t n = b - t < BLOCK ? b - t : BLOCK;
            decode_channels(run, head, t, n, D, x, D);
            dense_dot<R>(q, reinterpret_cast<const F32 *>(x), n, D, s + (t - a), stride);
        }
        return;
    default: return;  // a tile
    }
}

}  // namespace
