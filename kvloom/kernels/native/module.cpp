// Python's side: reads what `kvloom/kernels/native.py` describes, picks an instruction set, shares out splits.
#include <cstdlib>
#include <string>

#include "described.h"
#include "entropy.h"
#include "pool.h"
#include "standing.h"

namespace nb = nanobind;

namespace kvloom {

namespace {

constexpr double WORTH = 1e6;  // multiply-adds: below, waking another thread takes longer than the work

struct Kernels {
    const char *name;
    bool whole;
    decltype(&portable::attend) attend;
    decltype(&portable::merge) merge;
    decltype(&portable::prefill) prefill, observe;
    decltype(&portable::encode) encode;
};
#define KERNELS_OF(isa) {#isa, isa::whole, isa::attend, isa::merge, isa::prefill, isa::observe, isa::encode}

Kernels best() {
    const char *asked = std::getenv("KVLOOM_ISA");
    const std::string name = asked ? asked : "";
#if defined(KVLOOM_X86)
    __builtin_cpu_init();
    const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has512 = has2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = has512 && __builtin_cpu_supports("avx512vnni");
    // A set that the machine lacks stands for the next one that it has.
    const std::string order[] = {"avx512bf16", "avx512vnni", "avx512", "avx2"};
    int from = 0;
    while (from < 4 && !name.empty() && name != order[from]) from++;
#if defined(KVLOOM_BF16)
    if (vnni && __builtin_cpu_supports("avx512bf16") && from <= 0)
        return {"avx512bf16", avx512bf16::whole, avx512bf16::attend, avx512bf16::merge, avx512bf16::prefill, avx512bf16::observe, avx512::encode};
#endif
    if (vnni && from <= 1)
        return {"avx512vnni", avx512vnni::whole, avx512vnni::attend, avx512vnni::merge, avx512::prefill, avx512::observe, avx512::encode};
    if (has512 && from <= 2) return KERNELS_OF(avx512);
    if (has2 && from <= 3) return KERNELS_OF(avx2);
#endif
    return KERNELS_OF(portable);
}

const Kernels &kernels() {
    static const Kernels found = best();
    return found;
}

struct Item {
    int job, segment, head;
    int64_t start, stop;
    size_t part;  // where its result goes
};

// Splits depend on the segments alone and are merged in their order: the same bits for any number of threads and any batch.
// All heads take their turn at a split before the next one: what they share is still in cache.
void attend(const std::vector<const Job *> &jobs, int threads) {
    std::vector<Item> items;
    std::vector<size_t> first;  // of every head of every job
    double work = 0;
    size_t floats = 0;
    for (int j = 0; j < int(jobs.size()); j++) {
        size_t each = 0, split = 0;
        for (const Segment &segment : jobs[j]->segments) each += size_t((segment.n + SPLIT - 1) / SPLIT);
        const size_t from = items.size();
        for (int head = 0; head < jobs[j]->h; head++) first.push_back(from + head * each);
        for (int s = 0; s < int(jobs[j]->segments.size()); s++)
            for (int64_t at = 0, n = jobs[j]->segments[s].n; at < n; at += SPLIT, split++)
                for (int head = 0; head < jobs[j]->h; head++) {
                    items.push_back({j, s, head, at, at + SPLIT < n ? at + SPLIT : n, from + head * each + split});
                    floats += size_t(jobs[j]->rows) * (jobs[j]->value_dim + 2);
                    work += double(items.back().stop - at) * jobs[j]->rows * (jobs[j]->dim + jobs[j]->value_dim);
                }
    }
    first.push_back(items.size());
    std::vector<float> room(floats);
    std::vector<Partial> parts(items.size());
    float *at = room.data();
    for (const Item &item : items) {
        const Job &job = *jobs[item.job];
        parts[item.part] = {at, at + job.rows * job.value_dim, at + job.rows * (job.value_dim + 1)};
        at += job.rows * (job.value_dim + 2);
    }
    Pool::get().run(int(items.size()), work > WORTH ? threads : 1, [&](int i) {
        const Item &item = items[i];
        const Job &job = *jobs[item.job];
        kernels().attend(job, job.segments[item.segment], item.head, item.start, item.stop, parts[item.part]);
    });
    size_t n = 0;
    for (const Job *job : jobs)
        for (int head = 0; head < job->h; head++, n++)
            kernels().merge(*job, head, parts.data() + first[n], int(first[n + 1] - first[n]));
}

// Row i of what is new belongs to the i-th job.
void decode(const std::vector<Standing *> &all, const std::vector<int64_t> &rows, const Fresh &fresh, int threads) {
    std::vector<const Job *> jobs;
    for (size_t i = 0; i < all.size(); i++) feed(*all[i], fresh, rows[i]), jobs.push_back(&all[i]->job);
    attend(jobs, threads);
    for (size_t i = 0; i < all.size(); i++) hand_out(*all[i], fresh, rows[i]), all[i]->freeze(kernels().encode);
}

void encode(const Encode &e, int threads) {
    const int64_t count = e.along_tokens ? e.n / e.group : e.n, each = e.along_tokens ? 1 : 64, pieces = (count + each - 1) / each;
    Pool::get().run(int(pieces * e.h), double(e.n) * e.h * e.dim > WORTH / 8 ? threads : 1, [&](int i) {
        const int64_t start = i / e.h * each;
        kernels().encode(e, i % e.h, start, start + each < count ? start + each : count);
    });
}

// Pieces from the last to the first: behind a causal mask the last take longest.
void many_rows(const Prefill &p, bool observed, int threads) {
    const int64_t size = observed ? PREFILL_KEYS : PREFILL_ROWS, count = ((observed ? p.n : p.m) + size - 1) / size;
    const auto f = observed ? kernels().observe : kernels().prefill;
    Pool::get().run(int(count * p.h), threads, [&](int i) {
        const int piece = observed ? i / p.h : int(count - 1 - i / p.h);
        f(p, i % p.h, piece);
    });
}

Matrix8 bytes_of(PyObject *t, int first) {
    return {pointer<uint8_t>(t, first), number(t, first + 1), number(t, first + 2), number(t, first + 3)};
}

}  // namespace

}  // namespace kvloom

NB_MODULE(_native, m) {
    using namespace kvloom;
    m.attr("isa") = kernels().name;
    m.attr("whole") = kernels().whole;  // whether it multiplies packed codes in whole numbers where it may
    m.attr("max_dim") = MAX_DIM;
    m.attr("max_width") = MAX_WIDTH;  // of what a tile begins with
    m.attr("version") = 2;  // of the descriptions
    m.def(
        "attend",
        [](nb::list described, int threads) {
            std::vector<Job> jobs;
            for (Py_ssize_t i = 0; i < PyList_GET_SIZE(described.ptr()); i++)
                jobs.push_back(job_of(PyList_GET_ITEM(described.ptr(), i), kernels().whole));
            if (PyErr_Occurred()) throw nb::python_error();
            std::vector<const Job *> all;
            for (const Job &job : jobs) all.push_back(&job);
            nb::gil_scoped_release release;
            attend(all, threads);
        },
        nb::arg("jobs"), nb::arg("threads"));
    nb::class_<Standing>(m, "Standing")
        .def("__init__", [](Standing *self, nb::tuple described, int grows, int64_t room, int64_t keep) {
            new (self) Standing(described.ptr(), grows, room, keep, kernels().whole);
            if (PyErr_Occurred()) throw nb::python_error();
        })
        .def_ro("room", &Standing::room);
    m.def(
        "decode",
        [](nb::list jobs, nb::list rows, nb::tuple fresh, int threads) {
            PyObject *t = fresh.ptr();
            check(t, 10);
            const Fresh found{pointer<const float>(t, 0), number(t, 1), pointer<const uint8_t>(t, 2), number(t, 3), number(t, 4),
                              pointer<const uint8_t>(t, 5), number(t, 6), number(t, 7), pointer<float>(t, 8), pointer<const float>(t, 9)};
            std::vector<Standing *> all;
            std::vector<int64_t> at;
            for (size_t i = 0; i < jobs.size(); i++) {
                all.push_back(nb::cast<Standing *>(jobs[i]));
                at.push_back(nb::cast<int64_t>(rows[i]));
                if (all[i]->room < 1 || at[i] < 0 || at[i] >= found.n) throw nb::value_error("no room, or no such row");
            }
            if (PyErr_Occurred()) throw nb::python_error();
            nb::gil_scoped_release release;
            decode(all, at, found, threads);
        },
        nb::arg("jobs"), nb::arg("rows"), nb::arg("fresh"), nb::arg("threads"));
    m.def(
        "many_rows",
        [](nb::tuple described, bool observed, int threads) {
            const Prefill p = prefill_of(described.ptr());
            if (PyErr_Occurred()) throw nb::python_error();
            nb::gil_scoped_release release;
            many_rows(p, observed, threads);
        },
        nb::arg("job"), nb::arg("observed"), nb::arg("threads"));
    m.def(
        "encode",
        [](nb::tuple described, int threads) {
            const Encode e = encode_of(described.ptr());
            if (PyErr_Occurred()) throw nb::python_error();
            nb::gil_scoped_release release;
            encode(e, threads);
        },
        nb::arg("job"), nb::arg("threads"));
    m.def(
        "entropy_encode",
        [](nb::list matrices, int threads) {
            std::vector<Matrix8> from;
            for (Py_ssize_t i = 0; i < PyList_GET_SIZE(matrices.ptr()); i++) {
                check(PyList_GET_ITEM(matrices.ptr(), i), 4);
                from.push_back(bytes_of(PyList_GET_ITEM(matrices.ptr(), i), 0));
            }
            if (PyErr_Occurred()) throw nb::python_error();
            std::vector<std::vector<uint8_t>> codes(from.size());
            {
                nb::gil_scoped_release release;
                Pool::get().run(int(from.size()), threads, [&](int i) { codes[i] = entropy_encode(from[i]); });
            }
            nb::list out;
            for (const auto &code : codes) out.append(nb::bytes(code.data(), code.size()));
            return out;
        },
        nb::arg("matrices"), nb::arg("threads"));
    m.def(
        "entropy_decode",
        [](nb::list codes, int threads) {
            std::vector<Coded> from;
            for (Py_ssize_t i = 0; i < PyList_GET_SIZE(codes.ptr()); i++) {
                PyObject *t = PyList_GET_ITEM(codes.ptr(), i);
                check(t, 6);
                from.push_back({pointer<const uint8_t>(t, 0), size_t(number(t, 1)), bytes_of(t, 2)});
            }
            if (PyErr_Occurred()) throw nb::python_error();
            nb::gil_scoped_release release;
            return entropy_decode(from, threads);
        },
        nb::arg("codes"), nb::arg("threads"));
}
