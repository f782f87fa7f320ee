// The kernels of every instruction set that this machine has, against a plain loop in double precision. Needs neither Python
// nor torch, so that it runs under an emulator: scripts/check_kernels.sh.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../kvloom/kernels/native/job.h"

using namespace kvloom;

namespace {

std::mt19937 rng(1);
float normal() { return std::normal_distribution<float>()(rng); }
int below(int n) { return int(rng() % unsigned(n)); }

// 16-bit numbers without a rounding of our own: only values that float16 and bfloat16 hold exactly.
uint16_t exact16(Kind kind, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (kind == BFLOAT16) return uint16_t(bits >> 16);
    return uint16_t((bits >> 16 & 0x8000) | (((bits >> 13 & 0x3ffff) - (112 << 10)) & 0x7fff));
}
float grid(float least, float most) {  // multiples of 1/64, not zero: exact in both
    const int a = int(least * 64), b = int(most * 64);
    float x = float(a + below(b - a + 1)) / 64;
    return x == 0 ? 1.0f / 64 : x;
}
float round_to(Kind kind, float x) {  // 4 significant bits: exact in any dtype
    if (kind == FLOAT32) return x;
    int e;
    const float m = std::frexp(x == 0 ? 1.0f : x, &e);
    return std::ldexp(std::round(m * 16) / 16, e < -6 ? -6 : e);
}

struct Plane {
    std::vector<uint8_t> data, scale, zero;
    std::vector<double> x;  // decoded [h, n, D]
    std::vector<double> step, off;  // of packed numbers: their scale, and how far their code is from the middle one
    Run run;
};

int code_at(const uint8_t *row, int n, int bits, int i) {
    if (bits == 8) return row[i];
    if (bits == 3) return code_at(row, n, 2, i) | code_at(row + n / 4, n, 1, i) << 2;
    const int m = n * bits / 8;
    return row[i % m] >> (bits * (i / m)) & ((1 << bits) - 1);
}

Plane make(Kind kind, int h, int64_t n, int D, int bits, int group, Kind small) {
    Plane p;
    p.x.resize(h * n * D), p.step.resize(h * n * D), p.off.resize(h * n * D);
    p.run.kind = kind, p.run.n = n, p.run.bits = bits, p.run.group = group, p.run.small = small;
    if (kind < TOKENS) {
        const int size = kind == FLOAT32 ? 4 : 2;
        p.data.resize(h * n * D * size);
        for (int64_t i = 0; i < h * n * D; i++) {
            const float x = round_to(kind, normal());
            p.x[i] = x;
            const uint16_t y = exact16(kind, x);
            kind == FLOAT32 ? memcpy(&p.data[i * 4], &x, 4) : memcpy(&p.data[i * 2], &y, 2);
        }
        p.run.head = n * D * size;
    } else {
        const int row = kind == TOKENS ? group : D, rows = int(kind == TOKENS ? n / group * D : n), bytes = row * bits / 8;
        const int levels = int(n * D / group);
        p.data.resize(h * rows * bytes);
        for (auto &b : p.data) b = uint8_t(rng());
        p.scale.resize(h * levels * 2), p.zero.resize(h * levels * 2);
        std::vector<float> s(h * levels), z(h * levels);
        for (int i = 0; i < h * levels; i++) {
            s[i] = round_to(small, grid(0.1f, 0.9f) / (1 << bits)), z[i] = round_to(small, grid(-1, 1));
            const uint16_t a = exact16(small, s[i]), b = exact16(small, z[i]);
            memcpy(&p.scale[2 * i], &a, 2), memcpy(&p.zero[2 * i], &b, 2);
        }
        for (int head = 0; head < h; head++)
            for (int64_t t = 0; t < n; t++)
                for (int d = 0; d < D; d++) {
                    const int64_t r = kind == TOKENS ? t / group * D + d : t;
                    const int64_t level = head * int64_t(levels) + (kind == TOKENS ? r : t * (D / group) + d / group);
                    const int c = code_at(&p.data[(head * int64_t(rows) + r) * bytes], row, bits, int(kind == TOKENS ? t % group : d));
                    p.x[(head * n + t) * D + d] = c * double(s[level]) + z[level];
                    p.step[(head * n + t) * D + d] = s[level], p.off[(head * n + t) * D + d] = std::fabs(c - ((1 << bits) - 1) / 2.0);
                }
        p.run.head = int64_t(rows) * bytes, p.run.scale_head = p.run.zero_head = levels * 2;
        p.run.scale = p.scale.data(), p.run.zero = p.zero.data();
    }
    p.run.data = p.data.data();
    return p;
}

struct Set {
    const char *name;
    bool whole;
    decltype(&portable::attend) attend;
    decltype(&portable::merge) merge;
    decltype(&portable::prefill) prefill, observe;
    decltype(&portable::encode) encode;
};

std::vector<Set> sets() {
    std::vector<Set> out{{"portable", portable::whole, portable::attend, portable::merge, portable::prefill, portable::observe, portable::encode}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        out.push_back({"avx2", avx2::whole, avx2::attend, avx2::merge, avx2::prefill, avx2::observe, avx2::encode});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        out.push_back({"emulated", emulated::whole, emulated::attend, emulated::merge, emulated::prefill, emulated::observe, emulated::encode});
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        out.push_back({"avx512", avx512::whole, avx512::attend, avx512::merge, avx512::prefill, avx512::observe, avx512::encode});
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl"))
        out.push_back({"avx512vnni", avx512vnni::whole, avx512vnni::attend, avx512vnni::merge, avx512::prefill, avx512::observe, avx512::encode});
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl"))
        out.push_back({"avx512bf16", avx512bf16::whole, avx512bf16::attend, avx512bf16::merge, avx512bf16::prefill, avx512bf16::observe, avx512::encode});
#endif
    return out;
}

bool quick = false;
int failures = 0, checks = 0;
void expect(const char *set, const char *what, double error, double bound) {
    checks++;
    if (error < bound) return;
    failures++;
    printf("FAILED %s %s: error %g, at most %g allowed\n", set, what, error, bound);
}

// Softmax attention of one row in double.
void attend_row(const std::vector<double> &s, const double *v, int64_t n, int D, std::vector<double> &out, double &lse) {
    double top = -INFINITY, total = 0;
    for (int64_t t = 0; t < n; t++) top = std::max(top, s[t]);
    out.assign(D, 0);
    for (int64_t t = 0; t < n; t++) {
        const double p = std::exp(s[t] - top);
        total += p;
        for (int d = 0; d < D; d++) out[d] += p * v[t * D + d];
    }
    for (auto &x : out) x /= total;
    lse = top + std::log(total);
}

// What rounding weights to multiples of a step adds: at most half a step times each code, and as much as uniform noise in all.
struct Rounding {
    double beyond = 0, found = 1e-12, noise = 1e-12;
    double ratio() const { return std::sqrt(found / noise); }
    template <class Weight, class Off>
    void add(double wrong, int n, int block, Weight weight, Off off) {
        double most = 0;
        for (int at = 0; at < n; at += block) {
            double top = 0;
            for (int i = at; i < std::min(n, at + block); i++) top = std::max(top, std::fabs(weight(i)));
            for (int i = at; i < std::min(n, at + block); i++) most += top / 254 * off(i), noise += std::pow(top / 127 * off(i), 2) / 12;
        }
        beyond = std::max(beyond, std::fabs(wrong) - most), found += wrong * wrong;
    }
};

void decode(const Set &set, Kind key, Kind value, int bits, int group, int rows, int D, int V, Kind small, bool whole = false) {
    const int h = 2;
    const int64_t n = 192 * (quick ? 1 : 1 + below(4));
    if (quick && below(4)) return;
    Plane k = make(key, h, n, D, bits, group, small), v = make(value, h, n, V, bits, group, small);
    std::vector<float> q(h * rows * D), out(h * rows * V), lse(h * rows), logw(n), scores(h * rows * n);
    const bool exact = below(2);  // queries of the keys' dtype may be multiplied otherwise
    for (auto &x : q) x = exact ? round_to(key, normal()) : normal();
    for (auto &x : logw) x = normal();
    k.run.q = q.data(), k.run.whole = v.run.whole = whole;
    Rounding of_logits, of_values;
    Job job{h, rows, D, V, 0.1f, 0, out.data(), lse.data(), {{n, logw.data(), 0, scores.data(), {k.run}, {v.run}}}};
    double error = 0, far = 0, logit = 0, size = 0;
    for (int head = 0; head < h; head++) {
        std::vector<float> room;
        std::vector<Partial> parts;
        const int count = int((n + SPLIT - 1) / SPLIT);
        room.resize(count * rows * (V + 2));
        for (int i = 0; i < count; i++) {
            float *at = room.data() + i * rows * (V + 2);
            parts.push_back({at, at + rows * V, at + rows * (V + 1)});
            set.attend(job, job.segments[0], head, i * SPLIT, std::min<int64_t>(n, (i + 1) * SPLIT), parts[i]);
        }
        set.merge(job, head, parts.data(), count);
        for (int r = 0; r < rows; r++) {
            std::vector<double> s(n), o;
            double l;
            for (int64_t t = 0; t < n; t++) {
                s[t] = logw[t];
                for (int d = 0; d < D; d++) s[t] += double(q[(head * rows + r) * D + d]) * 0.1f * k.x[(head * n + t) * D + d];
                const double wrong = scores[(head * rows + r) * n + t] - s[t];
                if (whole) {
                    const double *step = &k.step[(head * n + t) * D], *off = &k.off[(head * n + t) * D];
                    of_logits.add(wrong, D, 512 >> bits, [&](int d) { return q[(head * rows + r) * D + d] * 0.1 * step[d]; }, [&](int d) { return off[d]; });
                    s[t] += wrong;  // values are then compared under the weights that were used
                } else {
                    logit = std::max(logit, std::fabs(wrong));
                }
            }
            attend_row(s, &v.x[head * n * V], n, V, o, l);
            for (int d = 0; d < V; d++) {
                const double wrong = out[(head * rows + r) * V + d] - o[d];
                size = std::max(size, std::fabs(o[d]));
                if (!whole) error = std::max(error, std::fabs(wrong));
                else of_values.add(wrong, int(n), std::min(64, 512 >> bits), [&](int t) { return std::exp(s[t] - l) * v.step[(head * n + t) * V + d]; },
                                   [&](int t) { return v.off[(head * n + t) * V + d]; });
            }
            far = std::max(far, std::fabs(l - lse[head * rows + r]));
        }
    }
    char what[200];
    snprintf(what, sizeof what, "decode%s keys %d values %d, %d bits, group %d, %d rows, D %d and %d", whole ? " in whole numbers" : "", key, value, bits, group, rows, D, V);
    if (whole) {
        expect(set.name, what, of_logits.beyond, 1e-4), expect(set.name, what, of_values.beyond / size, 3e-5);
        expect(set.name, what, of_logits.ratio(), 1.4), expect(set.name, what, of_values.ratio(), 1.4);
    }
    expect(set.name, what, error / size, 3e-5), expect(set.name, what, far, 3e-5), expect(set.name, what, logit, 1e-4);
}

void many(const Set &set, Kind kind, int g, int m, int n, int D, int V, bool causal, float softcap) {
    const int h = 2;
    Plane q = make(kind, h * g, m, D, 0, 0, kind), k = make(kind, h, n, D, 0, 0, kind), v = make(kind, h, n, V, 0, 0, kind);
    const int size = kind == FLOAT32 ? 4 : 2;
    const auto matrix = [&](const Plane &p, int64_t rows, int dim) { return Matrix{kind, p.data.data(), rows * dim * size, int64_t(dim) * size}; };
    std::vector<uint8_t> out(h * g * m * V * size);
    std::vector<float> lse(h * g * m), mass(h * g * n);
    Prefill p{h, g, D, V, m, n, 0, causal, 0.1f, softcap, matrix(q, m, D), matrix(k, n, D), matrix(v, n, V), out.data(), lse.data(), mass.data()};
    for (int head = 0; head < h; head++)
        for (int i = 0; i * PREFILL_ROWS < m; i++) set.prefill(p, head, i);
    double error = 0, far = 0, wrong = 0;
    std::vector<double> expected(h * g * n);
    for (int head = 0; head < h * g; head++)
        for (int i = 0; i < m; i++) {
            const int64_t seen = causal ? std::min(n, i + 1) : n;
            std::vector<double> s(seen), o;
            double l;
            for (int64_t t = 0; t < seen; t++) {
                for (int d = 0; d < D; d++) s[t] += 0.1 * q.x[(int64_t(head) * m + i) * D + d] * k.x[(head / g * int64_t(n) + t) * D + d];
                if (softcap > 0) s[t] = softcap * std::tanh(s[t] / softcap);
            }
            attend_row(s, &v.x[head / g * int64_t(n) * V], seen, V, o, l);
            far = std::max(far, std::fabs(l - lse[head * m + i]));
            for (int64_t t = 0; t < seen; t++) expected[head * n + t] += std::exp(s[t] - l);
            for (int d = 0; d < V; d++) {
                float x = 0;
                const uint8_t *at = &out[((int64_t(head) * m + i) * V + d) * size];
                if (size == 4) memcpy(&x, at, 4);
                else {
                    uint16_t y;
                    memcpy(&y, at, 2);
                    const uint32_t b = uint32_t(y) << 16;
                    if (kind == BFLOAT16) memcpy(&x, &b, 4);
                    else x = std::ldexp(float(y & 0x3ff) + (y & 0x7c00 ? 1024.0f : 0.0f), ((y & 0x7c00) ? (y >> 10 & 31) : 1) - 25) * (y & 0x8000 ? -1 : 1);
                }
                error = std::max(error, std::fabs(x - o[d]));
            }
        }
    if (causal) {
        for (int head = 0; head < h; head++)
            for (int i = 0; i * PREFILL_KEYS < n; i++) set.observe(p, head, i);
        for (int i = 0; i < h * g * n; i++) wrong = std::max(wrong, std::fabs(mass[i] - expected[i]));
    }
    char what[200];
    snprintf(what, sizeof what, "prefill kind %d, g %d, m %d, n %d, D %d and %d, causal %d, cap %g", kind, g, m, n, D, V, causal, softcap);
    expect(set.name, what, error, kind == FLOAT32 ? 1e-5 : kind == FLOAT16 ? 2e-3 : 2e-2), expect(set.name, what, far, 1e-4), expect(set.name, what, wrong, 1e-3);
}

#include "tiles.h"

// Every set gives the bytes of the first.
void encoded(const std::vector<Set> &all, bool tokens, int bits, int group, int D, Kind kind) {
    const int h = 2;
    const int64_t n = group * 3;
    Plane x = make(kind, h, n, D, 0, 0, kind);
    std::vector<uint8_t> first;
    for (const Set &set : all) {
        std::vector<uint8_t> room(h * n * D * bits / 8 + 4 * h * n * D / group);
        Encode e{h, D, bits, group, n, tokens, kind == FLOAT32 ? FLOAT16 : kind, {kind, x.data.data(), x.run.head, x.run.head / n}, room.data(), nullptr, nullptr};
        e.scale = room.data() + h * n * D * bits / 8, e.zero = e.scale + 2 * h * n * D / group;
        for (int head = 0; head < h; head++) set.encode(e, head, 0, tokens ? n / group : n);
        if (first.empty()) first = room;
        char what[100];
        snprintf(what, sizeof what, "encode along %s, %d bits, group %d, D %d", tokens ? "tokens" : "channels", bits, group, D);
        expect(set.name, what, first == room ? 0 : 1, 0.5);
    }
}

}  // namespace

int main(int argc, char **argv) {  // [set or all] [quick]
    const auto all = sets();
    quick = argc > 2 && std::string(argv[2]) == "quick";
    for (const Set &set : all) {
        if (argc > 1 && std::string(argv[1]) != "all" && std::string(argv[1]) != set.name) continue;
        for (Kind kind : {FLOAT32, FLOAT16, BFLOAT16})
            for (int D : {8, 64, 72, 80, 128})
                for (int rows : {1, 3, 4, 7}) decode(set, kind, kind, 4, 32, rows, D, D == 72 ? 40 : D, FLOAT16);
        for (int bits : {1, 2, 3, 4, 8})
            for (int group : {8, 16, 24, 32, 64, 96})
                for (int D : {64, 80, 96, 192}) {
                    if (D % group) continue;
                    const Kind small = group == 32 ? BFLOAT16 : FLOAT16;
                    for (int rows : {1, 4, 6}) {
                        decode(set, TOKENS, CHANNELS, bits, group, rows, D, D, small);
                        if (set.whole && bits < 8) decode(set, TOKENS, CHANNELS, bits, group, rows, D, D, small, true);
                        if (rows == 4) decode(set, CHANNELS, TOKENS, bits, group, rows, D, D, small);
                    }
                }
        for (Kind kind : {FLOAT32, FLOAT16, BFLOAT16})
            for (bool causal : {true, false}) {
                many(set, kind, 3, 130, 130, 64, 64, causal, 0), many(set, kind, 1, 7, 7, 80, 72, causal, 20);
                many(set, kind, 2, 97, 65, 8, 40, causal, 0), many(set, kind, 2, 65, 200, 128, 96, causal, 0);
            }
        for (int rows : {1, 4, 7})
            for (bool others : {false, true}) {
                for (int D : {8, 40, 64}) tiled(set, FLOAT32, rows, D, 24, others), tiled(set, FLOAT32, rows, D, 5, others);
                for (int each : {2, 4, 8, 16}) tiled(set, TABLE, rows, 64, each, others);
                tiled(set, TRITS, rows, 64, 24, others), tiled(set, TRITS, rows, 40, 8, others), tiled(set, TRITS, rows, 24, 264, others);
            }
        printf("%s: done\n", set.name);
    }
    for (bool tokens : {true, false})
        for (int bits : {1, 2, 3, 4, 8})
            for (int group : {8, 24, 32, 64})
                for (Kind kind : {FLOAT32, FLOAT16, BFLOAT16}) encoded(all, tokens, bits, group, 192, kind);
    printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
