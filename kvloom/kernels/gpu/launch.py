"""Encoding, attention summed over rows, and prefill on the GPU: shapes in, launches out."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvloom.kernels.gpu.decode import power, width_of

__all__ = ["column_mass", "encode_minmax", "prefill", "window_lse", "window_mass"]

TILE = 4096  # numbers that one program encodes


def encode_minmax(
    x: Tensor, bits: int, group: int | None, along: Literal["tokens", "channels"]
) -> tuple[Tensor, Tensor, Tensor]:
    """x [h, n, D] at any strides -> codes, scale, zero, bit for bit as `segments.minmax.MinMax` encodes them."""
    from kvloom.kernels.gpu import quantize as kernels

    h, n, dim = x.shape
    small = x.dtype if x.itemsize == 2 else torch.float16
    by_head, by_slot, by_channel = x.stride()
    if along == "tokens":
        assert group is not None
        outers, rows, row, strides = n // group, dim, group, (group * by_slot, by_channel, by_slot)
        codes = x.new_empty((h, outers, dim, group * bits // 8), dtype=torch.uint8)
    else:
        outers, rows, row, strides = 1, n, dim, (0, by_slot, by_channel)
        codes = x.new_empty((h, n, dim * bits // 8), dtype=torch.uint8)
    group = group or dim
    scale, zero = (
        x.new_empty((h, n // group, dim) if along == "tokens" else (h, n, dim // group), dtype=small) for _ in "sz"
    )
    if codes.numel():
        width = power(row)
        block = 1 if rows == 1 else max(1, TILE // width)
        with torch.cuda.device_of(x):
            kernels.encode[outers * -(-rows // block), h](
                x, codes, scale.view(torch.int16), zero.view(torch.int16), outers, rows, by_head, *strides, N=row,
                WIDTH=width, GROUP=group, BITS=bits, R=block, MOST=torch.finfo(small).max, BFLOAT=small == torch.bfloat16,
            )  # fmt: skip
    return codes, scale, zero


def column_mass(q: Tensor, k: Tensor, lse: Tensor, scale: float, softcap: float | None, past: int) -> Tensor:
    """Attention that each slot receives from all rows, summed: [h, g, n] fp32.

    q [h, g, m, D], k [h, n, D], lse [h, g, m] of the rows over all that they saw. Row i sees the slots below past + i + 1;
    `past` is negative where k begins behind the first row's place.
    """
    out = k.new_empty((*q.shape[:2], k.shape[1]), dtype=torch.float32)
    _mass(q, k, lse, out, scale, softcap, past, None, None, None)
    return out


def window_mass(
    q: Tensor, k: Tensor, lse: Tensor, index: Tensor, last: Tensor, scale: float, softcap: float | None,
    logw: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`column_mass` of rows [h, g, w, D] that see the slots whose index [h or 1, n] is at most last [w], both int32.

    logw [h or 1, n] is added to the logits.
    """
    out = k.new_empty((*q.shape[:2], k.shape[1]), dtype=torch.float32)
    _mass(q, k, lse, out, scale, softcap, 0, index, last, logw)
    return out


def window_lse(
    q: Tensor, k: Tensor, index: Tensor, last: Tensor, scale: float, softcap: float | None, logw: Tensor | None = None
) -> Tensor:
    """Log-sum-exp [h, g, w] fp32 of the logits that `window_mass` takes."""
    blocks = -(-k.shape[1] // _slots(q, k))
    out = k.new_empty((*q.shape[:3], blocks), dtype=torch.float32)
    _mass(q, k, None, out, scale, softcap, 0, index, last, logw)
    return out.logsumexp(-1)


def _slots(q: Tensor, k: Tensor) -> int:
    """Slots of one program of `mass`."""
    return 32 if _operand(q, k) == torch.float32 else 128


def _mass(
    q: Tensor, k: Tensor, lse: Tensor | None, out: Tensor, scale: float, softcap: float | None, past: int,
    index: Tensor | None, last: Tensor | None, logw: Tensor | None,
) -> None:  # fmt: skip
    from kvloom.kernels.gpu import mass as kernels
    from kvloom.kernels.gpu.split import TYPES

    h, g, m, dim = q.shape
    n = k.shape[1]
    if not out.numel() or not m:
        out.zero_()
        return
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    operand, slots = _operand(q, k), _slots(q, k)
    small = operand != torch.float32
    lse_, logw_, index_, last_ = (out if x is None else x.contiguous() for x in (lse, logw, index, last))
    with torch.cuda.device_of(q):
        kernels.mass[-(-n // slots), h * g](
            q, k, lse_, out, logw_, index_, last_, scale, softcap or 1.0, g, m, n, past, *q.stride()[:3], *k.stride()[:2],
            _by_head(logw), _by_head(index), D=dim, WIDTH=width_of(dim), N=slots, M=max(16, min(64 if small else 32, power(m))),
            TYPE=TYPES[operand], WEIGHED=logw is not None, INDEXED=index is not None, CAPPED=softcap is not None,
            ROWS=lse is None, num_warps=8, num_stages=1 if not small else 3 if dim <= 128 else 2,
        )  # fmt: skip


def prefill(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp. q [Hq, m, D], k [h, n, D], v [h, n, Dv], with Hq a multiple of h.

    `causal` aligns the first query with the first key. Returns out [Hq, m, Dv] in q's dtype and lse [Hq, m] in fp32.
    """
    from kvloom.kernels.gpu import flash as kernels
    from kvloom.kernels.gpu.split import TYPES

    heads, m, dim = q.shape
    h, n, value_dim = v.shape
    if n == 0 or m == 0:
        return q.new_zeros((heads, m, value_dim)), q.new_full((heads, m), -torch.inf, dtype=torch.float32)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = q.new_empty((heads, m, value_dim)), q.new_empty((heads, m), dtype=torch.float32)
    operand = _operand(q, k, v)
    wide = max(dim, value_dim) > 128
    block, slots, stages = (32, 32, 1) if operand == torch.float32 else (128, 32, 2) if wide else (128, 64, 3)
    with torch.cuda.device_of(q):
        kernels.prefill[-(-m // block), heads](
            q, k, v, out, lse, scale, softcap or 1.0, heads // h, m, n, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            D=dim, WIDTH=width_of(dim), DV=value_dim, VWIDTH=width_of(value_dim), M=block, N=slots, TYPE=TYPES[operand],
            CAUSAL=causal, CAPPED=softcap is not None, num_warps=8, num_stages=stages,
        )  # fmt: skip
    return out, lse


def _operand(*xs: Tensor) -> torch.dtype:
    """What matrices are multiplied in: 16-bit numbers as they are, where all are alike; the interpreter has no bfloat16."""
    dtype = xs[0].dtype
    alike = all(x.dtype == dtype for x in xs) and dtype.itemsize == 2
    return dtype if alike and (xs[0].is_cuda or dtype == torch.float16) else torch.float32


def _by_head(x: Tensor | None) -> int:
    """Stride from head to head of a column [h or 1, n] that is contiguous."""
    return 0 if x is None or x.shape[0] == 1 else x.shape[1]
