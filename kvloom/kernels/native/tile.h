// Attention over what is decoded tile by tile: a block of slots that stays in the first cache while it is used.
#pragma once

#include "lookup.h"
#include "stages.h"
#include "table.h"

namespace {

using namespace kvloom;

inline int vectors(int n) { return (n + W - 1) / W * W; }

// How a run is decoded: slots at a time, floats of room, and what of the last stage can be done to logits and weights instead.
struct Plan {
    int slots, most, step, wide, rest;
    const Stage *folded = nullptr;  // one scale and one minimum for each slot
    size_t count;                   // stages that are done to tiles

    explicit Plan(const Run &run) : most(vectors(run.width)), step(vectors(run.wide)), wide(run.wide), count(run.stages.size()) {
        for (const Stage &stage : run.stages)
            if (stage.op == EXPAND && vectors(stage.x) > most) most = vectors(stage.x);
        if (step > most) most = step;
        rest = 2 * most + 2 * 64 * W;
        for (const Stage &stage : run.stages) {
            if (stage.op == PRODUCT && stage.x * (2 * most + 1) > rest) rest = stage.x * (2 * most + 1);
            if (stage.op == TURN && 2 * stage.c.count > rest) rest = 2 * stage.c.count;
        }
        slots = 64;
        while (slots > 8 && slots * most > 4096) slots /= 2;
        if (count) {
            const Stage &last = run.stages[count - 1];
            const auto fits = [](const Field &f) { return !f.data || (f.count == 1 && f.per == 1); };
            if (last.op == AFFINE && fits(last.a) && fits(last.b)) folded = &last, count--;
        }
    }
    // Two tiles, and what a stage needs.
    size_t floats() const { return size_t(2 * slots) * most + rest; }
};

inline void decode_dense(const Run &run, int head, int64_t t, int m, int width, int step, float *x, float *room) {
    const uint8_t *data = run.data + head * run.head + t * run.row;
    const bool together = run.row == int64_t(width) * size_of(run.kind);
    if (together && step == width) return numbers(run.kind, data, 0, m * width, x);
    if (together) numbers(run.kind, data, 0, m * width, room);
    for (int i = 0; i < m; i++) {
        if (together) memcpy(x + i * step, room + i * width, width * sizeof(float));
        else numbers(run.kind, data + i * run.row, 0, width, x + i * step);
    }
}

// The slots [t, t + m) as fp32, [m, wide] in rows `plan.step` apart, zeros behind.
inline const float *decode_tile(const Run &run, const Plan &plan, int head, int64_t t, int m, Cursor &cursor, float *room) {
    float *x = room, *other = room + size_t(plan.slots) * plan.most, *rest = other + size_t(plan.slots) * plan.most;
    const Run &base = run.inner[0];
    int width = run.width, step = vectors(width);
    switch (base.kind) {
    case TABLE: decode_table(base, head, t, m, width, x, step); break;
    case CHANNELS: decode_channels(base, head, t, m, width, x, step); break;
    case TOKENS:
    case TRITS:
        for (int64_t at = t; at < t + m;) {
            const int64_t next = (at / base.group + 1) * base.group, end = next < t + m ? next : t + m;
            (base.kind == TRITS ? decode_trits : decode_tokens)(base, head, at, int(end - at), width, x + (at - t) * step, step);
            at = end;
        }
        break;
    default: decode_dense(base, head, t, m, width, step, x, other);
    }
    if (step > width)
        for (int i = 0; i < m; i++) memset(x + i * step + width, 0, (step - width) * sizeof(float));
    for (size_t i = 0; i < plan.count; i++) {
        const Stage &stage = run.stages[i];
        switch (stage.op) {
        case AFFINE: affine(stage, head, t, m, width, step, x, rest); break;
        case PERMUTE: permute(stage, head, m, width, step, x, rest); break;
        case PLACES: places(stage, head, t, m, width, step, x); break;
        case SLOTS: slots(stage, head, t, m, width, step, x, cursor); break;
        case PRODUCT: product_of(stage, head, t, m, width, step, x, rest); break;
        case EXPAND: {
            expand(stage, head, m, width, step, x, other, vectors(stage.x));
            float *swap = x;
            x = other, other = swap, width = stage.x, step = vectors(width);
            break;
        }
        case TURN: turn(stage, head, t, m, step, x, rest); break;
        case UNIT: unit(m, width, step, x); break;
        }
    }
    return x;
}

inline float *tile_room(size_t floats) {
    static thread_local Scratch<float> scratch;
    return scratch.room(floats);
}

// The tiles of the slots [a, b): f(first slot, count, decoded).
template <class F>
void each_tile(const Run &run, const Plan &plan, int head, int64_t a, int64_t b, F f) {
    Cursor cursor;
    float *room = tile_room(plan.floats());
    for (int64_t t = a; t < b;) {
        int64_t end = (t / plan.slots + 1) * plan.slots;
        if (run.right.per && (t / run.right.per + 1) * run.right.per < end) end = (t / run.right.per + 1) * run.right.per;
        if (end > b) end = b;
        f(t, int(end - t), decode_tile(run, plan, head, t, int(end - t), cursor, room));
        t = end;
    }
}

// A thin matrix as it is stored, factors of low rank: x [slots, width], turned to [width, 64].
constexpr int THIN = 8;
inline bool thin(const Run &run) { return run.inner[0].kind <= BFLOAT16 && run.stages.empty() && run.width <= THIN; }
inline void decode_thin(const Run &run, int head, int64_t t, int m, float *x) {
    const Run &base = run.inner[0];
    alignas(64) float rows[THIN * 64];
    const uint8_t *data = base.data + head * base.head + t * base.row;
    const int width = run.width;
    if (base.row == int64_t(width) * size_of(base.kind)) numbers(base.kind, data, 0, m * width, rows);
    else
        for (int i = 0; i < m; i++) numbers(base.kind, data + i * base.row, 0, width, rows + i * width);
    for (int i = m * width; i < 64 * width; i++) rows[i] = 0;
    for (int j = 0; j < width; j++)
        for (int i = 0; i < 64; i++) x[j * 64 + i] = rows[i * width + j];
}
// One number that all slots share: a mean.
inline bool single(const Run &run) { return thin(run) && run.width == 1 && run.inner[0].row == 0; }
inline float number_of(const Run &run, int head) { return one(run.inner[0].kind, run.inner[0].data + head * run.inner[0].head); }
// Slots are taken so many at a time that a chunk of `right` ends where they do.
template <class F>
void each_thin(const Run &run, int head, int64_t a, int64_t b, F f) {
    alignas(64) float x[THIN * 64];
    for (int64_t t = a; t < b;) {
        int64_t end = t + 64 < b ? t + 64 : b;
        if (run.right.per && (t / run.right.per + 1) * run.right.per < end) end = (t / run.right.per + 1) * run.right.per;
        decode_thin(run, head, t, int(end - t), x);
        f(t, int(end - t), x);
        t = end;
    }
}

// Rows as they are stored, which need no tile.
inline bool plain(const Run &run) {
    const Run &base = run.inner[0];
    return base.kind <= BFLOAT16 && run.stages.empty() && base.row == int64_t(run.width) * size_of(base.kind);
}
// f(pointer to the numbers of slot t) by their dtype.
template <class F>
void with_rows(const Run &run, int head, int64_t t, F f) {
    const Run &base = run.inner[0];
    const uint8_t *data = base.data + head * base.head + t * base.row;
    if (base.kind == FLOAT16) f(reinterpret_cast<const F16 *>(data));
    else if (base.kind == BFLOAT16) f(reinterpret_cast<const BF16 *>(data));
    else f(reinterpret_cast<const F32 *>(data));
}
template <class F>
void each_chunk(const Run &run, int64_t a, int64_t b, F f) {
    for (int64_t t = a; t < b;) {
        int64_t end = run.right.per ? (t / run.right.per + 1) * run.right.per : b;
        end = end < b ? end : b;
        f(t, end);
        t = end;
    }
}

// The matrix [D, wide] of the slot t, in rows `step` apart.
inline void right_of(const Run &run, int head, int64_t t, int D, int step, float *out) {
    const uint8_t *row = row_of(run.right, head, t);
    if (run.wide <= THIN) {
        alignas(64) float all[THIN * MAX_DIM];
        read(run.right.kind, row, D * run.wide, all);
        memset(out, 0, size_t(D) * step * sizeof(float));
        for (int d = 0; d < D; d++)
            for (int i = 0; i < run.wide; i++) out[d * step + i] = all[d * run.wide + i];
        return;
    }
    for (int d = 0; d < D; d++) {
        read(run.right.kind, row + int64_t(d) * run.wide * size_of(run.right.kind), run.wide, out + d * step);
        for (int i = run.wide; i < step; i++) out[d * step + i] = 0;
    }
}

// What queries and sums of a tile need, apart from the tile itself.
inline float *beside(size_t floats) {
    static thread_local Scratch<float> scratch;
    return scratch.room(floats);
}

// Logits of queries q [R, D], or [R, wide] where nothing is to the right, times `scale`.
template <int R>
void tile_dot(const Run &run, const float *q, float scale, int head, int64_t a, int64_t b, int D, float *s, int stride) {
    const Plan plan(run);
    const int whose = run.heads ? run.heads[head] : head;
    const int step = plan.step;
    float *by = beside(size_t(2 * R) * MAX_DIM + (run.right.data ? size_t(D) * step : 0)), *right = by + 2 * R * MAX_DIM;
    float *scaled = by + R * MAX_DIM, all[R];
    const auto ask = [&](int64_t t) {
        if (run.right.data) {
            right_of(run, head, t, D, step, right);
            for (int i = 0; i < R * D; i++) scaled[i] = q[i] * scale;
            memset(by, 0, R * step * sizeof(float));
            dense_mix<R>(scaled, D, reinterpret_cast<const F32 *>(right), D, step, by);
        } else {
            for (int r = 0; r < R; r++)
                for (int i = 0; i < step; i++) by[r * step + i] = i < plan.wide ? q[r * plan.wide + i] * scale : 0;
        }
        for (int r = 0; r < R; r++) {
            all[r] = 0;
            for (int i = 0; i < plan.wide; i++) all[r] += by[r * step + i];
        }
    };
    int64_t asked = -1;
    if (single(run) && !run.right.per) {
        ask(a);
        for (int r = 0; r < R; r++)
            for (int64_t i = 0; i < b - a; i++) s[r * stride + i] = by[r * step] * number_of(run, whose);
        return;
    }
    if constexpr (R == 4)
        if (looked_up(run)) return table_dot(run, q, scale, whose, a, b, s, stride);
    if (thin(run)) {
        each_thin(run, whose, a, b, [&](int64_t t, int m, const float *x) {
            const int64_t now = run.right.per ? t / run.right.per : 0;
            if (now != asked) ask(t), asked = now;
            alignas(64) float lanes[64];
            for (int r = 0; r < R; r++) {
                for (int i = 0; i < 64; i += W) {
                    vf found = {};
                    for (int j = 0; j < plan.wide; j++) found += load(x + j * 64 + i) * by[r * step + j];
                    store(lanes + i, found);
                }
                memcpy(s + r * stride + (t - a), lanes, m * sizeof(float));
            }
        });
        return;
    }
    if (plain(run)) {
        each_chunk(run, a, b, [&](int64_t t, int64_t end) {
            ask(t);
            alignas(64) float close[R * MAX_DIM];  // without the zeros behind each query
            for (int r = 0; r < R; r++) memcpy(close + r * plan.wide, by + r * step, plan.wide * sizeof(float));
            with_rows(run, whose, t, [&](auto rows) { dense_dot<R>(close, rows, end - t, plan.wide, s + (t - a), stride); });
        });
        return;
    }
    each_tile(run, plan, whose, a, b, [&](int64_t t, int m, const float *x) {
        const int64_t now = run.right.per ? t / run.right.per : 0;
        if (now != asked) ask(t), asked = now;
        float *mine = s + (t - a);
        dense_dot<R>(by, reinterpret_cast<const F32 *>(x), m, step, mine, stride);
        if (plan.folded) {
            float size[64], zero[64];
            if (plan.folded->a.data) {
                column(plan.folded->a, whose, t, m, size);
                for (int r = 0; r < R; r++)
                    for (int i = 0; i < m; i++) mine[r * stride + i] *= size[i];
            }
            if (plan.folded->b.data) {
                column(plan.folded->b, whose, t, m, zero);
                for (int r = 0; r < R; r++)
                    for (int i = 0; i < m; i++) mine[r * stride + i] += zero[i] * all[r];
            }
        }
    });
}

// out [R, D] += weights p times the slots [a, b).
template <int R>
void tile_mix(const Run &run, int head, int64_t a, int64_t b, int D, const float *p, int stride, float *out) {
    const Plan plan(run);
    const int whose = run.heads ? run.heads[head] : head;
    const int step = plan.step;
    const bool apart = run.right.data || step != D;
    float *room = beside(size_t(2 * R) * MAX_DIM + (run.right.data ? size_t(D) * step : 0)), *right = room + 2 * R * MAX_DIM;
    float *total = apart ? room : out, all[R] = {};
    if (apart) memset(total, 0, R * step * sizeof(float));
    const auto give = [&](int64_t t) {
        for (int r = 0; r < R; r++) {
            for (int i = 0; i < plan.wide; i++) total[r * step + i] += all[r];
            all[r] = 0;
        }
        if (!apart) return;
        float *from = total;
        int rows = step;
        if (run.right.data) {
            right_of(run, head, t, D, step, right);
            from = room + R * MAX_DIM, rows = D;
            dense_dot<R>(total, reinterpret_cast<const F32 *>(right), D, step, from, D);
        }
        for (int r = 0; r < R; r++)
            for (int d = 0; d < D; d++) out[r * D + d] += from[r * rows + d];
        memset(total, 0, R * step * sizeof(float));
    };
    int64_t last = a;
    if (apart && single(run) && !run.right.per) {
        for (int r = 0; r < R; r++) {
            vf sums[4] = {};
            int64_t i = 0;
            for (; i + 4 * W <= b - a; i += 4 * W)
                for (int k = 0; k < 4; k++) sums[k] += load(p + r * stride + i + k * W);
            float found = sum(sums[0] + sums[1] + (sums[2] + sums[3]));
            for (; i < b - a; i++) found += p[r * stride + i];
            total[r * step] = found * number_of(run, whose);
        }
        return give(a);
    }
    if (apart && thin(run)) {
        each_thin(run, whose, a, b, [&](int64_t t, int m, const float *x) {
            if (run.right.per && t / run.right.per != last / run.right.per) give(last);
            last = t;
            alignas(64) float weights[64];
            for (int r = 0; r < R; r++) {
                memcpy(weights, p + r * stride + (t - a), m * sizeof(float));
                for (int i = m; i < 64; i++) weights[i] = 0;
                for (int j = 0; j < plan.wide; j++) {
                    vf found = {};
                    for (int i = 0; i < 64; i += W) found += load(weights + i) * load(x + j * 64 + i);
                    total[r * step + j] += sum(found);
                }
            }
        });
        return give(last);
    }
    if (apart && plain(run)) {
        each_chunk(run, a, b, [&](int64_t t, int64_t end) {
            alignas(64) float close[R * MAX_DIM] = {};
            with_rows(run, whose, t, [&](auto rows) { dense_mix<R>(p + (t - a), stride, rows, end - t, plan.wide, close); });
            for (int r = 0; r < R; r++)
                for (int d = 0; d < plan.wide; d++) total[r * step + d] += close[r * plan.wide + d];
            give(t);
        });
        return;
    }
    each_tile(run, plan, whose, a, b, [&](int64_t t, int m, const float *x) {
        if (run.right.per && t / run.right.per != last / run.right.per) give(last);
        last = t;
        const float *by = p + (t - a);
        int by_stride = stride;
        float weights[R * 64], number[64];
        if (plan.folded) {
            if (plan.folded->b.data) {
                column(plan.folded->b, whose, t, m, number);
                for (int r = 0; r < R; r++)
                    for (int i = 0; i < m; i++) all[r] += by[r * stride + i] * number[i];
            }
            if (plan.folded->a.data) {
                column(plan.folded->a, whose, t, m, number);
                for (int r = 0; r < R; r++)
                    for (int i = 0; i < m; i++) weights[r * 64 + i] = by[r * stride + i] * number[i];
                by = weights, by_stride = 64;
            }
        }
        dense_mix<R>(by, by_stride, reinterpret_cast<const F32 *>(x), m, step, total);
    });
    give(last);
}

// Logits against a run of any kind. `first`: the query row that begins.
template <int R>
void any_dot(const Job &job, const Run &run, int head, int first, int64_t a, int64_t b, float *s, int stride) {
    if (run.kind == SUM) {
        alignas(64) float more[R * SPLIT];
        for (size_t i = 0; i < run.inner.size(); i++) {
            any_dot<R>(job, run.inner[i], head, first, a, b, i ? more : s, i ? SPLIT : stride);
            if (!i) continue;
            for (int r = 0; r < R; r++)
                for (int64_t t = 0; t < b - a; t++) s[r * stride + t] += more[r * SPLIT + t];
        }
        return;
    }
    const bool tile = run.kind == TILE;
    const int dim = !tile && run.width ? run.width : job.dim;  // of the queries
    const float *q = run.q + (int64_t(head) * job.rows + first) * (tile && !run.right.data ? run.wide : dim);
    if (tile) return tile_dot<R>(run, q, job.scale, head, a, b, dim, s, stride);
    key_rows<R>(run, q, job.scale, head, a, b, dim, s, stride);
}

template <int R>
void any_mix(const Run &run, int head, int64_t a, int64_t b, int D, const float *p, int stride, float *out) {
    if (run.kind == SUM)
        for (const Run &term : run.inner) any_mix<R>(term, head, a, b, D, p, stride, out);
    else if (run.kind == TILE) tile_mix<R>(run, head, a, b, D, p, stride, out);
    else value_rows<R>(run, head, a, b, D, p, stride, out);
}

}  // namespace
