// Decode attention: one split of one head at a time. Compiled once for each instruction set, under the name ISA.
#include <cmath>

#include "tile.h"

namespace {

constexpr float LEAST = -3.0e38f;

// The part of the runs of a plane that lies in [start, stop): f(run, from, to, slots behind start).
template <class F>
void each_run(const std::vector<Run> &runs, int64_t start, int64_t stop, F f) {
    int64_t at = 0;
    for (const Run &run : runs) {
        const int64_t a = start > at ? start - at : 0, b = stop - at < run.n ? stop - at : run.n;
        if (a < b) f(run, a, b, at + a - start);
        at += run.n;
    }
}

inline void cap(float *s, int n, float limit) {
    for (int i = 0; i < n; i++) s[i] = limit * std::tanh(s[i] / limit);
}

template <int R>
void rows(const Job &job, const Segment &segment, int head, int first, int64_t start, int64_t stop, float *s, Partial part) {
    const int n = int(stop - start);
    each_run(segment.keys, start, stop, [&](const Run &run, int64_t a, int64_t b, int64_t at) {
        any_dot<R>(job, run, head, first, a, b, s + at, SPLIT);
    });
    for (int r = 0; r < R; r++) {
        float *mine = s + r * SPLIT;
        if (job.softcap > 0) cap(mine, n, job.softcap);
        if (segment.logw) {
            const float *logw = segment.logw + head * segment.logw_head + start;
            for (int i = 0; i < n; i++) mine[i] += logw[i];
        }
        if (segment.scores)
            memcpy(segment.scores + (int64_t(head) * job.rows + first + r) * segment.n + start, mine, n * sizeof(float));
        const int end = (n + 2 * W - 1) / (2 * W) * (2 * W);
        for (int i = n; i < end; i++) mine[i] = -INFINITY;
        vf most = splat(LEAST), other = most;  // two, since the next comparison would wait for the last
        for (int i = 0; i < end; i += 2 * W) most = larger(load(mine + i), most), other = larger(load(mine + i + W), other);
        float top;
        most = larger(most, other), tops<1>(&most, &top);
        vf total = {};
        for (int i = 0; i < end; i += W) {
            const vf p = exp(load(mine + i) - top);
            store(mine + i, p);
            total += p;
        }
        part.top[r] = top, part.sum[r] = sum(total);
    }
    for (int i = 0; i < R * job.value_dim; i++) part.out[i] = 0;
    each_run(segment.values, start, stop, [&](const Run &run, int64_t a, int64_t b, int64_t at) {
        any_mix<R>(run, head, a, b, job.value_dim, s + at, SPLIT, part.out);
    });
}

}  // namespace

namespace kvloom::ISA {

const bool whole = WHOLE;

void attend(const Job &job, const Segment &segment, int head, int64_t start, int64_t stop, Partial part) {
    alignas(64) float s[4 * SPLIT];
    int r = 0;
    const auto rest = [&] { return Partial{part.out + int64_t(r) * job.value_dim, part.sum + r, part.top + r}; };
    for (; r + 4 <= job.rows; r += 4) rows<4>(job, segment, head, r, start, stop, s, rest());
    for (; r + 2 <= job.rows; r += 2) rows<2>(job, segment, head, r, start, stop, s, rest());
    for (; r < job.rows; r++) rows<1>(job, segment, head, r, start, stop, s, rest());
}

// Partial results of a head in the order of its splits -> out and log-sum-exp.
void merge(const Job &job, int head, const Partial *parts, int count) {
    const int D = job.value_dim;
    for (int r = 0; r < job.rows; r++) {
        float top = LEAST, total = 0;
        for (int i = 0; i < count; i++) top = parts[i].top[r] > top ? parts[i].top[r] : top;
        float *out = job.out + (int64_t(head) * job.rows + r) * D;
        for (int d = 0; d < D; d++) out[d] = 0;
        for (int i = 0; i < count; i++) {
            const float w = std::exp(parts[i].top[r] - top), *from = parts[i].out + int64_t(r) * D;
            total += w * parts[i].sum[r];
            for (int d = 0; d < D; d++) out[d] += w * from[d];
        }
        const float inverse = total > 0 ? 1 / total : 0;
        for (int d = 0; d < D; d++) out[d] *= inverse;
        job.lse[int64_t(head) * job.rows + r] = total > 0 ? top + std::log(total) : -INFINITY;
    }
}

}  // namespace kvloom::ISA
