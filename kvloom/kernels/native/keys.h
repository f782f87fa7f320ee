// Logits of R query rows against a stretch of a key plane.
#pragma once

#include "job.h"
#include "unpack.h"

namespace {

using namespace kvloom;

// s[r * stride + t] = q[r] . k[t] for R rows; q [R, D] fp32, k [n, D].
template <int R, class T>
void dense_dot(const float *q, const T *k, int64_t n, int D, float *s, int stride) {
    const int whole = D / W * W;
    int64_t t = 0;
    for (; t + 2 <= n; t += 2) {
        const T *k0 = k + t * D, *k1 = k0 + D;
        vf a[R] = {}, b[R] = {};
        for (int d = 0; d < whole; d += W) {
            const vf x = load(k0 + d), y = load(k1 + d);
            for (int r = 0; r < R; r++) {
                const vf w = load(q + r * D + d);
                a[r] += w * x;
                b[r] += w * y;
            }
        }
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
            for (int d = 0; d < whole; d += W) a += load(q + r * D + d) * load(k + t * D + d);
            float x = sum(a);
            for (int d = whole; d < D; d++) x += q[r * D + d] * scalar(k + t * D + d);
            s[r * stride + t] = x;
        }
}

// One unit of keys packed along tokens: the slots [from, to) of it. The scale of a channel folds into the query, its minimum
// into one number for the unit; then codes are multiplied as they are, with slots in the lanes.
template <int R, int BITS>
void packed_dot(const float *q, const uint8_t *data, const float *scale, const float *zero, int bits, int G, int D,
                int from, int to, float *s, int stride) {
    alignas(64) float folded[R * MAX_DIM];
    float base[R];
    for (int r = 0; r < R; r++) {
        vf total = {};
        int d = 0;
        for (; d + W <= D; d += W) {
            const vf x = load(q + r * D + d);
            store(folded + r * MAX_DIM + d, x * load(scale + d));
            total += x * load(zero + d);
        }
        base[r] = sum(total);
        for (; d < D; d++) folded[r * MAX_DIM + d] = q[r * D + d] * scale[d], base[r] += q[r * D + d] * zero[d];
    }
    const Codes<BITS> found(data, bits, G, D);
    for (int pair = 0; pair < found.pairs(); pair++) {
        const auto place = found.place(pair);
        vf sums[2][R];
        for (int r = 0; r < R; r++) sums[0][r] = sums[1][r] = splat(base[r]);
        for (int d = 0; d < D; d++) {
            vf x, y;
            found.fetch(place, d, x, y);
            for (int r = 0; r < R; r++) {
                const vf w = splat(folded[r * MAX_DIM + d]);
                sums[0][r] += w * x;
                sums[1][r] += w * y;
            }
        }
        for (int half = 0; half < 2; half++) {
            const int first = found.first(pair, half);
            const int low = from > first ? from : first, high = to < first + W ? to : first + W;
            for (int r = 0; r < R && low < high; r++) {
                alignas(64) float lanes[W];
                store(lanes, sums[half][r]);
                memcpy(s + r * stride + (low - from), lanes + (low - first), (high - low) * sizeof(float));
            }
        }
    }
}

template <int R>
void key_rows(const Run &run, const float *q, int head, int64_t a, int64_t b, int D, float *s, int stride) {
    const uint8_t *data = run.data + head * run.head;
    switch (run.kind) {
    case FLOAT32: return dense_dot<R>(q, reinterpret_cast<const F32 *>(data) + a * D, b - a, D, s, stride);
    case FLOAT16: return dense_dot<R>(q, reinterpret_cast<const F16 *>(data) + a * D, b - a, D, s, stride);
    case BFLOAT16: return dense_dot<R>(q, reinterpret_cast<const BF16 *>(data) + a * D, b - a, D, s, stride);
    case TOKENS: {
        const int G = run.group;
        alignas(64) float scale[MAX_DIM], zero[MAX_DIM];
        for (int64_t u = a / G; u * G < b; u++) {
            numbers(run.small, run.scale + head * run.scale_head, u * D, D, scale);
            numbers(run.small, run.zero + head * run.zero_head, u * D, D, zero);
            const int from = u * G < a ? int(a - u * G) : 0, to = (u + 1) * G > b ? int(b - u * G) : G;
            with_codes(run.bits, G, [&](auto bits) {
                packed_dot<R, bits.value>(q, data + u * D * (G * run.bits / 8), scale, zero, run.bits, G, D, from, to,
                                          s + (u * G + from - a), stride);
            });
        }
        return;
    }
    case CHANNELS:
        for (int64_t t = a; t < b; t += BLOCK) {
            alignas(64) float x[BLOCK * MAX_DIM];
            const int64_t n = b - t < BLOCK ? b - t : BLOCK;
            decode_channels(run, head, t, n, D, x);
            dense_dot<R>(q, reinterpret_cast<const F32 *>(x), n, D, s + (t - a), stride);
        }
    }
}

}  // namespace
