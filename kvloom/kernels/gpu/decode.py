"""Decode attention on the GPU: stretches become tables of addresses, splits of them programs, and one kernel merges.

Stretches whose planes are stored alike share a launch, of whichever sequence, group of heads and class they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvloom.kernels.gpu.runs import Packed, PartLike, Run, Stretch, cut
from kvloom.kernels.gpu.serving import ROWS

__all__ = ["Job", "attend", "job", "run"]

WIDEST = 128  # groups of more tokens than this are read code by code
PROGRAMS = 16  # per multiprocessor: enough that those which end last leave little idle
MAGIC = 0x43800000  # the bits of 256.0, see `tiles.OFFSET`; an argument, since one instruction can't hold two constants


@dataclass(eq=False)
class Job:
    """Attention of R query rows of each of h heads over all parts; `run` adds out [h, R, Dv] and lse [h, R], fp32."""

    heads: int
    rows: int
    dim: int
    value_dim: int
    parts: Sequence[PartLike]
    scale: float
    softcap: float | None
    out: Tensor = field(init=False)
    lse: Tensor = field(init=False)


class Stored(NamedTuple):
    """How one plane of a stretch is stored; `tiles.py` says what the kinds are.

    `span`: columns of a tile that share a scale, a power of two; `unit`: bytes read at a time.
    """

    kind: str
    dtype: torch.dtype
    bits: int = 8
    group: int = 0
    span: int = 1
    unit: int = 1


class Like(NamedTuple):
    """What stretches that share a launch have in common. `lead`: the plane whose groups of tokens give slots their places."""

    key: Stored
    value: Stored
    lead: Stored
    query: torch.dtype
    weighed: bool
    emit: bool


@dataclass
class Launch:
    """Stretches that share a launch: rows of its table, the job of each, and the places of each head of it.

    `near`: addresses and strides or-ed, of keys, their scales, values, and theirs: the lowest bit set is their alignment.
    """

    rows: list[list[int]] = field(default_factory=list)
    jobs: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    near: tuple[int, ...] = (16, 16, 16, 16)


FREE = Stored("dense", torch.uint8)  # leads where no plane does: every slot has a place of its own


def job(
    h: int, rows: int, dim: int, value_dim: int, parts: Sequence[PartLike], scale: float, softcap: float | None
) -> Job:
    """Attention of R query rows of each of h heads over all parts."""
    return Job(h, rows, dim, value_dim, parts, scale, softcap)


def attend(
    h: int, rows: int, dim: int, value_dim: int, parts: Sequence[PartLike], scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`job` and `run` in one: out [h, R, Dv] and log-sum-exp [h, R], fp32."""
    mine = job(h, rows, dim, value_dim, parts, scale, softcap)
    run([mine])
    return mine.out, mine.lse


def run(jobs: Sequence[Job]) -> None:
    """Computes jobs, of one sequence or of many: a launch for each way of storing keys and values, and one that merges."""
    alike: dict[tuple[Any, ...], list[Job]] = {}
    for each in jobs:
        alike.setdefault((each.rows, each.dim, each.value_dim, each.scale, each.softcap), []).append(each)
    for group in alike.values():
        _run(group)


def _run(jobs: list[Job]) -> None:
    """Jobs that differ only in their heads and parts."""
    launches: dict[Like, Launch] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for i, each in enumerate(jobs):
        for part in each.parts:
            for stretch in cut(part):
                device = stretch.key.tensors[0].device
                _file(launches, i, part, stretch, each.heads)
    heads, rows = [each.heads for each in jobs], jobs[0].rows
    out = torch.empty(sum(heads), rows, jobs[0].value_dim, device=device)
    lse = torch.empty(sum(heads), rows, device=device)
    with torch.cuda.device_of(out):
        _launch(launches, jobs, out, lse)
    outs, lses = out.split(heads), lse.split(heads)
    for i, each in enumerate(jobs):
        each.out, each.lse = outs[i], lses[i]


def _file(launches: dict[Like, Launch], i: int, part: PartLike, stretch: Stretch, heads: int) -> None:
    """Files a stretch of job i under the launch that takes its like."""
    q, logw, scores = stretch.key.q, part.logw, part.scores
    assert q is not None, "keys are described with their queries"
    key, keys, near_keys = _plane(stretch.key, stretch.key_at)
    value, values, near_values = _plane(stretch.value, stretch.value_at)
    lead, phase = (
        (key, keys[6]) if key.kind == "tokens" else (value, values[6]) if value.kind == "tokens" else (FREE, 0)
    )
    if key.kind == value.kind == "tokens" and (key.bits, key.group, keys[6]) != (value.bits, value.group, values[6]):
        value = value._replace(kind="gather", unit=1)
    launch = launches.setdefault(Like(key, value, lead, q.dtype, logw is not None, scores is not None), Launch())
    launch.near = tuple(a | b for a, b in zip(launch.near, near_keys + near_values, strict=True))
    row = [stretch.n, heads, 0, 0, 0, q.data_ptr(), 0, 0, 0, 0, phase, *keys, *values, 0]  # 2 to 4: see `_launch`
    if logw is not None:
        row[6:8] = _address(logw, stretch.start, 1), logw.stride(0) if logw.shape[0] > 1 else 0
    if scores is not None:
        row[8:10] = _address(scores, stretch.start, 2), scores.stride(1)
    launch.rows.append(row)
    launch.jobs.append(i)
    launch.places.append(-(-(phase + stretch.n) // lead.group) * lead.span if lead.group else stretch.n)


def _plane(run: Run, at: int) -> tuple[Stored, list[int], tuple[int, int]]:
    """A run from slot `at` on: how it is stored, its seven fields of the table, and what `Launch.near` takes."""
    row, phase = divmod(at, run.unit)
    fields = [0, 0, 0, 0, 0, 0, phase]
    for i, x in enumerate(run.tensors):
        fields[2 * i : 2 * i + 2] = _address(x, row, 1), x.stride(0) * x.itemsize if x.shape[0] > 1 else 0
    # also a row's bytes, so that alignment does not change as a run grows, and kernels with it
    steps = [x.stride(1) * x.itemsize for x in run.tensors]
    near = (fields[0] | fields[1] | steps[0], fields[2] | fields[3] | fields[4] | fields[5] | steps[-1])
    if not isinstance(run, Packed):
        return Stored("dense", run.x.dtype), fields, near
    codes = run.group if run.along == "tokens" else run.codes.shape[2] * 8 // run.bits
    size = codes // 8 if run.bits == 3 else codes * run.bits // 8  # bytes; 3 bits are two such planes and one more
    kind, span, unit = run.along, power(run.group), 1 if (size | near[0]) % 4 else 4
    if kind == "tokens" and span > WIDEST:
        kind, unit = "gather", 1
    elif kind == "channels" and width_of(codes) > codes:  # planes are padded, so groups begin anywhere in them
        span = min(size & -size, run.group & -run.group)
    return Stored(kind, run.scale.dtype, run.bits, run.group, span, unit), fields, near


def _address(x: Tensor, at: int, dim: int) -> int:
    """Where a tensor continues from `at` on in one dimension."""
    return x.data_ptr() + at * x.stride(dim) * x.itemsize


def _launch(launches: dict[Like, Launch], jobs: list[Job], out: Tensor, lse: Tensor) -> None:
    """Numbers the splits, sends the table and launches."""
    from kvloom.kernels.gpu import split as kernels  # Triton is imported where it is needed: that takes a while

    rows, dim, value_dim, softcap = jobs[0].rows, jobs[0].dim, jobs[0].value_dim, jobs[0].softcap
    blocks = -(-rows // ROWS)
    made = {
        like: _constants(like, dim, value_dim, rows, tuple(x & -x for x in launch.near), out.is_cuda)
        for like, launch in launches.items()
    }
    work = sum(jobs[i].heads * n * blocks for x in launches.values() for i, n in zip(x.jobs, x.places, strict=True))
    each = work // (PROGRAMS * _processors(out.device))  # places of one program
    splits = [0] * len(jobs)
    lengths = {}
    for like, launch in launches.items():
        n = made[like]["N"]
        lengths[like] = length = max(4, -(-each // n)) * n
        for row, i, places in zip(launch.rows, launch.jobs, launch.places, strict=True):
            row[4] = splits[i]
            splits[i] += -(-places // length)
    first, merges, done = 0, [], 0
    for job, n in zip(jobs, splits, strict=True):
        merges += [first, n, job.heads * rows, done]
        first, done = first + job.heads * rows * n, done + job.heads * rows
    table: list[int] = []
    for launch in launches.values():
        for row, i in zip(launch.rows, launch.jobs, strict=True):
            row[2:4] = merges[4 * i : 4 * i + 2]
            table += row
    # a copy from pinned memory does not wait for what the GPU still has to do
    numbers = torch.tensor(table + merges, dtype=torch.int64, pin_memory=out.is_cuda).to(out.device, non_blocking=True)
    alone = all(n == 1 for n in splits)  # then there is nothing to merge
    parts, partial = (out, lse) if alone else (out.new_empty(first, value_dim), lse.new_empty(first))
    at = 0
    for like, launch in launches.items():
        grid = (
            -(-max(launch.places) // lengths[like]),
            max(jobs[i].heads for i in launch.jobs) * blocks,
            len(launch.rows),
        )
        kernels.split[grid](
            numbers[at:], parts, partial, jobs[0].scale, softcap or 1.0, rows, MAGIC, lengths[like], CAPPED=softcap is not None,
            **made[like],
        )  # fmt: skip
        at += len(launch.rows) * len(launch.rows[0])
    if not alone:
        wide = min(32, power(value_dim))
        grid = (max(job.heads for job in jobs) * rows, len(jobs), -(-value_dim // wide))
        some = 16 if max(splits) <= 16 else 128
        kernels.merge[grid](numbers[at:], parts, partial, out, lse, DV=value_dim, WIDE=wide, N=some)


@lru_cache(1024)
def _constants(like: Like, dim: int, value_dim: int, rows: int, align: tuple[int, ...], cuda: bool) -> dict[str, Any]:
    """What `split` is compiled for."""
    from kvloom.kernels.gpu import split as kernels

    # 16-bit queries are multiplied as they are, with what is unpacked rounded alike; the interpreter knows no bfloat16
    stored = {each.dtype for each in (like.key, like.value) if each.kind == "dense"}
    small = like.query.itemsize == 2 and stored <= {like.query} and (cuda or like.query == torch.float16)
    operand = like.query if small else torch.float32
    n = max(64 if small and max(dim, value_dim) <= 128 else 32, like.lead.span)
    block = min(ROWS, max(8 if small else 2, power(rows)))
    exact = like.key.kind == like.value.kind == "dense"
    ahead = not exact and "gather" not in (like.key.kind, like.value.kind)  # which would take too many registers
    warps = 8 if n > 64 or block > 16 else 4
    out: dict[str, Any] = {
        "N": n, "R": block, "D": dim, "WIDTH": width_of(dim), "DV": value_dim, "VWIDTH": width_of(value_dim),
        "QUERY": kernels.TYPES[like.query], "TYPE": kernels.TYPES[operand], "GROUP": like.lead.group,
        "SPAN": like.lead.span, "BITS": like.lead.bits, "WEIGHED": like.weighed, "EMIT": like.emit, "AHEAD": ahead,
        "num_warps": warps, "num_stages": 1 if not exact else 3 if small else 2,
        # three programs of a multiprocessor's 65536 registers, or two of eight warps
        "maxnreg": (168 if warps == 4 else 128) if ahead and block <= 16 else None,
    }  # fmt: skip
    for name, plane, at in (("K", like.key, 0), ("V", like.value, 2)):
        out |= {
            f"{name}KIND": plane.kind, f"{name}STORED": kernels.TYPES[plane.dtype], f"{name}BITS": plane.bits,
            f"{name}GROUP": plane.group, f"{name}SPAN": plane.span, f"{name}UNIT": plane.unit,
            f"{name}ALIGN": align[at], f"{name}SALIGN": align[at + 1],
        }  # fmt: skip
    return out


def width_of(dim: int) -> int:
    """Columns of a tile of so many channels."""
    return max(16, power(dim))


def power(n: int) -> int:
    return 1 << (n - 1).bit_length()


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
