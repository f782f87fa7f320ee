// What `kvloom/kernels/native.py` describes, read into the structures of job.h.
#pragma once

#include <nanobind/nanobind.h>

#include "job.h"

namespace nb = nanobind;

namespace kvloom {

namespace {

void check(PyObject *t, Py_ssize_t least) {
    if (!PyTuple_CheckExact(t) || PyTuple_GET_SIZE(t) < least) throw nb::type_error("a description of another form");
}

int64_t number(PyObject *tuple, int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)); }

template <class T>
T *pointer(PyObject *tuple, int i) {
    return reinterpret_cast<T *>(number(tuple, i));
}

Field field_of(PyObject *t) {
    if (t == Py_None) return {};
    check(t, 6);
    return {Kind(number(t, 0)), pointer<const uint8_t>(t, 1), number(t, 2), number(t, 3), number(t, 4), int(number(t, 5))};
}

Stage stage_of(PyObject *t) {
    check(t, 10);
    return {Op(number(t, 0)), field_of(PyTuple_GET_ITEM(t, 1)), field_of(PyTuple_GET_ITEM(t, 2)), field_of(PyTuple_GET_ITEM(t, 3)),
            field_of(PyTuple_GET_ITEM(t, 4)), int(number(t, 5)), int(number(t, 6)), int(number(t, 7)), number(t, 8), Kind(number(t, 9))};
}

Run run_of(PyObject *t, bool whole) {
    check(t, 3);
    Run run;
    run.kind = Kind(number(t, 0)), run.n = number(t, 1);
    if (run.kind == SUM || run.kind == TILE) {
        PyObject *inner = PyTuple_GET_ITEM(t, 2);
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(inner); i++) run.inner.push_back(run_of(PyTuple_GET_ITEM(inner, i), whole));
        if (run.kind == SUM) return run;
        check(t, 8);
        run.q = pointer<const float>(t, 3), run.width = int(number(t, 4)), run.wide = int(number(t, 5));
        PyObject *stages = PyTuple_GET_ITEM(t, 6);
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(stages); i++) run.stages.push_back(stage_of(PyTuple_GET_ITEM(stages, i)));
        run.right = field_of(PyTuple_GET_ITEM(t, 7));
        if (PyTuple_GET_SIZE(t) > 9) run.heads = pointer<const int32_t>(t, 9);
        return run;
    }
    check(t, 5);
    run.data = pointer<const uint8_t>(t, 2), run.head = number(t, 3);
    run.q = pointer<const float>(t, 4);
    if (run.kind == TOKENS || run.kind == CHANNELS) {
        check(t, 13);
        run.bits = int(number(t, 5)), run.group = int(number(t, 6));
        run.scale = pointer<const uint8_t>(t, 7), run.scale_head = number(t, 8);
        run.zero = pointer<const uint8_t>(t, 9), run.zero_head = number(t, 10);
        run.small = Kind(number(t, 11));
        run.whole = number(t, 12) != 0 && run.bits <= 4 && whole;
        if (PyTuple_GET_SIZE(t) > 13) run.width = int(number(t, 13));
    } else if (PyTuple_GET_SIZE(t) > 5) {  // the base of a tile
        run.row = number(t, 5);
        if (run.kind == TRITS) {
            check(t, 10);
            run.group = int(number(t, 6)), run.scale = pointer<const uint8_t>(t, 7), run.scale_head = number(t, 8);
            run.small = Kind(number(t, 9));
        }
        if (run.kind == TABLE) {
            check(t, 9);
            run.bits = int(number(t, 6)), run.group = int(number(t, 7));
            run.table = field_of(PyTuple_GET_ITEM(t, 8));
        }
    }
    return run;
}

Job job_of(PyObject *t, bool whole) {
    check(t, 9);
    Job job{int(number(t, 0)), int(number(t, 1)), int(number(t, 2)), int(number(t, 3)),
            float(PyFloat_AsDouble(PyTuple_GET_ITEM(t, 4))), float(PyFloat_AsDouble(PyTuple_GET_ITEM(t, 5))),
            pointer<float>(t, 6), pointer<float>(t, 7), {}};
    PyObject *segments = PyTuple_GET_ITEM(t, 8);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(segments); i++) {
        PyObject *s = PyList_GET_ITEM(segments, i);
        check(s, 6);
        Segment segment{number(s, 0), pointer<const float>(s, 1), number(s, 2), pointer<float>(s, 3), {}, {}};
        PyObject *keys = PyTuple_GET_ITEM(s, 4), *values = PyTuple_GET_ITEM(s, 5);
        for (Py_ssize_t j = 0; j < PyList_GET_SIZE(keys); j++) segment.keys.push_back(run_of(PyList_GET_ITEM(keys, j), whole));
        for (Py_ssize_t j = 0; j < PyList_GET_SIZE(values); j++)
            segment.values.push_back(run_of(PyList_GET_ITEM(values, j), whole));
        job.segments.push_back(std::move(segment));
    }
    return job;
}

Matrix matrix_of(PyObject *t) {
    check(t, 4);
    return {Kind(number(t, 0)), pointer<const uint8_t>(t, 1), number(t, 2), number(t, 3)};
}

Prefill prefill_of(PyObject *t) {
    check(t, 16);
    return {int(number(t, 0)), int(number(t, 1)), int(number(t, 2)), int(number(t, 3)), number(t, 4), number(t, 5), number(t, 6),
            number(t, 7) != 0, float(PyFloat_AsDouble(PyTuple_GET_ITEM(t, 8))), float(PyFloat_AsDouble(PyTuple_GET_ITEM(t, 9))),
            matrix_of(PyTuple_GET_ITEM(t, 10)), matrix_of(PyTuple_GET_ITEM(t, 11)), matrix_of(PyTuple_GET_ITEM(t, 12)),
            pointer<uint8_t>(t, 13), pointer<float>(t, 14), pointer<float>(t, 15)};
}

Encode encode_of(PyObject *t) {
    check(t, 11);
    return {int(number(t, 0)), int(number(t, 1)), int(number(t, 2)), int(number(t, 3)), number(t, 4), number(t, 5) != 0,
            Kind(number(t, 6)), matrix_of(PyTuple_GET_ITEM(t, 7)), pointer<uint8_t>(t, 8), pointer<uint8_t>(t, 9),
            pointer<uint8_t>(t, 10)};
}

}  // namespace

}  // namespace kvloom
