# mypy: ignore-errors
"""Min-max quantization and packing in one pass, to the bits that `segments.minmax` writes."""

import triton
import triton.language as tl

from kvloom.kernels.gpu import tiles

ROUND = tl.constexpr(12582912.0)  # 3 * 2**22: adding and subtracting it rounds to whole numbers, half to even


@triton.jit
def small(x, BFLOAT: tl.constexpr):
    """fp32 -> the bits of the nearest 16-bit float, and that in fp32. By hand, as not every bfloat16 cast rounds to even."""
    if BFLOAT:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.int16), (bits << 16).to(tl.float32, bitcast=True)
    else:
        half = x.to(tl.float16)
        return half.to(tl.int16, bitcast=True), half.to(tl.float32)


@triton.jit
def gather_planes(code, BITS: tl.constexpr):
    """Codes [a, b], plane after plane -> bytes [a, b * BITS / 8]."""
    planes: tl.constexpr = 8 // BITS
    shift = tl.arange(0, planes) * BITS
    code = tl.reshape(code, (code.shape[0], planes, code.shape[1] // planes))
    return tl.sum(code << shift[None, :, None], 1).to(tl.uint8)


@triton.jit(do_not_specialize=["outers", "rows"])
def encode(
    x, codes, scale, zero, outers, rows, by_head, by_outer, by_row, by_code, N: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, MOST: tl.constexpr, BFLOAT: tl.constexpr,
):  # fmt: skip
    """R rows of N numbers, each row packed by itself, in groups of GROUP: x at any strides -> codes, scales, minima (as bits).

    Grid: outers times blocks of rows, heads. Rows are numbered by head, outer and row.
    """
    blocks = (rows + R - 1) // R
    outer, row = tl.program_id(0) // blocks, tl.program_id(0) % blocks * R + tl.arange(0, R)
    outer, head = outer.to(tl.int64), tl.program_id(1).to(tl.int64)
    planes: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    c = tl.arange(0, WIDTH)
    which, there = tiles.rank(c, N, WIDTH, planes), tiles.real(c, N, WIDTH, planes)
    at = x + head * by_head + outer * by_outer + row.to(tl.int64)[:, None] * by_row + which[None, :] * by_code
    number = tl.load(at, (row < rows)[:, None] & there[None, :], other=0.0).to(tl.float32)
    line = (head * outers + outer) * rows + row
    low, step = tl.zeros([R, WIDTH], tl.float32), tl.full([R, WIDTH], 1.0, tl.float32)
    for g in range(N // GROUP):
        mine = (there & (which // GROUP == g))[None, :]
        least = tl.min(tl.where(mine, number, float("inf")), 1)
        most = tl.max(tl.where(mine, number, -float("inf")), 1)
        bits, z = small(tl.minimum(tl.maximum(least, -MOST), MOST), BFLOAT)
        tl.store(zero + line * (N // GROUP) + g, bits, row < rows)
        s = tl.div_rn(most - z, tl.full([R], 2**BITS - 1, tl.float32))
        bits, s = small(tl.minimum(tl.maximum(s, 0.0), MOST), BFLOAT)
        tl.store(scale + line * (N // GROUP) + g, bits, row < rows)
        low = tl.where(mine, z[:, None], low)
        step = tl.where(mine, tl.where(s == 0, 1.0, s)[:, None], step)
    code = tl.minimum(tl.maximum(tl.div_rn(number - low, step), 0.0), 2.0**BITS - 1)
    code = ((code + ROUND) - ROUND).to(tl.int32)
    to = codes + line[:, None] * (N * BITS // 8)
    if BITS == 8:
        tl.store(to + c[None, :], code.to(tl.uint8), (row < rows)[:, None] & there[None, :])
    elif BITS == 3:
        y = tl.arange(0, WIDTH // 4)
        put = (row < rows)[:, None] & tiles.real(y, N // 4, WIDTH // 4, 2)[None, :]
        tl.store(to + tiles.rank(y, N // 4, WIDTH // 4, 2)[None, :], gather_planes(code & 3, 2), put)
        y = tl.arange(0, WIDTH // 8)
        put = (row < rows)[:, None] & (y < N // 8)[None, :]
        tl.store(to + (N // 4 + y)[None, :], gather_planes(code >> 2, 1), put)
    else:
        y = tl.arange(0, WIDTH * BITS // 8)
        tl.store(to + y[None, :], gather_planes(code, BITS), (row < rows)[:, None] & (y < N * BITS // 8)[None, :])
