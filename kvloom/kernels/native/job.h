// What a call asks for, free of any instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace kvloom {

constexpr int SPLIT = 512;  // slots of one partial result: fixed, so that sums are the same for any number of threads
constexpr int MAX_ROWS = 64, MAX_DIM = 512;

enum Kind : int { FLOAT32, FLOAT16, BFLOAT16, TOKENS, CHANNELS };  // the last two: packed codes, groups along ...

// Consecutive slots of one plane under one codec. Rows are contiguous; heads are `head` bytes apart.
//   dense      data [h, n, D]
//   TOKENS     data [h, n / group, D, group * bits / 8], scale and zero [h, n / group, D]
//   CHANNELS   data [h, n, D * bits / 8], scale and zero [h, n, D / group]
struct Run {
    Kind kind;
    int64_t n;
    const uint8_t *data;
    int64_t head;
    int bits = 0, group = 0;
    const uint8_t *scale = nullptr, *zero = nullptr;
    int64_t scale_head = 0, zero_head = 0;
    Kind small = FLOAT16;  // dtype of scale and zero
    const float *q = nullptr;  // key planes: queries [h, R, D]
};

struct Segment {
    int64_t n;
    const float *logw;  // [h or 1, n] or null
    int64_t logw_head;
    float *scores;  // [h, R, n] or null
    std::vector<Run> keys, values;
};

// Attention of R query rows of each of h heads: out [h, R, Dv], lse [h, R].
struct Job {
    int h, rows, dim, value_dim;
    float scale, softcap;
    float *out, *lse;
    std::vector<Segment> segments;
};

// One split of one head: adds out [R, Dv] of unnormalized weights exp(s - top), their sums and tops.
struct Partial {
    float *out, *sum, *top;
};

using Attend = void (*)(const Job &, const Segment &, int head, int64_t start, int64_t stop, Partial);
using Merge = void (*)(const Job &, int head, const Partial *, int count);

struct Kernels {
    const char *name;
    Attend attend;
    Merge merge;
};

extern const Kernels portable, avx2, avx512;

}  // namespace kvloom
