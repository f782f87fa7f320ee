# mypy: ignore-errors
"""Attention summed over query rows, slot by slot; nothing of the size of queries times slots is stored."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)


@triton.jit(do_not_specialize=["m", "n", "past"])
def mass(
    q, k, lse, out, logw, index, last, scale, softcap, g, m, n, past, q_head, q_row, k_head, k_row, logw_head,
    index_head, D: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, M: tl.constexpr, TYPE: tl.constexpr,
    WEIGHED: tl.constexpr, INDEXED: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """N slots of one query head, all rows, M at a time. Grid: blocks of slots, query heads.

    Row i sees the slots below past + i + 1, or with INDEXED those whose index is at most last[i]. Writes the sum of
    exp(logit - lse) over the rows to out [head, n], or with ROWS each row's log-sum-exp over these slots to
    out [head, m, block].
    """
    head = tl.program_id(1)
    kv = (head // g).to(tl.int64)
    slot = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.arange(0, WIDTH)
    keys = k + kv * k_head + slot.to(tl.int64)[:, None] * k_row + x[None, :]
    keys = tl.load(keys, (slot < n)[:, None] & (x < D)[None, :], other=0.0).to(TYPE)
    q += head.to(tl.int64) * q_head
    extra, place = tl.zeros([N], tl.float32), slot
    if WEIGHED:
        extra = tl.load(logw + kv * logw_head + slot, slot < n, other=0.0)
    start = 0
    if INDEXED:
        place = tl.load(index + kv * index_head + slot, slot < n, other=0)
    else:
        start = tl.maximum(tl.program_id(0) * N - past, 0) // M * M
    acc = tl.zeros([N, M], tl.float32)
    for first in range(start, m, M):
        row = first + tl.arange(0, M)
        queries = q + row.to(tl.int64)[None, :] * q_row + x[:, None]
        queries = tl.load(queries, (row < m)[None, :] & (x < D)[:, None], other=0.0).to(TYPE)
        s = tl.dot(keys, queries, input_precision="ieee") * scale
        if CAPPED:
            s = softcap - 2 * softcap / (1 + tl.exp(2 / softcap * s))
        if WEIGHED:
            s += extra[:, None]
        newest = past + row
        if INDEXED:
            newest = tl.load(last + row, row < m, other=0)
        seen = (place[:, None] <= newest[None, :]) & (slot < n)[:, None] & (row < m)[None, :]
        if ROWS:
            s = tl.where(seen, s, -float("inf"))
            top = tl.maximum(tl.max(s, 0), LOWEST)
            to = out + (head.to(tl.int64) * m + row) * tl.num_programs(0) + tl.program_id(0)
            tl.store(to, top + tl.log(tl.sum(tl.exp(s - top[None, :]), 0)), row < m)
        else:
            total = tl.load(lse + head.to(tl.int64) * m + row, row < m, other=0.0)
            acc += tl.where(seen, tl.exp(s - total[None, :]), 0.0)
    if not ROWS:
        tl.store(out + head.to(tl.int64) * n + slot, tl.sum(acc, 1), slot < n)
