// Weighted sums of a stretch of a value plane.
#pragma once

#include "job.h"
#include "codes.h"
#include "dots.h"

namespace {

using namespace kvloom;

constexpr int MIXED = 64;  // slots whose values stay in the first cache while all their channels are summed

// out[r, :] += sum over t of p[r * stride + t] v[t]; v [n, D].
template <int R, class T>
void dense_mix(const float *p, int stride, const T *v, int64_t n, int D, float *out) {
    for (int64_t t0 = 0; t0 < n; t0 += MIXED) {
        const int m = n - t0 < MIXED ? int(n - t0) : MIXED;
        const T *rows = v + t0 * D;
        const float *w = p + t0;
        int d = 0;
        for (; d + 2 * W <= D; d += 2 * W) {
            vf a[R], b[R];
            for (int r = 0; r < R; r++) a[r] = load(out + r * D + d), b[r] = load(out + r * D + d + W);
            for (int t = 0; t < m; t++) {
                const vf x = load(rows + t * D + d), y = load(rows + t * D + d + W);
                prefetch(rows + (MIXED * D + (d * m + t * 2 * W)));  // the next tile, in its own order
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
        if (d < D && D > W) {  // the last numbers of a row, with some that have been summed
            for (int r = 0; r < R; r++) {
                vf a = {};
                for (int t = 0; t < m; t++) a += splat(w[r * stride + t]) * load(rows + t * D + D - W);
                float lanes[W];
                store(lanes, a);
                for (int i = d; i < D; i++) out[r * D + i] += lanes[i - (D - W)];
            }
            d = D;
        }
        for (; d < D; d++)
            for (int r = 0; r < R; r++)
                for (int t = 0; t < m; t++) out[r * D + d] += w[r * stride + t] * scalar(rows + t * D + d);
    }
}

// Numbers of n slots, one for each group of channels: out [groups, MIXED] from [n, groups].
inline void columns(Kind kind, const uint8_t *data, int64_t t0, int n, int groups, float *out) {
    alignas(64) float rows[MIXED * (MAX_DIM / 8)];
    numbers(kind, data, t0 * groups, n * groups, groups == 1 ? out : rows);
    if (groups == 2) {  // a stride known to the compiler
        for (int t = 0; t < n; t++) out[t] = rows[2 * t], out[MIXED + t] = rows[2 * t + 1];
    } else if (groups == 4) {
        for (int g = 0; g < 4; g++)
            for (int t = 0; t < n; t++) out[g * MIXED + t] = rows[4 * t + g];
    } else if (groups > 1) {
        for (int g = 0; g < groups; g++)
            for (int t = 0; t < n; t++) out[g * MIXED + t] = rows[t * groups + g];
    }
}

#if defined(__AVX2__)
// Up to MIXED slots packed along channels, in whole numbers; scale and zero [groups, MIXED].
template <int R>
void packed_mix_whole(const float *p, int stride, const float *scale, const float *zero, const uint8_t *data, int bits, int G, int n,
                      int D, float *out) {
    Whole<R, MIXED> by;
    static thread_local Scratch<uint8_t> scratch;
    uint8_t *codes = scratch.room(size_t(n + PAD - 1) / PAD * PAD * D);
    side_by_side(data, bits, D, n, codes);
    for (int g = 0; g * G < D; g++) {
        fold_whole(p, stride, scale + g * MIXED, zero + g * MIXED, n, bits, by);
        each_eight(codes, D, g * G, (g + 1) * G, n, bits, by, [&](int r, int first, __m256 found) {
            float *mine = out + r * D + first;
            _mm256_storeu_ps(mine, _mm256_add_ps(_mm256_loadu_ps(mine), found));
        });
    }
}
#endif

// Up to MIXED slots packed along channels. The scale of a slot folds into its weight, its minimum into one number for each
// group of channels; then codes are multiplied as they are, with channels in the lanes.
template <int R>
void packed_mix(const float *p, int stride, const Run &run, int head, int64_t t0, int n, int D, float *out) {
    const int G = run.group, groups = D / G, row = D * run.bits / 8;
    alignas(64) float scale[MIXED * (MAX_DIM / 8)], zero[MIXED * (MAX_DIM / 8)];
    const uint8_t *codes = run.data + head * run.head, *scales = run.scale + head * run.scale_head;
    const uint8_t *zeros = run.zero + head * run.zero_head;
    ask(codes + (t0 + n) * row, n * row), ask(scales + (t0 + n) * groups * 2, n * groups * 2);
    ask(zeros + (t0 + n) * groups * 2, n * groups * 2);
    columns(run.small, scales, t0, n, groups, scale), columns(run.small, zeros, t0, n, groups, zero);
#if defined(__AVX2__)
    if (run.whole) return packed_mix_whole<R>(p, stride, scale, zero, codes + t0 * row, run.bits, G, n, D, out);
#endif
    static thread_local Scratch<float> scratch;
    float *weights = scratch.room(size_t(groups) * R * MIXED), base[R];  // [groups, R, MIXED]
    for (int g = 0; g < groups; g++) {
        fold<R, MIXED>(p, stride, scale + g * MIXED, zero + g * MIXED, n, weights + g * R * MIXED, base);
        for (int r = 0; r < R; r++)
            for (int d = g * G; d < (g + 1) * G; d++) out[r * D + d] += base[r];
    }
    each_lanes<R, MIXED>(
        codes + t0 * row, run.bits, D, n, [&](int first) { return weights + first / G * R * MIXED; },
        [&](int first, const float *sums) {
            for (int r = 0; r < R; r++) {
                float *mine = out + r * D + first;
                if (first + W <= D) {
                    store(mine, load(mine) + load(sums + r * W));
                } else {
                    for (int i = 0; first + i < D; i++) mine[i] += sums[r * W + i];
                }
            }
        });
}

// out [R, D] += weights p times the slots [a, b) of a run.
template <int R>
void value_rows(const Run &run, int head, int64_t a, int64_t b, int D, const float *p, int stride, float *out) {
    const uint8_t *data = run.data + head * run.head;
    switch (run.kind) {
    case FLOAT32: return dense_mix<R>(p, stride, reinterpret_cast<const F32 *>(data) + a * D, b - a, D, out);
    case FLOAT16: return dense_mix<R>(p, stride, reinterpret_cast<const F16 *>(data) + a * D, b - a, D, out);
    case BFLOAT16: return dense_mix<R>(p, stride, reinterpret_cast<const BF16 *>(data) + a * D, b - a, D, out);
    case CHANNELS: {
        const bool lanes = (WHOLE && run.whole) || run.group % W == 0 || run.group == D;  // channels of one vector share a scale
        for (int64_t t = a; t < b; t += lanes ? MIXED : BLOCK) {
            const int n = int(b - t < (lanes ? MIXED : BLOCK) ? b - t : (lanes ? MIXED : BLOCK));
            if (lanes) {
                packed_mix<R>(p + (t - a), stride, run, head, t, n, D, out);
            } else {
                alignas(64) float x[BLOCK * MAX_DIM];
                decode_channels(run, head, t, n, D, x, D);
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
            decode_tokens(run, head, t, int(n), D, x, D);
            dense_mix<R>(p + (t - a), stride, reinterpret_cast<const F32 *>(x), n, D, out);
            t += n;
        }
        return;
    default: return;  // a tile
    }
}

}  // namespace
