"""The compiled kernels: decode attention over whatever a group of heads holds, in one call.

Without the compiled part, or with KVLOOM_KERNELS=torch, `reference` does the same. KVLOOM_ISA picks an instruction set
("portable", "avx2", "avx512", "avx512vnni", "avx512bf16"); without it, the best that the machine has. Packed codes of few bits are
multiplied in whole numbers, by queries and weights rounded to 8 bits, where that is faster; KVLOOM_DOT=float forbids it,
KVLOOM_DOT=int8 does so for 4 bits too.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvloom.kernels import lower
from kvloom.kernels.tile import Term

__all__ = [
    "DOT", "ISA", "ROWS", "WHOLE_BITS", "Job", "Part", "decode", "dense", "encode", "fits", "job", "observe", "packed", "prefill", "queries", "run",
    "serves", "standing", "tile",
]  # fmt: skip


def _load() -> Any:
    try:
        return import_module("kvloom.kernels._native")
    except ImportError:  # installed where there was no compiler
        return None


_native = _load()
_asked = os.environ.get("KVLOOM_KERNELS")
ISA: str | None = None if _native is None or _asked in ("torch", "triton") else _native.isa
WHY = "the best that this machine has"
if ISA is None:
    WHY = f"KVLOOM_KERNELS={_asked}"
elif os.environ.get("KVLOOM_ISA"):
    WHY = f"KVLOOM_ISA={os.environ['KVLOOM_ISA']}"
if _native is None:
    WHY = "installed without a working C++17 compiler"
    logging.getLogger("kvloom").warning(
        "kvloom was installed without compiled kernels: results are the same, decoding is slower. "
        "Install a C++17 compiler, then kvloom again; `kvloom doctor` shows what runs."
    )
# What packed codes are multiplied by, "int8" or "float", and up to how many bits: at 4, rounding takes what is gained.
DOT = "int8" if ISA and _native.whole and os.environ.get("KVLOOM_DOT") != "float" else "float"
WHOLE_BITS = 4 if os.environ.get("KVLOOM_DOT") == "int8" else 3
ROWS = 64  # query rows of a KV head that one call takes; a fused kernel of torch is better at more
_KIND = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FEW_ROWS = 16  # a tile is decoded once for four rows: with more than these, decoding a run once for all is faster
Described = tuple[Any, ...]  # a run as `native/module.cpp` reads it: kind, slots, addresses, strides in bytes


@dataclass
class Part:
    """One class of slots: descriptions of its runs of keys and of values, by the kernels that are to read it.

    logw [h or 1, n] fp32 is added to the logits; scores [h, R, n] fp32 takes them. `kept`: tensors that the descriptions
    point into and nobody else holds.
    """

    n: int
    keys: list[Any] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    logw: Tensor | None = None
    scores: Tensor | None = None
    kept: list[Tensor] = field(default_factory=list)


def serves(q: Tensor, value_dim: int) -> bool:
    """Whether the compiled kernels take queries [..., D] like these, for values of that many channels."""
    return (
        ISA is not None
        and q.device.type == "cpu"
        and q.dtype in _KIND
        and q.shape[-1] % 8 == value_dim % 8 == 0
        and max(q.shape[-1], value_dim) <= _native.max_dim
        and not (q.requires_grad and torch.is_grad_enabled())
    )


def queries(q: Tensor) -> Tensor:
    """Queries as `dense` and `packed` take them."""
    return q.float().contiguous()


def dense(x: Tensor, q: Tensor | None = None) -> Described | None:
    """Describes a dense run x [h, n, D]; q [h, R, D] fp32, contiguous: its queries, if it holds keys."""
    h, n, dim = x.shape
    if x.dtype not in _KIND or x.stride(2) != 1 or (n > 1 and x.stride(1) != dim):
        return None
    return _KIND[x.dtype], n, x.data_ptr(), x.stride(0) * x.itemsize, 0 if q is None else q.data_ptr()


def packed(
    along: str, bits: int, group: int, codes: Tensor, scale: Tensor, zero: Tensor, q: Tensor | None = None
) -> Described | None:
    """Describes a run of packed codes and its scales and zeros, laid out as in `segments.minmax`."""
    if scale.dtype not in _KIND or any(not x[0].is_contiguous() for x in (codes, scale, zero)):
        return None
    tokens = along == "tokens"
    heads = [0 if len(x) == 1 else x.stride(0) * x.itemsize for x in (codes, scale, zero)]  # 0: they share it
    return (
        3 if tokens else 4, codes.shape[1] * (group if tokens else 1), codes.data_ptr(), heads[0],
        0 if q is None else q.data_ptr(), bits, group, scale.data_ptr(), heads[1],
        zero.data_ptr(), heads[2], _KIND[scale.dtype], DOT == "int8" and bits <= WHOLE_BITS,
    )  # fmt: skip


def tile(n: int, terms: list[Term], kept: list[Tensor]) -> Described | None:
    """Describes a run of n slots that is the sum of terms; None where the kernels can't read it."""
    if getattr(_native, "version", 0) < 2 or any(x.q is not None and x.q.shape[1] > FEW_ROWS for x in terms):
        return None
    try:
        found = tuple(lower.described(term, n, packed, kept) for term in terms)
    except lower.Unread:
        return None
    return found[0] if len(found) == 1 else (lower.SUM, n, found)


@dataclass
class Job:
    """Attention of some heads that is described but not yet computed: out [h, R, Dv] and log-sum-exp [h, R], fp32."""

    described: tuple[object, ...]
    out: Tensor
    lse: Tensor
    parts: list[Part]  # whose tensors the description points into


def job(h: int, rows: int, dim: int, value_dim: int, parts: list[Part], scale: float, softcap: float | None) -> Job:
    """Attention of R query rows of each of h heads over all parts."""
    out, lse = torch.empty(h, rows, value_dim), torch.empty(h, rows)
    segments = []
    for part in parts:
        for run in (*part.keys, *part.values):
            for term in run[2] if run[0] == lower.SUM else (run,):
                if term[0] == lower.TILE and term[8] not in (1, h):
                    raise ValueError(f"a run of {term[8]} heads, asked for {h}")
        logw = (0, 0)
        if part.logw is not None:
            logw = (part.logw.data_ptr(), part.logw.stride(0) if part.logw.shape[0] > 1 else 0)
        segments.append((part.n, *logw, 0 if part.scores is None else part.scores.data_ptr(), part.keys, part.values))
    described = (h, rows, dim, value_dim, scale, softcap or 0.0, out.data_ptr(), lse.data_ptr(), segments)
    return Job(described, out, lse, parts)


def run(jobs: list[Job]) -> None:
    """Computes jobs, of one sequence or of many, in one call.

    Splits of 512 slots are shared out to as many threads as torch uses; the result is the same bits for any number, and
    for any other jobs beside it.
    """
    _native.attend([each.described for each in jobs], torch.get_num_threads())


def standing(job: Job, room: int, keep: int = -1) -> Any:
    """A job of one segment that will be fed by `decode`, at most `room` slots; None where it can't be.

    keep: newest values that stay exact; each older one is encoded into the packed run before them. -1: all stay.

    Its runs are numbers or packed codes that queries meet as they are, the last of each plane numbers with room behind them.
    """
    if _native is None or not hasattr(_native, "Standing") or len(job.described[8]) != 1:  # type: ignore[arg-type]
        return None
    part = job.parts[0]
    plain = all(run[0] <= 4 and run[4] in (0, part.kept[0].data_ptr()) for run in (*part.keys, *part.values))
    if not plain or part.logw is not None or part.scores is not None or max(part.keys[-1][0], part.values[-1][0]) > 2:
        return None
    if keep >= 0 and (len(part.values) < 2 or part.values[-2][0] != 4):
        return None
    return _native.Standing(job.described, 0, room, keep)


def decode(
    jobs: list[Any], rows: list[int], q: Tensor, k: Tensor, v: Tensor, out: Tensor, sinks: Tensor | None
) -> None:
    """Adds slot `rows[i]` of k [H, n, D] and v [H, n, Dv] to the i-th standing job, and attends to it with that row of q.

    q [Hq, n, D] fp32; out [n, Hq, Dv] fp32 takes the result; sinks [Hq] fp32: logits without a value. All contiguous in the last dimension,
    q and out throughout.
    """
    fresh = (
        q.data_ptr(), q.shape[1], k.data_ptr(), k.stride(0) * k.itemsize, k.stride(1) * k.itemsize, v.data_ptr(),
        v.stride(0) * v.itemsize, v.stride(1) * v.itemsize, out.data_ptr(), 0 if sinks is None else sinks.data_ptr(),
    )  # fmt: skip
    _native.decode(jobs, rows, fresh, torch.get_num_threads())


def _matrix(x: Tensor) -> tuple[int, int, int, int]:
    """x [h, n, D] with contiguous rows, for `many_rows`."""
    return _KIND[x.dtype], x.data_ptr(), x.stride(0) * x.itemsize, x.stride(1) * x.itemsize


def fits(q: Tensor, *others: Tensor) -> bool:
    """Whether `prefill` and `observe` take queries, keys and values like these: one dtype, contiguous rows."""
    graph = torch.is_grad_enabled()
    return serves(q, others[-1].shape[-1]) and all(
        x.dtype == q.dtype and x.stride(-1) == 1 and not (graph and x.requires_grad) for x in (q, *others)
    )


def prefill(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.dense` without a bias: out [Hq, m, Dv] in q's dtype and lse [Hq, m] in fp32.

    Keys are gone over in blocks, with one softmax as they come; the result is the same bits for any number of threads.
    """
    (heads, m, dim), (h, n, value_dim) = q.shape, v.shape
    out, lse = q.new_empty(heads, m, value_dim), torch.empty(heads, m)
    _native.many_rows(
        (h, heads // h, dim, value_dim, m, n, 0, causal, scale, softcap or 0.0, _matrix(q), _matrix(k), _matrix(v),
         out.data_ptr(), lse.data_ptr(), 0),
        False, torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def observe(q: Tensor, k: Tensor, lse: Tensor, scale: float, past: int, softcap: float | None = None) -> Tensor:
    """Attention that every slot receives from all rows, summed: [Hq, n] fp32.

    q [Hq, m, D], k [h, n, D], lse [Hq, m] fp32. Row i sees the slots up to `past` + i.
    """
    (heads, m, dim), (h, n, _) = q.shape, k.shape
    mass, lse = torch.empty(heads, n), lse.contiguous()
    _native.many_rows(
        (h, heads // h, dim, dim, m, n, past, True, scale, softcap or 0.0, _matrix(q), _matrix(k), _matrix(k),
         0, lse.data_ptr(), mass.data_ptr()),
        True, torch.get_num_threads(),
    )  # fmt: skip
    return mass


def encode(x: Tensor, along: str, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Packed codes, scales and minima of x [h, n, D], as `segments.minmax` defines them; None where x is not served."""
    h, n, dim = x.shape
    kind = _KIND.get(x.dtype)
    if ISA is None or kind is None or x.device.type != "cpu" or x.stride(2) != 1 or dim % 8 or not h * n * dim:
        return None
    if max(dim, group) > _native.max_dim:
        return None
    small = x.dtype if x.dtype.itemsize == 2 else torch.float16
    shape = (h, n // group, dim) if along == "tokens" else (h, n, dim // group)
    codes = torch.empty(
        (h, n // group, dim, group * bits // 8) if along == "tokens" else (h, n, dim * bits // 8), dtype=torch.uint8
    )
    scale, zero = torch.empty(shape, dtype=small), torch.empty(shape, dtype=small)
    _native.encode(
        (h, dim, bits, group, n, along == "tokens", _KIND[small], _matrix(x), codes.data_ptr(), scale.data_ptr(),
         zero.data_ptr()),
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, scale, zero
