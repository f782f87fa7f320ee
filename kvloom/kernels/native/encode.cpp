// Min-max quantization in groups and packing, as `segments/minmax.py` defines them, bit for bit. Compiled once for each
// instruction set.
#include "unpack.h"

namespace {

// Minimum and step of a group as they are stored, and as numbers to quantize with.
struct Level {
    float zero, step;
};

inline void store_small(Kind kind, float x, uint8_t *at) {
    const uint16_t bits = kind == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
    memcpy(at, &bits, 2);
}

inline float small(Kind kind, const uint8_t *at) {
    return kind == BFLOAT16 ? scalar(reinterpret_cast<const BF16 *>(at)) : scalar(reinterpret_cast<const F16 *>(at));
}

inline Level level(const Encode &e, float low, float high, uint8_t *scale, uint8_t *zero) {
    const float most = e.small == BFLOAT16 ? 3.38953139e38f : 65504.0f, all = float((1 << e.bits) - 1);  // 16 bits saturate
    store_small(e.small, low < -most ? -most : low > most ? most : low, zero);
    const float from = small(e.small, zero), each = (high - from) / all;
    store_small(e.small, each > 0 ? (each < most ? each : most) : 0.0f, scale);
    const float step = small(e.small, scale);
    return {from, step == 0 ? 1.0f : step};
}

// Codes as floats, in place.
inline void quantize(float *x, int n, const float *zero, const float *step, float all) {
    for (int i = 0; i < n; i++) {
        float c = std::rint((x[i] - zero[i]) / step[i]);
        c = c > 0 ? c : 0;
        x[i] = c < all ? c : all;
    }
}

// Bytes of n lanes that each hold `per` codes, c[j * far + i] for byte i: out[i] = sum of the j-th << (bits * j). Of codes that
// are split in two, `part` takes what belongs here.
template <class Part>
void planes(const float *c, int64_t far, int per, int bits, int n, Part part, uint8_t *out) {
    float sum[MAX_DIM];
    for (int i = 0; i < n; i++) sum[i] = part(c[i]);
    for (int j = 1; j < per; j++) {
        const float weight = float(1 << (bits * j)), *from = c + j * far;
        for (int i = 0; i < n; i++) sum[i] += weight * part(from[i]);
    }
    for (int i = 0; i < n; i++) out[i] = uint8_t(int(sum[i]));
}

// f(bits, bytes before, which part of a code) for the planes that a row of n codes has: 3 bits are a row of 2 and one of 1.
template <class F>
void each_row(int bits, int n, F f) {
    if (bits != 3) return f(bits, 0, [](float c) { return c; });
    f(2, 0, [](float c) { return c < 4 ? c : c - 4; });
    f(1, n / 4, [](float c) { return c < 4 ? 0.0f : 1.0f; });
}

// One group of tokens: all channels at a time.
void tokens(const Encode &e, int head, int64_t unit) {
    static thread_local Scratch<float> scratch;
    const int G = e.group, D = e.dim, bytes = G * e.bits / 8;
    float *x = scratch.room(size_t(G) * D), low[MAX_DIM], high[MAX_DIM], zero[MAX_DIM], step[MAX_DIM];
    for (int i = 0; i < G; i++) row_of(e.x, head, unit * G + i, D, x + size_t(i) * D);
    for (int d = 0; d < D; d++) low[d] = high[d] = x[d];
    for (int i = 1; i < G; i++)
        for (int d = 0; d < D; d++) {
            const float y = x[size_t(i) * D + d];
            low[d] = y < low[d] ? y : low[d], high[d] = y > high[d] ? y : high[d];
        }
    const int64_t at = (int64_t(head) * (e.n / G) + unit) * D;
    for (int d = 0; d < D; d++) {
        const Level l = level(e, low[d], high[d], e.scale + 2 * (at + d), e.zero + 2 * (at + d));
        zero[d] = l.zero, step[d] = l.step;
    }
    for (int i = 0; i < G; i++) quantize(x + size_t(i) * D, D, zero, step, float((1 << e.bits) - 1));
    uint8_t *to = e.codes + at * bytes, lanes[MAX_DIM];
    each_row(e.bits, G, [&](int bits, int before, auto part) {
        const int m = G * bits / 8;
        for (int i = 0; i < m; i++) {
            planes(x + size_t(i) * D, int64_t(m) * D, 8 / bits, bits, D, part, lanes);
            for (int d = 0; d < D; d++) to[d * bytes + before + i] = lanes[d];
        }
    });
}

// One token: its groups of channels.
void channels(const Encode &e, int head, int64_t t) {
    const int G = e.group, D = e.dim, groups = D / G, bytes = D * e.bits / 8;
    alignas(64) float x[MAX_DIM], zero[MAX_DIM], step[MAX_DIM];
    row_of(e.x, head, t, D, x);
    const int64_t row = int64_t(head) * e.n + t;
    for (int g = 0; g < groups; g++) {
        const float *from = x + g * G;
        float low = from[0], high = low;
        int d = 0;
        if (G >= W) {
            vf least = load(from), most = least;
            for (d = W; d + W <= G; d += W) least = smaller(load(from + d), least), most = larger(load(from + d), most);
            least = -least;
            tops<1>(&least, &low), tops<1>(&most, &high);
            low = -low;
        }
        for (; d < G; d++) low = from[d] < low ? from[d] : low, high = from[d] > high ? from[d] : high;
        const int64_t at = row * groups + g;
        const Level l = level(e, low, high, e.scale + 2 * at, e.zero + 2 * at);
        for (int i = g * G; i < (g + 1) * G; i++) zero[i] = l.zero, step[i] = l.step;
    }
    quantize(x, D, zero, step, float((1 << e.bits) - 1));
    each_row(e.bits, D, [&](int bits, int before, auto part) {
        const int m = D * bits / 8;
        planes(x, m, 8 / bits, bits, m, part, e.codes + row * bytes + before);
    });
}

}  // namespace

namespace kvloom::ISA {

void encode(const Encode &e, int head, int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; i++) e.along_tokens ? tokens(e, head, i) : channels(e, head, i);
}

}  // namespace kvloom::ISA
