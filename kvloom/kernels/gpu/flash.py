# mypy: ignore-errors
"""Attention of many rows over dense keys and values, block by block."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def sweep(
    q, k, v, acc, top, total, row, start, stop, n, k_row, v_row, scale, softcap, D: tl.constexpr, WIDTH: tl.constexpr,
    DV: tl.constexpr, VWIDTH: tl.constexpr, N: tl.constexpr, TYPE: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Folds the keys from start to stop into acc, top (base 2) and total; EDGE: some of them may be hidden from some rows."""
    x, y = tl.arange(0, WIDTH), tl.arange(0, VWIDTH)
    for first in range(start, stop, N):
        slot = first + tl.arange(0, N)
        at = slot.to(tl.int64)
        keys = tl.load(k + at[None, :] * k_row + x[:, None], (slot < n)[None, :] & (x < D)[:, None], other=0.0)
        s = tl.dot(q, keys.to(TYPE), input_precision="ieee")
        if CAPPED:
            s = (softcap - 2 * softcap / (1 + tl.exp(2 / softcap * scale * s))) * LOG2E
        else:
            s *= scale * LOG2E
        if EDGE:
            seen = (slot < n)[None, :]
            if CAUSAL:
                seen &= slot[None, :] <= row[:, None]
            s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(p, 1)
        values = tl.load(v + at[:, None] * v_row + y[None, :], (slot < n)[:, None] & (y < DV)[None, :], other=0.0)
        acc = tl.dot(p.to(TYPE), values.to(TYPE), acc * fade[:, None], input_precision="ieee")
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["m", "n"])
def prefill(
    q, k, v, out, lse, scale, softcap, g, m, n, q_head, q_row, k_head, k_row, v_head, v_row, D: tl.constexpr,
    WIDTH: tl.constexpr, DV: tl.constexpr, VWIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TYPE: tl.constexpr,
    CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """M rows of one query head -> out [head, m, DV] and lse [head, m]. Grid: blocks of rows, query heads; g of them share k."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys begin
    head = tl.program_id(1).to(tl.int64)
    row = block * M + tl.arange(0, M)
    x, y = tl.arange(0, WIDTH), tl.arange(0, VWIDTH)
    at = q + head * q_head + row.to(tl.int64)[:, None] * q_row + x[None, :]
    rows = tl.load(at, (row < m)[:, None] & (x < D)[None, :], other=0.0).to(TYPE)
    k += head // g * k_head
    v += head // g * v_head
    plain, stop = n // N * N, n  # before `plain` every row sees every key
    if CAUSAL:
        plain, stop = min(plain, (block * M + 1) // N * N), min(n, (block + 1) * M)
    acc = tl.zeros([M, VWIDTH], tl.float32)
    top, total = tl.full([M], LOWEST, tl.float32), tl.zeros([M], tl.float32)
    acc, top, total = sweep(
        rows, k, v, acc, top, total, row, 0, plain, n, k_row, v_row, scale, softcap, D, WIDTH, DV, VWIDTH, N, TYPE, False,
        CAUSAL, CAPPED,
    )  # fmt: skip
    acc, top, total = sweep(
        rows, k, v, acc, top, total, row, plain, stop, n, k_row, v_row, scale, softcap, D, WIDTH, DV, VWIDTH, N, TYPE, True,
        CAUSAL, CAPPED,
    )  # fmt: skip
    line = head * m + row
    tl.store(lse + line, top * LN2 + tl.log(total), row < m)
    acc /= tl.maximum(total, 1e-37)[:, None]
    tl.store(out + line[:, None] * DV + y[None, :], acc, (row < m)[:, None] & (y < DV)[None, :])
