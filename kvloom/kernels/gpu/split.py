# mypy: ignore-errors
"""Decode attention: one program takes a stretch of slots of one head, and partial results are merged by log-sum-exp."""

import torch
import triton
import triton.language as tl

from kvloom.kernels.gpu import tiles

# Numbers per stretch in the table that `split` reads: slots, heads, first part, parts per row, first split; address of
# queries; of log-weights, their head stride; of logits, their row stride; slots before the first in its group; then for keys
# and for values: addresses and head strides in bytes of codes, scales and minima, slots before the first in its group; 0
FIELDS = tl.constexpr(26)
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
LOWEST = tl.constexpr(-3.0e38)  # the running maximum before any slot: finite, so that hidden slots give 0 and not NaN


@triton.jit
def head_of(stretch, AT: tl.constexpr, head, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Where a head's part of a tensor begins: field AT is the tensor's address, the next its head stride in bytes."""
    address = tl.load(stretch + AT) + head * tl.load(stretch + AT + 1)
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), ALIGN)


@triton.jit
def placed(first, n, phase, GROUP: tl.constexpr, SPAN: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr):
    """The slots that have the N places from `first` on, and which of them are there."""
    t = first + tl.arange(0, N)
    if GROUP:
        planes: tl.constexpr = 8 if BITS == 3 else 8 // BITS
        ok = tiles.real(t % SPAN, GROUP, SPAN, planes)
        t = t // SPAN * GROUP + tiles.rank(t % SPAN, GROUP, SPAN, planes) - phase
        return t, ok & (t >= 0) & (t < n)
    else:
        return t, t < n


@triton.jit
def split(
    table, out, lse, scale, softcap, rows, magic, length, N: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, DV: tl.constexpr, VWIDTH: tl.constexpr, QUERY: tl.constexpr, TYPE: tl.constexpr,
    KKIND: tl.constexpr, KSTORED: tl.constexpr, KBITS: tl.constexpr, KGROUP: tl.constexpr, KSPAN: tl.constexpr,
    KUNIT: tl.constexpr, KALIGN: tl.constexpr, KSALIGN: tl.constexpr, VKIND: tl.constexpr, VSTORED: tl.constexpr,
    VBITS: tl.constexpr, VGROUP: tl.constexpr, VSPAN: tl.constexpr, VUNIT: tl.constexpr, VALIGN: tl.constexpr,
    VSALIGN: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, BITS: tl.constexpr, WEIGHED: tl.constexpr,
    EMIT: tl.constexpr, CAPPED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One split of `length` places of one stretch and head: out [part, DV] and lse [part], N slots at a time.

    Grid: splits, heads times blocks of R rows, stretches. GROUP, SPAN, BITS: of the plane whose padded groups of tokens
    give the slots their places; GROUP 0: slots have their own. AHEAD: loads of the next N slots are under way while these
    are computed; without it, the compiler's own pipeline copies them to shared memory.
    """
    stretch = table + tl.program_id(2) * FIELDS
    blocks = (rows + R - 1) // R
    head = tl.program_id(1) // blocks
    row = tl.program_id(1) % blocks * R + tl.arange(0, R)
    n, phase = tl.load(stretch).to(tl.int32), tl.load(stretch + 10).to(tl.int32)
    places = n
    if GROUP:
        places = (phase + n + GROUP - 1) // GROUP * SPAN
    start = tl.program_id(0) * length
    stop = min(start + length, places)
    if (head >= tl.load(stretch + 1)) | (start >= places):
        return
    # packed codes put a row's channels into other columns; queries and results are read and written to match
    kplanes: tl.constexpr = (8 if KBITS == 3 else 8 // KBITS) if KKIND == "channels" else 1
    vplanes: tl.constexpr = (8 if VBITS == 3 else 8 // VBITS) if VKIND == "channels" else 1
    x = tl.arange(0, WIDTH)
    at = row[None, :] * D + tiles.rank(x, D, WIDTH, kplanes)[:, None]
    q = tl.load(stretch + 5).to(tl.pointer_type(QUERY)) + head * rows * D + at
    q = tl.load(q, (row < rows)[None, :] & tiles.real(x, D, WIDTH, kplanes)[:, None], other=0.0).to(TYPE)
    wide = tl.load(stretch + 9)
    logw = tl.load(stretch + 6).to(tl.pointer_type(tl.float32)) + head * tl.load(stretch + 7)
    scores = tl.load(stretch + 8).to(tl.pointer_type(tl.float32)) + head * rows * wide
    kword: tl.constexpr = KSTORED if KKIND == "dense" else (tl.uint32 if KUNIT == 4 else tl.uint8)
    vword: tl.constexpr = VSTORED if VKIND == "dense" else (tl.uint32 if VUNIT == 4 else tl.uint8)
    kbase, vbase = head_of(stretch, 11, head, kword, KALIGN), head_of(stretch, 18, head, vword, VALIGN)
    kscale, vscale = head_of(stretch, 13, head, KSTORED, KSALIGN), head_of(stretch, 20, head, VSTORED, VSALIGN)
    kzero, vzero = head_of(stretch, 15, head, KSTORED, KSALIGN), head_of(stretch, 22, head, VSTORED, VSALIGN)
    kphase, vphase = tl.load(stretch + 17).to(tl.int32), tl.load(stretch + 24).to(tl.int32)
    top = tl.full([R], LOWEST, tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([VWIDTH, R], tl.float32)
    if AHEAD:
        t, ok = placed(start, n, phase, GROUP, SPAN, BITS, N)
        k0, k1, k2, k3 = tiles.fetch(
            kbase, kscale, kzero, kphase, t, ok, start, stop, KKIND, KBITS, KGROUP, KSPAN, KUNIT, N, D, WIDTH, False
        )
        v0, v1, v2, v3 = tiles.fetch(
            vbase, vscale, vzero, vphase, t, ok, start, stop, VKIND, VBITS, VGROUP, VSPAN, VUNIT, N, DV, VWIDTH, True
        )
    for first in range(start, stop, N):
        t, ok = placed(first, n, phase, GROUP, SPAN, BITS, N)
        later, u, there = first, t, ok
        if AHEAD:
            later = first + N
            u, there = placed(later, n, phase, GROUP, SPAN, BITS, N)
            there &= later < stop
        a0, a1, a2, a3 = tiles.fetch(
            kbase, kscale, kzero, kphase, u, there, later, stop, KKIND, KBITS, KGROUP, KSPAN, KUNIT, N, D, WIDTH, False
        )
        b0, b1, b2, b3 = tiles.fetch(
            vbase, vscale, vzero, vphase, u, there, later, stop, VKIND, VBITS, VGROUP, VSPAN, VUNIT, N, DV, VWIDTH, True
        )
        if not AHEAD:
            k0, k1, k2, k3, v0, v1, v2, v3 = a0, a1, a2, a3, b0, b1, b2, b3
        k = tiles.read(k0, k1, k2, k3, magic, KKIND, KBITS, KGROUP, KSPAN, KUNIT, N, D, WIDTH, TYPE, False)
        s = tl.dot(k, q, input_precision="ieee") * scale
        if CAPPED:
            s = softcap - 2 * softcap / (1 + tl.exp(2 / softcap * s))  # a tanh that no backend lacks
        if WEIGHED:
            s += tl.load(logw + t, ok, other=0.0)[:, None]
        if EMIT:
            tl.store(scores + row[None, :] * wide + t[:, None], s, (row < rows)[None, :] & ok[:, None])
        s = tl.where(ok[:, None], s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 0))
        p = tl.exp(s - higher[None, :])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(p, 0)
        v = tiles.read(v0, v1, v2, v3, magic, VKIND, VBITS, VGROUP, VSPAN, VUNIT, N, DV, VWIDTH, TYPE, True)
        acc = tl.dot(v, p.to(TYPE), acc * fade[None, :], input_precision="ieee")
        top = higher
        if AHEAD:
            k0, k1, k2, k3, v0, v1, v2, v3 = a0, a1, a2, a3, b0, b1, b2, b3
    part = tl.load(stretch + 2) + (head * rows + row) * tl.load(stretch + 3) + tl.load(stretch + 4) + tl.program_id(0)
    tl.store(lse + part, top + tl.log(total), row < rows)
    x = tl.arange(0, VWIDTH)
    at = part[None, :] * DV + tiles.rank(x, DV, VWIDTH, vplanes)[:, None]
    put = (row < rows)[None, :] & tiles.real(x, DV, VWIDTH, vplanes)[:, None]
    tl.store(out + at, acc / tl.maximum(total, 1e-37)[None, :], put)


@triton.jit
def merge(table, parts, partial, out, lse, DV: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr):
    """WIDE channels of one row of one job: partial results parts [part, DV] and partial [part] -> out [DV] and lse.

    Grid: rows, jobs, blocks of channels. A job is four numbers of the table: its first part, parts per row, rows, and its
    first row of out.
    """
    job, row = table + tl.program_id(1) * 4, tl.program_id(0)
    if row >= tl.load(job + 2):
        return
    splits = tl.load(job + 1).to(tl.int32)
    first = tl.load(job) + row * splits
    x = tl.program_id(2) * WIDE + tl.arange(0, WIDE)
    top = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([WIDE], tl.float32)
    for at in range(0, splits, N):
        i = at + tl.arange(0, N)
        there = i < splits
        some = tl.load(partial + first + i, there, other=-float("inf"))
        found = tl.load(parts + (first + i)[:, None] * DV + x[None, :], there[:, None] & (x < DV)[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(some, 0))
        fade, weight = tl.exp(top - higher), tl.exp(some - higher)
        acc = acc * fade + tl.sum(weight[:, None] * found, 0)
        total = total * fade + tl.sum(weight, 0)
        top = higher
    row += tl.load(job + 3)
    tl.store(lse + row + tl.arange(0, 1), top + tl.log(total))
    tl.store(out + row * DV + x, acc / tl.maximum(total, 1e-37), x < DV)
