// Jobs that stand: a sequence's attention in one layer, described once and fed one slot after another, so that a decode step of many
// sequences costs Python one call.
#pragma once

#include <cmath>
#include <cstring>

#include "described.h"

namespace kvloom {

// `segment`: the one that grows, in the last run of its keys and of its values, which are numbers with room for what comes.
// `keep`: of that run of values the newest stay; older ones move to the packed run before it, which has room too. -1: all stay.
struct Standing {
    Job job;
    std::vector<float> q, out, lse;
    std::vector<uint8_t> codes, scale, zero;  // of one row
    Segment *segment = nullptr;
    int64_t room = 0, keep = -1;

    // The queries of every run of keys become this job's own.
    Standing(PyObject *described, int grows, int64_t free, int64_t keep, bool whole) : job(job_of(described, whole)), room(free), keep(keep) {
        q.resize(size_t(job.h) * job.rows * job.dim), out.resize(size_t(job.h) * job.rows * job.value_dim);
        lse.resize(size_t(job.h) * job.rows);
        job.out = out.data(), job.lse = lse.data();
        for (Segment &each : job.segments)
            for (Run &run : each.keys) run.q = q.data();
        segment = &job.segments.at(size_t(grows));
        if (segment->keys.empty() || segment->values.empty() || segment->keys.back().kind > BFLOAT16 || segment->values.back().kind > BFLOAT16)
            throw nb::value_error("the last run has to be one of numbers");
        if (keep < 0) return;
        if (segment->values.size() < 2 || packed().kind != CHANNELS) throw nb::value_error("the run before the last has to be packed by channels");
        codes.resize(size_t(job.h) * job.value_dim * packed().bits / 8);
        scale.resize(size_t(job.h) * (job.value_dim / packed().group) * 2), zero.resize(scale.size());
    }

    Run &packed() { return segment->values[segment->values.size() - 2]; }

    static void put(const uint8_t *to, int64_t head, int64_t row, const std::vector<uint8_t> &from, int h) {
        const size_t each = from.size() / h;
        for (int i = 0; i < h; i++) memcpy(const_cast<uint8_t *>(to) + i * head + row * int64_t(each), from.data() + i * each, each);
    }

    // Encodes the oldest number row of the values, if there are more than stay. `encode`: a kernel.
    template <class F>
    void freeze(F encode) {
        Run &tail = segment->values.back();
        if (keep < 0 || tail.n <= keep) return;
        const int64_t row = int64_t(job.value_dim) * (tail.kind == FLOAT32 ? 4 : 2);
        const Encode e{job.h, job.value_dim, packed().bits, packed().group, 1, false, packed().small, {tail.kind, tail.data, tail.head, row},
                       codes.data(), scale.data(), zero.data()};
        for (int i = 0; i < job.h; i++) encode(e, i, 0, 1);
        Run &to = packed();
        put(to.data, to.head, to.n, codes, job.h);
        put(to.scale, to.scale_head, to.n, scale, job.h);
        put(to.zero, to.zero_head, to.n, zero, job.h);
        to.n++, tail.n--, tail.data += row;
    }
    Standing(const Standing &) = delete;

    static void grow(Run &run, const uint8_t *from, int64_t head, int h, int dim) {
        const int64_t row = int64_t(dim) * (run.kind == FLOAT32 ? 4 : 2);
        for (int i = 0; i < h; i++) memcpy(const_cast<uint8_t *>(run.data) + i * run.head + run.n * row, from + i * head, size_t(row));
        run.n++;
    }
};

// New rows of one layer: q [h * g, n, D] fp32, contiguous; keys and values in the dtype of the caches; out [n, h * g, Dv] fp32.
struct Fresh {
    const float *q;
    int64_t n;
    const uint8_t *k;
    int64_t k_head, k_row;
    const uint8_t *v;
    int64_t v_head, v_row;
    float *out;
    const float *sinks;  // a logit of each query head that takes part in the softmax without a value, or null
};

inline void feed(Standing &s, const Fresh &fresh, int64_t row) {
    Job &job = s.job;
    for (int i = 0; i < job.h * job.rows; i++)
        memcpy(s.q.data() + int64_t(i) * job.dim, fresh.q + (int64_t(i) * fresh.n + row) * job.dim, size_t(job.dim) * 4);
    Standing::grow(s.segment->keys.back(), fresh.k + row * fresh.k_row, fresh.k_head, job.h, job.dim);
    Standing::grow(s.segment->values.back(), fresh.v + row * fresh.v_row, fresh.v_head, job.h, job.value_dim);
    s.segment->n++, s.room--;
}

inline void hand_out(const Standing &s, const Fresh &fresh, int64_t row) {
    const Job &job = s.job;
    const int heads = job.h * job.rows;
    float *to = fresh.out + row * heads * job.value_dim;
    memcpy(to, s.out.data(), s.out.size() * sizeof(float));
    for (int i = 0; fresh.sinks && i < heads; i++) {
        const float own = s.lse[i], sink = fresh.sinks[i], top = own > sink ? own : sink;
        const float share = std::exp(own - (top + std::log(std::exp(own - top) + std::exp(sink - top))));
        for (int d = 0; d < job.value_dim; d++) to[i * job.value_dim + d] *= share;
    }
}

}  // namespace kvloom
