// Codes that stand for the numbers of a table.
#pragma once

#include "unpack.h"

namespace {

// 16 numbers by which W codes of 4 bits at most are looked up at once; fewer are repeated, so that bits above need no mask.
struct Levels {
#if defined(__AVX512F__)
    __m512 all;
    explicit Levels(const float *t) : all(_mm512_loadu_ps(t)) {}
    template <bool FEW>
    vf of(vi code) const {
        return (vf)_mm512_permutexvar_ps((__m512i)code, all);
    }
#elif defined(__AVX2__)
    __m256 low, high;
    explicit Levels(const float *t) : low(_mm256_loadu_ps(t)), high(_mm256_loadu_ps(t + 8)) {}
    template <bool FEW>  // at most 8
    vf of(vi code) const {
        const __m256 a = _mm256_permutevar8x32_ps(low, (__m256i)code);
        if (FEW) return (vf)a;
        const __m256 b = _mm256_permutevar8x32_ps(high, (__m256i)code);
        return (vf)_mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)code, 28)));
    }
#else
    const float *t;
    explicit Levels(const float *table) : t(table) {}
    template <bool FEW>
    vf of(vi code) const {
        vf out;
        for (int i = 0; i < W; i++) out[i] = t[code[i] & 15];
        return out;
    }
#endif
};

// The slots [t, t + m) of a run of TABLE codes: x [m, D], rows `step` apart.
inline void decode_table(const Run &run, int head, int64_t t, int m, int D, float *x, int step) {
    const int codes = run.group, each = D / codes, entries = 1 << (run.bits > 8 ? 8 : run.bits);
    const uint8_t *data = run.data + head * run.head + t * run.row;
    const float *table = reinterpret_cast<const float *>(run.table.data + head * run.table.head);
    const bool shared = run.table.count == entries * each;  // one table for all codes of a slot
    static thread_local Scratch<uint8_t> scratch;
    uint8_t *room = scratch.room(codes + 64);
    if (each == 1 && shared && run.bits <= 4) {
        alignas(64) float sixteen[16];
        for (int i = 0; i < 16; i++) sixteen[i] = table[i % entries];
        const Levels levels(sixteen);
        return with_bits(run.bits, [&](auto BITS) {  // rows of x have whole vectors
            for (int i = 0; i < m; i++, data += run.row, x += step)
                each_code<BITS.value>(data, codes, room, [&](int d, vi code) { store(x + d, levels.of<(BITS.value < 4)>(code)); });
        });
    }
    const int64_t next = shared ? 0 : int64_t(entries) * each;
    for (int i = 0; i < m; i++, data += run.row, x += step) {
        const uint8_t *row = data;
        if (run.bits < 8) unpack(data, run.bits, codes, room), row = room;
        const float *from = table;
        const auto all = [&](auto size) {
            for (int j = 0; j < codes; j++, from += next) memcpy(x + j * size, from + row[j] * int64_t(size), size * sizeof(float));
        };
        if (each == 1) all(std::integral_constant<int, 1>());
        else if (each == 2) all(std::integral_constant<int, 2>());
        else if (each == 4) all(std::integral_constant<int, 4>());
        else if (each == 8) all(std::integral_constant<int, 8>());
        else all(each);
    }
}

}  // namespace
