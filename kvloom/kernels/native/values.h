// Weighted sums of a stretch of a value plane.
#pragma once

#include "job.h"
#include "unpack.h"

namespace {

using namespace kvloom;

constexpr int TILE = 64;  // slots whose values stay in the first cache while all their channels are summed

// out[r, :] += sum over t of p[r * stride + t] v[t]; v [n, D].
template <int R, class T>
void dense_mix(const float *p, int stride, const T *v, int64_t n, int D, float *out) {
    for (int64_t t0 = 0; t0 < n; t0 += TILE) {
        const int m = n - t0 < TILE ? int(n - t0) : TILE;
        const T *rows = v + t0 * D;
        const float *w = p + t0;
        int d = 0;
        for (; d + 2 * W <= D; d += 2 * W) {
            vf a[R], b[R];
            for (int r = 0; r < R; r++) a[r] = load(out + r * D + d), b[r] = load(out + r * D + d + W);
            for (int t = 0; t < m; t++) {
                const vf x = load(rows + t * D + d), y = load(rows + t * D + d + W);
                for (int r = 0; r < R; r++) {
                    const vf each = splat(w[r * stride + t]);
                    a[r] += each * x;
                    b[r] += each * y;
                }
            }
            for (int r = 0; r < R; r++) store(out + r * D + d, a[r]), store(out + r * D + d + W, b[r]);
        }
        for (; d + W <= D; d += W)
            for (int r = 0; r < R; r++) {
                vf a = load(out + r * D + d);
                for (int t = 0; t < m; t++) a += splat(w[r * stride + t]) * load(rows + t * D + d);
                store(out + r * D + d, a);
            }
        for (; d < D; d++)
            for (int r = 0; r < R; r++)
                for (int t = 0; t < m; t++) out[r * D + d] += w[r * stride + t] * scalar(rows + t * D + d);
    }
}

// Up to TILE slots packed along channels. The scale of a slot folds into its weight, its minimum into one number for each
// group of channels; then codes are multiplied as they are, with channels in the lanes.
template <int R, int BITS>
void packed_mix(const float *p, int stride, const Run &run, int head, int64_t t0, int n, int D, float *out) {
    const int G = run.group, groups = D / G, row = D * run.bits / 8;
    alignas(64) float numbers_of[TILE * (MAX_DIM / 8)], column[TILE];
    static thread_local Scratch<float> scratch;
    float *folded = scratch.room(size_t(groups) * R * TILE);  // [groups, R, TILE]
    numbers(run.small, run.scale + head * run.scale_head, t0 * groups, n * groups, numbers_of);
    for (int g = 0; g < groups; g++) {
        for (int t = 0; t < n; t++) column[t] = numbers_of[t * groups + g];
        for (int r = 0; r < R; r++)
            for (int t = 0; t < n; t++) folded[(g * R + r) * TILE + t] = p[r * stride + t] * column[t];
    }
    numbers(run.small, run.zero + head * run.zero_head, t0 * groups, n * groups, numbers_of);
    for (int g = 0; g < groups; g++) {
        for (int t = 0; t < n; t++) column[t] = numbers_of[t * groups + g];
        for (int r = 0; r < R; r++) {
            vf total = {};
            int t = 0;
            for (; t + W <= n; t += W) total += load(p + r * stride + t) * load(column + t);
            float base = sum(total);
            for (; t < n; t++) base += p[r * stride + t] * column[t];
            for (int d = g * G; d < (g + 1) * G; d++) out[r * D + d] += base;
        }
    }
    const Codes<BITS> found(run.data + head * run.head + t0 * row, run.bits, D, n);
    for (int pair = 0; pair < found.pairs(); pair++) {
        const auto place = found.place(pair);
        const int first = found.first(pair, 0), second = found.first(pair, 1);
        const float *w0 = folded + size_t(first < D ? first / G : 0) * R * TILE;
        const float *w1 = folded + size_t(second < D ? second / G : 0) * R * TILE;
        vf a[R] = {}, b[R] = {};
        for (int t = 0; t < n; t++) {
            vf x, y;
            found.fetch(place, t, x, y);
            for (int r = 0; r < R; r++) {
                a[r] += splat(w0[r * TILE + t]) * x;
                b[r] += splat(w1[r * TILE + t]) * y;
            }
        }
        for (int half = 0; half < 2; half++) {
            const int at = half ? second : first, count = D - at < W ? D - at : W;
            for (int r = 0; r < R && count > 0; r++) {
                alignas(64) float lanes[W];
                store(lanes, half ? b[r] : a[r]);
                for (int i = 0; i < count; i++) out[r * D + at + i] += lanes[i];
            }
        }
    }
}

// The slots [t, t + n) of a unit of values packed along tokens, decoded: x [n, D].
inline void decode_tokens(const Run &run, int head, int64_t t, int n, int D, float *x) {
    const int G = run.group, bytes = G * run.bits / 8;
    const int64_t u = t / G;
    const int from = int(t - u * G);
    alignas(64) float scale[MAX_DIM], zero[MAX_DIM];
    numbers(run.small, run.scale + head * run.scale_head, u * D, D, scale);
    numbers(run.small, run.zero + head * run.zero_head, u * D, D, zero);
    static thread_local Scratch<uint8_t> scratch;
    uint8_t *row = scratch.room(G);
    for (int d = 0; d < D; d++) {
        unpack(run.data + head * run.head + (u * D + d) * bytes, run.bits, G, row);
        for (int i = 0; i < n; i++) x[i * D + d] = row[from + i] * scale[d] + zero[d];
    }
}

template <int R>
void value_rows(const Run &run, int head, int64_t a, int64_t b, int D, const float *p, int stride, float *out) {
    const uint8_t *data = run.data + head * run.head;
    switch (run.kind) {
    case FLOAT32: return dense_mix<R>(p, stride, reinterpret_cast<const F32 *>(data) + a * D, b - a, D, out);
    case FLOAT16: return dense_mix<R>(p, stride, reinterpret_cast<const F16 *>(data) + a * D, b - a, D, out);
    case BFLOAT16: return dense_mix<R>(p, stride, reinterpret_cast<const BF16 *>(data) + a * D, b - a, D, out);
    case CHANNELS: {
        const bool lanes = run.group % W == 0;  // a vector of channels has one scale
        for (int64_t t = a; t < b; t += lanes ? TILE : BLOCK) {
            const int n = int(b - t < (lanes ? TILE : BLOCK) ? b - t : (lanes ? TILE : BLOCK));
            if (lanes) {
                with_codes(run.bits, D, [&](auto bits) {
                    packed_mix<R, bits.value>(p + (t - a), stride, run, head, t, n, D, out);
                });
            } else {
                alignas(64) float x[BLOCK * MAX_DIM];
                decode_channels(run, head, t, n, D, x);
                dense_mix<R>(p + (t - a), stride, reinterpret_cast<const F32 *>(x), n, D, out);
            }
        }
        return;
    }
    case TOKENS:
        for (int64_t t = a; t < b;) {
            alignas(64) float x[BLOCK * MAX_DIM];
            const int64_t end = (t / run.group + 1) * run.group;
            int64_t n = (end < b ? end : b) - t;
            n = n < BLOCK ? n : BLOCK;
            decode_tokens(run, head, t, int(n), D, x);
            dense_mix<R>(p + (t - a), stride, reinterpret_cast<const F32 *>(x), n, D, out);
            t += n;
        }
    }
}

}  // namespace
