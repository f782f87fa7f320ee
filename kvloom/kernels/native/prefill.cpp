// Attention of many query rows at once, and how much attention slots receive. Compiled once for each instruction set.
#include <cmath>

#include "tiles.h"

namespace {

constexpr float LEAST = -3.0e38f;

inline void write(Kind kind, const float *x, int n, uint8_t *out) {
    if (kind == FLOAT32) return (void)memcpy(out, x, n * sizeof(float));
    uint16_t *to = reinterpret_cast<uint16_t *>(out);
    for (int i = 0; i < n; i++) to[i] = kind == BFLOAT16 ? to_bfloat16(x[i]) : to_float16(x[i]);
}

// The query rows [block * PREFILL_ROWS, ...) of all query heads of one KV head. Blocks of keys are transposed once for all of them; softmax
// goes along block by block, with the greatest logit so far.
template <class E>
void prefill_in(const Prefill &p, int head, int block) {
    static thread_local Scratch<float> scratch;
    static thread_local Scratch<E> operands;
    const int D = p.dim, V = (p.value_dim + 2 * W - 1) / (2 * W) * (2 * W), g = p.group;
    const int64_t from = int64_t(block) * PREFILL_ROWS, to = from + PREFILL_ROWS < p.m ? from + PREFILL_ROWS : p.m;
    const int strips = int(to - from + STRIP - 1) / STRIP, rows = g * strips * STRIP;
    const int each = D / PER<E>;  // operands of a row
    E *keys = operands.room(size_t(each) * (BLOCK_KEYS + rows) + size_t(V) * (BLOCK_KEYS / PER<E>));
    E *values = keys + each * BLOCK_KEYS, *q = values + V * (BLOCK_KEYS / PER<E>);
    float *out = scratch.room(size_t(rows) * (V + 2)), *top = out + rows * V, *total = top + rows;
    for (int i = 0; i < rows * V; i++) out[i] = 0;
    for (int i = 0; i < rows; i++) top[i] = LEAST, total[i] = 0;
    for (int i = 0; i < g * strips; i++) strip_of(p, head * g + i / strips, from + i % strips * STRIP, q + i * STRIP * each);
    for (int i = 0; i < BLOCK_KEYS / PER<E> * V; i++) values[i] = 0;
    const int64_t end = p.causal && p.past + to < p.n ? p.past + to : p.n;
    for (int64_t first = 0; first < end; first += BLOCK_KEYS) {
        const int n = int(p.n - first < BLOCK_KEYS ? p.n - first : BLOCK_KEYS);
        transposed(p.k, head, first, p.n, D, p.scale, keys);
        rows_of(p.v, head, first, n, p.value_dim, V, values);
        for (int i = 0; i < g * strips; i++) {
            const int64_t at = from + i % strips * STRIP;
            if (p.causal && p.past + at + STRIP <= first) continue;  // no row of the strip sees this far
            alignas(64) float s[STRIP * BLOCK_KEYS], factor[STRIP];
            logits(p, q + i * STRIP * each, keys, first, at, s);
            E *weights = reinterpret_cast<E *>(s);  // in their place: behind what has been read of a row
            for (int r = 0; r < STRIP; r++) {
                float *mine = s + r * BLOCK_KEYS, &best = top[i * STRIP + r], most;
                vf greatest = splat(best);
                for (int j = 0; j < BLOCK_KEYS; j += W) greatest = larger(load(mine + j), greatest);
                tops<1>(&greatest, &most);
                vf sum_of = {};
                for (int j = 0; j < BLOCK_KEYS; j += W) {
                    const vf e = exp(load(mine + j) - most);
                    put(weights + r * BLOCK_KEYS + j / PER<E>, e);
                    sum_of += e;
                }
                factor[r] = most > best ? std::exp(best - most) : 1.0f;
                total[i * STRIP + r] = total[i * STRIP + r] * factor[r] + sum(sum_of);
                best = most;
            }
            float *o = out + i * STRIP * V;
            for (int d = 0; d < V; d += 2 * W) product<true>(weights, BLOCK_KEYS, values + d, V, BLOCK_KEYS / PER<E>, o + d, V, factor);
        }
    }
    for (int i = 0; i < rows; i++) {
        const int64_t at = from + i % (strips * STRIP);
        if (at >= to) continue;
        const int64_t row = int64_t(head * g + i / (strips * STRIP)) * p.m + at;
        const float inverse = total[i] > 0 ? 1 / total[i] : 0;
        float *o = out + i * V;
        for (int d = 0; d < V; d++) o[d] *= inverse;
        write(p.q.kind, o, p.value_dim, p.out + row * p.value_dim * (p.q.kind == FLOAT32 ? 4 : 2));
        p.lse[row] = total[i] > 0 ? top[i] + std::log(total[i]) : -INFINITY;
    }
}

// mass [h, g, n] of one block of keys: the sum over rows of exp(logit - lse of the row).
template <class E>
void observe_in(const Prefill &p, int head, int block) {
    static thread_local Scratch<E> operands;
    const int64_t first = int64_t(block) * BLOCK_KEYS;
    E *keys = operands.room(size_t(p.dim) / PER<E> * (BLOCK_KEYS + STRIP)), *q = keys + p.dim / PER<E> * BLOCK_KEYS;
    transposed(p.k, head, first, p.n, p.dim, p.scale, keys);
    const int64_t start = p.causal && first > p.past ? first - p.past : 0;  // rows before it see nothing of the block
    for (int i = 0; i < p.group; i++) {
        const float *lse = p.lse + (int64_t(head) * p.group + i) * p.m;
        alignas(64) float s[STRIP * BLOCK_KEYS];
        vf mass[BLOCK_KEYS / W] = {};
        for (int64_t at = start; at < p.m; at += STRIP) {
            strip_of(p, head * p.group + i, at, q);
            logits(p, q, keys, first, at, s);
            for (int r = 0; r < STRIP && at + r < p.m; r++) {
                if (!(lse[at + r] > LEAST)) continue;
                for (int j = 0; j < BLOCK_KEYS / W; j++) mass[j] += exp(load(s + r * BLOCK_KEYS + j * W) - lse[at + r]);
            }
        }
        float *to = p.mass + (int64_t(head) * p.group + i) * p.n + first;
        const int n = int(p.n - first < BLOCK_KEYS ? p.n - first : BLOCK_KEYS);
        alignas(64) float sums_of[BLOCK_KEYS];
        for (int j = 0; j < BLOCK_KEYS / W; j++) store(sums_of + j * W, mass[j]);
        memcpy(to, sums_of, n * sizeof(float));
    }
}

}  // namespace

namespace kvloom::ISA {

void prefill(const Prefill &p, int head, int block) {
    if (PAIRS && p.q.kind == BFLOAT16) return prefill_in<std::conditional_t<PAIRS, uint32_t, float>>(p, head, block);
    prefill_in<float>(p, head, block);
}

void observe(const Prefill &p, int head, int block) {
    if (PAIRS && p.q.kind == BFLOAT16) return observe_in<std::conditional_t<PAIRS, uint32_t, float>>(p, head, block);
    observe_in<float>(p, head, block);
}

}  // namespace kvloom::ISA
