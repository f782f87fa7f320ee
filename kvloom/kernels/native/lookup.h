// Product codes asked by lookup: what every code of a part adds to a query's product is computed once for a split.
#pragma once

#include "job.h"
#include "unpack.h"

namespace {

using namespace kvloom;

// Codes of 8 bits that stand for several numbers each, as they are: four queries ask by a table of what every code adds to each.
inline bool looked_up(const Run &run) {
    const Run &base = run.inner[0];
    const int each = base.kind == TABLE && base.bits == 8 && run.stages.empty() && !run.right.data ? run.width / base.group : 0;
    return each == 2 || each == 4 || each == 8;
}
#if defined(__GNUC__) && !defined(PLAIN)
typedef float Four __attribute__((vector_size(16)));
#else
struct Four {
    float x[4] = {};
    void operator+=(const Four &y) { for (int i = 0; i < 4; i++) x[i] += y.x[i]; }
    float operator[](int i) const { return x[i]; }
};
#endif
inline Four four(const float *p) {
    Four x;
    return memcpy(&x, p, sizeof x), x;
}

// What each code of a part adds: table [256, 4]. Numbers of the book [256, EACH].
template <int EACH>
inline void added(const float *book, const float *q, int stride, float scale, float *table) {
    float by[EACH][4];
    for (int i = 0; i < EACH; i++)
        for (int r = 0; r < 4; r++) by[i][r] = q[r * stride + i] * scale;
    for (int c = 0; c < 256; c++, book += EACH, table += 4) {
        float found[4] = {};
        for (int i = 0; i < EACH; i++)
            for (int r = 0; r < 4; r++) found[r] += book[i] * by[i][r];
        for (int r = 0; r < 4; r++) table[r] = found[r];
    }
}

// Logits of four queries against the slots [a, b): sums of what their codes add.
inline void table_dot(const Run &run, const float *q, float scale, int head, int64_t a, int64_t b, float *s, int stride) {
    const Run &base = run.inner[0];
    const int codes = base.group, each = run.width / codes, n = int(b - a);
    const float *book = reinterpret_cast<const float *>(base.table.data + head * base.table.head);
    const int next = base.table.count == 256 * each ? 0 : 256 * each;  // 0: one for all parts
    static thread_local Scratch<float> scratch;
    float *table = scratch.room(size_t(codes) * 1024);
    for (int j = 0; j < codes; j++) {
        const auto add = [&](auto EACH) { added<EACH.value>(book + j * next, q + j * each, run.width, scale, table + j * 1024); };
        if (each == 2) add(std::integral_constant<int, 2>());
        else if (each == 4) add(std::integral_constant<int, 4>());
        else add(std::integral_constant<int, 8>());
    }
    const int64_t row = base.row;
    const uint8_t *at = base.data + head * base.head + a * row;
    int t = 0;
    for (; t + 4 <= n; t += 4, at += 4 * row) {  // four slots, so that no sum waits for its last addition
        Four w{}, x{}, y{}, z{};
        const float *from = table;
        for (int j = 0; j < codes; j++, from += 1024) {
            w += four(from + 4 * at[j]), x += four(from + 4 * at[row + j]);
            y += four(from + 4 * at[2 * row + j]), z += four(from + 4 * at[3 * row + j]);
        }
        for (int r = 0; r < 4; r++) {
            float *mine = s + r * stride + t;
            mine[0] = w[r], mine[1] = x[r], mine[2] = y[r], mine[3] = z[r];
        }
    }
    for (; t < n; t++, at += row) {
        Four x{};
        for (int j = 0; j < codes; j++) x += four(table + j * 1024 + 4 * at[j]);
        for (int r = 0; r < 4; r++) s[r * stride + t] = x[r];
    }
}

}  // namespace
