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

inline uint8_t code(float x, float zero, float step, float all) {
    const float c = __builtin_rintf((x - zero) / step);
    return uint8_t(c > 0 ? (c < all ? c : all) : 0.0f);
}

// A row of n codes, a byte each, to n * bits / 8 bytes of planes.
inline void pack(const uint8_t *codes, int bits, int n, uint8_t *out) {
    if (bits == 8) return (void)memcpy(out, codes, n);
    if (bits == 3) {
        uint8_t part[2 * MAX_DIM];
        for (int i = 0; i < n; i++) part[i] = codes[i] & 3, part[MAX_DIM + i] = codes[i] >> 2;
        pack(part, 2, n, out);
        return pack(part + MAX_DIM, 1, n, out + n / 4);
    }
    const int m = n * bits / 8;
    for (int i = 0; i < m; i++) out[i] = codes[i];
    for (int j = 1; j < 8 / bits; j++)
        for (int i = 0; i < m; i++) out[i] |= uint8_t(codes[j * m + i] << (bits * j));
}

// One group of tokens: all channels at a time.
void tokens(const Encode &e, int head, int64_t unit) {
    static thread_local Scratch<float> scratch;
    static thread_local Scratch<uint8_t> byte_scratch;
    const int G = e.group, D = e.dim, bytes = G * e.bits / 8;
    float *x = scratch.room(size_t(G) * D + 4 * size_t(D)), *low = x + size_t(G) * D, *high = low + D, *zero = high + D, *step = zero + D;
    uint8_t *codes = byte_scratch.room(size_t(G) * D);
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
    const float all = float((1 << e.bits) - 1);
    for (int i = 0; i < G; i++)
        for (int d = 0; d < D; d++) codes[size_t(d) * G + i] = code(x[size_t(i) * D + d], zero[d], step[d], all);
    for (int d = 0; d < D; d++) pack(codes + size_t(d) * G, e.bits, G, e.codes + (at + d) * bytes);
}

// One token: its groups of channels.
void channels(const Encode &e, int head, int64_t t) {
    const int G = e.group, D = e.dim, groups = D / G, bytes = D * e.bits / 8;
    alignas(64) float x[MAX_DIM];
    alignas(64) uint8_t codes[MAX_DIM];
    row_of(e.x, head, t, D, x);
    const int64_t row = int64_t(head) * e.n + t;
    const float all = float((1 << e.bits) - 1);
    for (int g = 0; g < groups; g++) {
        float low = x[g * G], high = low;
        for (int d = g * G + 1; d < (g + 1) * G; d++) low = x[d] < low ? x[d] : low, high = x[d] > high ? x[d] : high;
        const int64_t at = row * groups + g;
        const Level l = level(e, low, high, e.scale + 2 * at, e.zero + 2 * at);
        for (int d = g * G; d < (g + 1) * G; d++) codes[d] = code(x[d], l.zero, l.step, all);
    }
    pack(codes, e.bits, D, e.codes + row * bytes);
}

}  // namespace

namespace kvloom::ISA {

void encode(const Encode &e, int head, int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; i++) e.along_tokens ? tokens(e, head, i) : channels(e, head, i);
}

}  // namespace kvloom::ISA
