// Rows of packed codes times weights, summed over the rows: the inner loop of both planes. For keys packed along tokens a row
// is a channel and its lanes are slots; for values packed along channels a row is a slot and its lanes are channels.
#pragma once

#include "unpack.h"

namespace {

// Two vectors of codes of every row, taken from the same bytes where planes allow it. A plane of `width` bytes holds width
// codes, all at the same bits of its bytes. Of a plane narrower than a vector the bytes are repeated, and each repetition is
// shifted to a plane of its own; 3 bits are 2 low ones and 1 high one, packed apart.
struct Pair {
    const uint8_t *low, *high;
    int stride;             // bytes from row to row
    int shift, high_shift;  // bits below the first code of the pair
    int first[2];           // the code that each vector begins with
};

// The planes of repeated bytes lie `step` bits apart.
template <int LOAD>
vi shifts(int first, int step) {
    vi out;
    for (int i = 0; i < W; i++) out[i] = first + i / LOAD * step;
    return out;
}

// LOAD bytes, repeated until they fill a vector, widened to 32 bits.
template <int LOAD>
vi repeated(const uint8_t *p) {
    if (LOAD == W) return bytes(p);
#if defined(__AVX512F__)
    if (LOAD == 8) return (vi)_mm512_cvtepu8_epi32(_mm_set1_epi64x(*reinterpret_cast<const int64_t *>(p)));
    return (vi)_mm512_cvtepu8_epi32(_mm_set1_epi32(*reinterpret_cast<const int32_t *>(p)));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32(_mm_set1_epi32(*reinterpret_cast<const int32_t *>(p)));
#else
    vi out;
    for (int i = 0; i < W; i++) out[i] = p[i % LOAD];
    return out;
#endif
}

inline vi right(vi x, vi by) {
#if defined(__AVX512F__)
    return (vi)_mm512_srlv_epi32((__m512i)x, (__m512i)by);
#elif defined(__AVX2__)
    return (vi)_mm256_srlv_epi32((__m256i)x, (__m256i)by);
#else
    return x >> by;
#endif
}

// out[(half * R + r) * W + i] = sum over rows of code i of that half times weight w[half][r * STRIDE + row]. LOW and HIGH are the
// bytes that are loaded of a row (HIGH 0: none); BITS is 4 where a pair is the two halves of whole vectors of bytes, 8 where
// it is neighbouring bytes, else 0.
template <int BITS, int LOW, int HIGH, int R, int STRIDE, bool SAME>
KVLOOM_APART void multiply(const Pair &pair, int bits, int rows, const float *w, const float *other, float *out) {
    constexpr int TOP = HIGH ? HIGH : W;
    const uint8_t *low = pair.low, *high = pair.high;
    const int64_t stride = pair.stride;
    const vi mask = vi{} + ((1 << bits) - 1), four = vi{} + 4;
    const vi to_x = shifts<LOW>(pair.shift, bits), to_y = to_x + bits * (W / LOW);
    const vi high_x = shifts<TOP>(pair.high_shift, 1), high_y = high_x + 2 * (W / LOW);  // a low plane is two high ones
    vf a[R], b[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) a[r] = b[r] = vf{};
    for (int row = 0; row < rows; row++) {
        const vi raw = repeated<LOW>(low);
        vi x, y;
        if (BITS == 8) {
            x = raw, y = bytes(low + W);
        } else if (BITS == 4) {
            x = raw & 15, y = raw >> 4;
        } else {
            x = right(raw, to_x) & mask, y = right(raw, to_y) & mask;
        }
        if (HIGH) {
            const vi top = repeated<TOP>(high) << 2;
            x |= right(top, high_x) & four, y |= right(top, high_y) & four;
            high += stride;
        }
        const vf u = floats(x), v = floats(y);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const vf one = splat(w[r * STRIDE + row]);
            a[r] += one * u;
            b[r] += (SAME ? one : splat(other[r * STRIDE + row])) * v;
        }
        low += stride;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) store(out + r * W, a[r]), store(out + (R + r) * W, b[r]);
}

template <int N>
using Const = std::integral_constant<int, N>;

// All lanes of `rows` rows of n codes: f(first lane, sums of row r at [r * W]) for each W of them; sums behind n are to be
// ignored. weights(first lane) gives the weights of W lanes, [R, STRIDE].
template <int R, int STRIDE, class Weights, class F>
void each_lanes(const uint8_t *data, int bits, int n, int rows, Weights weights, F f) {
    alignas(64) float sums[2 * R * W];
    const bool three = bits == 3;
    const int low_bits = three ? 2 : bits, width = n * low_bits / 8, high_width = n / 8;
    const auto load_of = [](int w) { return w % W == 0 ? W : (w >= 4 && W % w == 0 ? w : 0); };
    int low = bits < 8 ? load_of(width) : 0, high = three ? load_of(high_width) : 0;
    // A pair spans two planes, or as many as repeated bytes fill.
    if (low && 8 / low_bits < 2 * (W / low)) low = 0;
    const auto give = [&](const Pair &pair, auto kind, auto lo, auto hi) {
        const bool both = pair.first[1] < n;
        const float *w = weights(pair.first[0]), *other = both ? weights(pair.first[1]) : w;
        if (w == other) {
            multiply<kind.value, lo.value, hi.value, R, STRIDE, true>(pair, low_bits, rows, w, w, sums);
        } else {
            multiply<kind.value, lo.value, hi.value, R, STRIDE, false>(pair, low_bits, rows, w, other, sums);
        }
        f(pair.first[0], sums);
        if (both) f(pair.first[1], sums + R * W);
    };
    if (!low || (three && !high)) {  // bytes, or rows that don't divide well: taken apart into bytes first
        int stride = n;
        if (bits < 8 || n % (2 * W)) {
            static thread_local Scratch<uint8_t> scratch;
            stride = (n + 2 * W - 1) / (2 * W) * (2 * W);
            uint8_t *room = scratch.room(size_t(rows) * stride);
            for (int i = 0; i < rows; i++) unpack(data + int64_t(i) * (n * bits / 8), bits, n, room + size_t(i) * stride);
            data = room;
        }
        for (int i = 0; i < n; i += 2 * W) give({data + i, data, stride, 0, 0, {i, i + W}}, Const<8>(), Const<W>(), Const<0>());
        return;
    }
    const int spans = 2 * (W / low);  // planes of a pair
    for (int plane = 0; plane < 8 / low_bits; plane += spans)
        for (int at = 0; at < (low == W ? width : 1); at += W) {
            const int first = plane * width + at, in_high = first / high_width;
            const Pair pair{data + at, data + width + first % high_width, n * bits / 8, plane * low_bits, in_high,
                            {first, first + (low == W ? width : W)}};
            const auto pick = [&](auto lo) {
                if (!three) return give(pair, Const<0>(), lo, Const<0>());
                if (high == W) return give(pair, Const<0>(), lo, Const<W>());
                if (high == W / 2) return give(pair, Const<0>(), lo, Const<W / 2>());
                give(pair, Const<0>(), lo, Const<W / 4>());
            };
            if (low == W && bits == 4) give(pair, Const<4>(), Const<W>(), Const<0>());
            else if (low == W) pick(Const<W>());
            else if (low == W / 2) pick(Const<W / 2>());
            else pick(Const<W / 4>());
        }
}

// Weights of R rows with the scales in them: out[r * STRIDE + i] = w[r * stride + i] * scale[i] for i < n; base[r] is the sum of
// w * zero.
template <int R, int STRIDE>
void fold(const float *w, int stride, const float *scale, const float *zero, int n, float *out, float *base) {
    vf total[R] = {};
    int i = 0;
    for (; i + W <= n; i += W) {
        const vf s = load(scale + i), z = load(zero + i);
        for (int r = 0; r < R; r++) {
            const vf x = load(w + r * stride + i);
            store(out + r * STRIDE + i, x * s);
            total[r] += x * z;
        }
    }
    sums<R>(total, base);
    for (; i < n; i++)
        for (int r = 0; r < R; r++) {
            out[r * STRIDE + i] = w[r * stride + i] * scale[i];
            base[r] += w[r * stride + i] * zero[i];
        }
}

}  // namespace
