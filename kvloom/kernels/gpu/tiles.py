# mypy: ignore-errors
"""Tiles of stored keys or values, read where they lie and unpacked in registers.

A plane is "dense"; packed in groups of "channels" of one token; packed in groups of "tokens" of one channel, read group by
group; or the latter read code by code ("gather"), where its groups do not fit the tile's places.
"""

import triton
import triton.language as tl

OFFSET = tl.constexpr(
    256.0
)  # codes are put into this number's mantissa, whose bit 15 counts as one: no slow conversion


@triton.jit
def rank(x, N: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """Which of a row's N numbers stands in column x of a tile WIDTH wide that holds each plane of packed codes padded."""
    each: tl.constexpr = N // PLANES
    padded: tl.constexpr = WIDTH // PLANES
    if each == padded:
        return x
    else:
        return x // padded * each + x % padded


@triton.jit
def real(x, N: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """Whether column x of such a tile holds one of the row's numbers."""
    return x % (WIDTH // PLANES) < N // PLANES


@triton.jit
def spread(x, BITS: tl.constexpr, UNIT: tl.constexpr, TO: tl.constexpr):
    """Words [a, m] of UNIT bytes -> codes [a, m * UNIT * 8 / BITS], plane after plane, each at bit TO of an int32."""
    planes: tl.constexpr = 8 // BITS
    plane = (tl.arange(0, planes) * BITS)[None, :, None, None]
    byte = (tl.arange(0, UNIT) * 8)[None, None, None, :]
    right = plane + byte - TO
    x = tl.reshape(x.to(tl.int32), (x.shape[0], 1, x.shape[1], 1))
    x = (x << tl.maximum(-right, 0)) >> tl.maximum(right, 0)
    return tl.reshape(x & ((2**BITS - 1) << TO), (x.shape[0], planes * x.shape[2] * UNIT))


@triton.jit
def words(row, ok, N: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr, UNIT: tl.constexpr):
    """Rows of N bytes that begin at row [a] -> words [a, WIDTH / UNIT], each of PLANES parts padded; 0 where not ok [a]."""
    x = tl.arange(0, WIDTH // UNIT)
    at = rank(x, N // UNIT, WIDTH // UNIT, PLANES)
    ok = ok[:, None] & real(x, N // UNIT, WIDTH // UNIT, PLANES)[None, :]
    return tl.load(row[:, None] + at[None, :], ok, other=0)


@triton.jit
def rows(row, ok, N: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr):
    """Packed rows of N codes that begin at row [a] -> their words, and for 3 bits those of the high bits."""
    if BITS == 3:
        low = words(row, ok, N // 4, WIDTH // 4, 2, UNIT)
        return low, words(row + N // 4 // UNIT, ok, N // 8, WIDTH // 8, 1, UNIT)
    else:
        return words(row, ok, N * BITS // 8, WIDTH * BITS // 8, 1, UNIT), 0


@triton.jit
def numbers(low, high, magic, BITS: tl.constexpr, UNIT: tl.constexpr):
    """Words as `rows` gives them -> codes + OFFSET, fp32 [a, WIDTH], columns as `rank` says."""
    if BITS == 3:
        code = spread(low, 2, UNIT, 15) | spread(high, 1, UNIT, 17)
    else:
        code = spread(low, BITS, UNIT, 15)
    return (code | magic).to(tl.float32, bitcast=True)


@triton.jit
def fetch(
    base, scale, zero, phase, t, ok, first, stop, KIND: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SPAN: tl.constexpr, UNIT: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    """What is stored of the slots t [N]: numbers or words, words of high bits, scales, minima."""
    x = tl.arange(0, WIDTH)
    if KIND == "dense":
        if TURN:
            return tl.load(base + t[None, :] * D + x[:, None], ok[None, :] & (x < D)[:, None], other=0.0), 0, 0, 0
        else:
            return tl.load(base + t[:, None] * D + x[None, :], ok[:, None] & (x < D)[None, :], other=0.0), 0, 0, 0
    elif KIND == "tokens":
        x = tl.arange(0, N // SPAN * WIDTH)
        g, d = first // SPAN + x % (N // SPAN), x // (N // SPAN)
        ok = (g < (stop + SPAN - 1) // SPAN) & (d < D)
        row = g * D + d
        low, high = rows(base + row * (GROUP * BITS // 8 // UNIT), ok, GROUP, SPAN, BITS, UNIT)
        return low, high, tl.load(scale + row, ok, other=0.0), tl.load(zero + row, ok, other=0.0)
    elif KIND == "channels":
        low, high = rows(base + t * (D * BITS // 8 // UNIT), ok, D, WIDTH, BITS, UNIT)
        planes: tl.constexpr = 8 if BITS == 3 else 8 // BITS
        y = tl.arange(0, WIDTH // SPAN) * SPAN
        at = t[:, None] * (D // GROUP) + (rank(y, D, WIDTH, planes) // GROUP)[None, :]
        ok = ok[:, None] & real(y, D, WIDTH, planes)[None, :]
        return low, high, tl.load(scale + at, ok, other=0.0), tl.load(zero + at, ok, other=0.0)
    else:
        ok = ok[:, None] & (x < D)[None, :]
        t += phase
        row = (t // GROUP)[:, None] * D + x[None, :]
        low, high = one(base + row * (GROUP * BITS // 8), t % GROUP, ok, GROUP, BITS)
        return low, high, tl.load(scale + row, ok, other=0.0), tl.load(zero + row, ok, other=0.0)


@triton.jit
def one(at, t, ok, N: tl.constexpr, BITS: tl.constexpr):
    """Code t [a] of packed rows of N codes that begin at `at` [a, b]: the code, or its low and its high bits."""
    if BITS == 3:
        low = tl.load(at + (t % (N // 4))[:, None], ok, other=0).to(tl.int32) >> (t // (N // 4) * 2)[:, None]
        high = tl.load(at + (N // 4 + t % (N // 8))[:, None], ok, other=0).to(tl.int32) >> (t // (N // 8))[:, None]
        return low & 3, high & 1
    else:
        each: tl.constexpr = N * BITS // 8
        code = tl.load(at + (t % each)[:, None], ok, other=0).to(tl.int32) >> (t // each * BITS)[:, None]
        return code & (2**BITS - 1), 0


@triton.jit
def read(
    low, high, s, z, magic, KIND: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    UNIT: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """What `fetch` gave -> keys or values, TYPE [N, WIDTH], or [WIDTH, N] if TURN."""
    if KIND == "dense":
        return low.to(TYPE)
    else:
        if KIND == "gather":
            found = (low + high * 4).to(tl.float32) * s.to(tl.float32) + z.to(tl.float32)
        else:
            found, s = numbers(low, high, magic, BITS, UNIT), s.to(tl.float32)
            z = z.to(tl.float32) - s * OFFSET
            if KIND == "tokens":
                s, z = s[:, None], z[:, None]
            else:
                found, s, z = tl.reshape(found, (N, WIDTH // SPAN, SPAN)), s[:, :, None], z[:, :, None]
            found = found * s + z
        if KIND == "tokens":
            found = tl.reshape(found.to(TYPE), (WIDTH, N))
            return found if TURN else tl.trans(found)
        else:
            found = tl.reshape(found.to(TYPE), (N, WIDTH))
            return tl.trans(found) if TURN else found
