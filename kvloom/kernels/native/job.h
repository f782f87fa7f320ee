// What a call asks for, free of any instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace kvloom {

constexpr int SPLIT = 512;  // slots of one partial result: fixed, so that sums are the same for any number of threads
constexpr int MAX_ROWS = 64, MAX_DIM = 512, MAX_WIDTH = 8192;

// Numbers; packed codes with groups along ...; codes of a table; a tile that is made in steps; a sum; places and exponents;
// numbers of -1, 0 and 1.
enum Kind : int { FLOAT32, FLOAT16, BFLOAT16, TOKENS, CHANNELS, TABLE, TILE, SUM, INT16, INT32, EXPONENT, TRITS };

// A tensor of which a row belongs to `per` slots (0: to all). Heads are `head` bytes apart (0: they share it), rows `row`.
struct Field {
    Kind kind = FLOAT32;
    const uint8_t *data = nullptr;
    int64_t head = 0, row = 0, per = 0;
    int count = 0;  // numbers in a row
};

// What is done to a tile, x [slots, width]:
//   AFFINE   x * a + b; each of a row's `count` numbers belongs to width / count neighbouring channels. Either may be absent.
//   PERMUTE  channel i becomes what channel a[i] was
//   PLACES   numbers b [k] of each slot take the places a [k], which count the channels of one head, or (x) of head after head;
//            with y they are added
//   SLOTS    numbers b [k, width] of `per` slots take the places a [k, width], counted in slots, ascending in each channel
//   PRODUCT  a [x] of each slot times b [width, x] of its `per` slots is added
//   EXPAND   x times a [width, x]
//   TURN     RoPE: cosines and sines of 64 i steps a [., 2 P] and of i < 64 steps b [64, 2 P] together make those of any place;
//            c [P]: radians of a step; d: places, or they begin at `start`. x: channels before, y: pairs, z: 1 if they are
//            neighbours; cosines are rounded to `round`
//   UNIT     each slot's length becomes 1
enum Op : int { AFFINE, PERMUTE, PLACES, SLOTS, PRODUCT, EXPAND, TURN, UNIT };
struct Stage {
    Op op;
    Field a, b, c, d;
    int x = 0, y = 0, z = 0;
    int64_t start = 0;
    Kind round = FLOAT32;
};

// Consecutive slots of one plane under one codec. Rows are contiguous; heads are `head` bytes apart.
//   dense      data [h, n, D]
//   TOKENS     data [h, n / group, D, group * bits / 8], scale and zero [h, n / group, D]
//   CHANNELS   data [h, n, D * bits / 8], scale and zero [h, n, D / group]
//   TABLE      data [h, n, M * bits / 8]; code i of a slot stands for the numbers table[i or 0, code], D / M of them
//   TRITS      data [h, n / group, row], five of the group's [D, group] numbers to a byte, base 3; size (in `scale`) [h, n / group, D]
//   TILE       inner[0] decoded to `width` numbers a slot, then `stages`; `wide` numbers in the end. With right [D, wide],
//              what is stored is the product of both: keys are asked with q right, sums of values multiplied by right^T
//   SUM        the sum of `inner`
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
    bool whole = false;        // packed codes may be multiplied in whole numbers, by weights of 8 bits
    int64_t row = 0;           // dense rows of a tile, rows of TABLE, groups of TRITS: bytes from one to the next
    int width = 0, wide = 0;
    const int32_t *heads = nullptr;  // TILE: whose slots each head reads, where not its own; `right` is the reader's
    Field table, right;
    std::vector<Run> inner = {};
    std::vector<Stage> stages = {};
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

// A dense matrix of each head: rows are `row` bytes apart, heads `head`.
struct Matrix {
    Kind kind;
    const uint8_t *data;
    int64_t head, row;
};

constexpr int PREFILL_ROWS = 96, PREFILL_KEYS = 64;  // of one piece of work: query rows of a head; keys that are observed

// Many query rows: q [h * group, m, D], k [h, n, D], v [h, n, Dv]. Causal: row i sees slots up to past + i.
// out [h * group, m, Dv] in q's dtype and lse [h * group, m]; or, with lse given, mass [h, group, n].
struct Prefill {
    int h, group, dim, value_dim;
    int64_t m, n, past;
    bool causal;
    float scale, softcap;
    Matrix q, k, v;
    uint8_t *out;
    float *lse, *mass;
};

// x [h, n, D] to packed codes, and scales and minima of the 16-bit kind `small`, contiguous, laid out as in `Run`.
struct Encode {
    int h, dim, bits, group;
    int64_t n;
    bool along_tokens;
    Kind small;
    Matrix x;
    uint8_t *codes, *scale, *zero;
};

// What is compiled once for each instruction set, in a namespace of its name.
#define KVLOOM_KERNELS(isa)                                                                        \
    namespace isa {                                                                                \
    extern const bool whole; /* whether it multiplies in whole numbers where it may */             \
    void attend(const Job &, const Segment &, int head, int64_t start, int64_t stop, Partial);     \
    void merge(const Job &, int head, const Partial *, int count);                                 \
    void prefill(const Prefill &, int head, int piece);                                            \
    void observe(const Prefill &, int head, int piece);                                            \
    void encode(const Encode &, int head, int64_t start, int64_t stop); /* units of tokens, or tokens */ \
    }
KVLOOM_KERNELS(portable)
KVLOOM_KERNELS(avx2)
KVLOOM_KERNELS(avx512)
KVLOOM_KERNELS(avx512vnni) /* attend and merge alone */
KVLOOM_KERNELS(avx512bf16) /* all but encode */
KVLOOM_KERNELS(emulated)   /* for tests: the last two's algorithms on AVX2, their instructions in several */

}  // namespace kvloom
