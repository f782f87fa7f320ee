"""Entropy coding of matrices of bytes: columns are channels, and each channel is coded by one of a few frequency tables.

Interleaved range ANS (Duda, arXiv 1311.2540): frequencies of 12 bits, states of 32 bits, words of 16 bits, 8 states in turn.
The code of a matrix [rows, cols], numbers little-endian:

| bytes | what |
| --- | --- |
| 1 | number of tables, 1 to 16 |
| each table | first and last symbol, then the frequency of each between: one byte below 128, else 7 bits and the rest; after a 0, how many more; sum 4096 |
| (cols + 1) / 2 | the table of each column, 4 bits, low half first; left out where there is one table |
| 4 each | sizes of the streams: max(1, 65536 / cols) rows in each |
| streams | 8 states, then words; symbol i of a stream belongs to state i modulo 8 |

Which tables: columns are sorted by their mean and cut in 1, 2, 4, ... equal parts; each moves to the table that codes it best,
twice; the number of tables that takes the fewest bytes stays. All of it in whole numbers: every machine writes the same bytes,
compiled or not.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvloom.kernels import native

__all__ = ["decode", "encode"]

LANES, BITS, TABLES, ROUNDS = 8, 12, 16, 2
ONE, LOW, BLOCK = 1 << BITS, 1 << 16, 1 << 16
MISSING = 16 << 8  # 256ths of a bit that a symbol takes which a table lacks, while tables are sought
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Array = np.ndarray[Any, Any]


def encode(matrices: Sequence[Bytes]) -> list[bytes]:
    """Codes of matrices uint8 [rows, cols], neither of them 0; any strides. Compiled, they are shared out to torch's threads."""
    if native.ISA is None:
        return [_encode(m) for m in matrices]
    kept = [_even(m) for m in matrices]
    codes: list[bytes] = native._native.entropy_encode([_described(m) for m in kept], torch.get_num_threads())
    return codes


def decode(codes: Sequence[bytes | memoryview], outs: Sequence[Bytes]) -> None:
    """Fills matrices uint8 [rows, cols], whose bytes lie at even steps, with what was encoded.

    Raises ValueError if a code is damaged or of another shape. Takes no more memory than some tables and `outs`.
    """
    if native.ISA is None:
        for code, out in zip(codes, outs, strict=True):
            _decode(bytes(code), out)
        return
    kept = [np.frombuffer(code, np.uint8) for code in codes]
    described = [(x.ctypes.data, x.size, *_described(out)) for x, out in zip(kept, outs, strict=True)]
    if not native._native.entropy_decode(described, torch.get_num_threads()):
        raise ValueError("damaged entropy code")


def _even(m: Bytes) -> Bytes:
    """m, or a copy whose bytes lie at even steps."""
    return m if m.strides[0] == m.shape[1] * m.strides[1] and m.strides[1] > 0 else np.ascontiguousarray(m)


def _described(m: Bytes) -> tuple[int, int, int, int]:
    return m.ctypes.data, *m.shape, m.strides[1]


@functools.cache
def _prices() -> Array:
    """256ths of a bit that a symbol of each frequency takes, by squaring whole numbers: floating point would differ."""
    out = [MISSING]
    for f in range(1, ONE + 1):
        log = f.bit_length() - 1
        m = f << (31 - log)
        for _ in range(8):
            m = m * m >> 31
            log = 2 * log + (m >> 32)
            m >>= m >> 32
        out.append(BITS * 256 - log)
    return np.array(out)


def _normalized(counts: Array) -> Array:
    """Frequencies that sum to ONE, at least 1 where there is a count."""
    f = np.where(counts > 0, np.maximum(1, counts * ONE // counts.sum()), 0)
    left = ONE - int(f.sum())
    if left > 0:
        f[f.argmax()] += left
    for _ in range(-left):
        f[f.argmax()] -= 1
    return f


def _written(f: Array) -> bytes:
    seen = f.nonzero()[0]
    first, last = int(seen[0]), int(seen[-1])
    out = bytearray((first, last))
    gaps = np.diff(seen, prepend=first) - 1
    for value, zeros in zip(f[seen].tolist(), gaps.tolist()):
        out += bytes((0, zeros - 1)) if zeros > 0 else b""
        out += bytes((value,)) if value < 128 else bytes((value & 127 | 128, value >> 7))
    return bytes(out)


def _fit(counts: Array, order: Array, k: int) -> tuple[int, Array, Array]:
    """Cost in 256ths of a bit, tables [k, 256] and the table of each column, for k tables or fewer."""
    cols = len(counts)
    of = np.empty(cols, np.int64)
    of[order] = np.arange(cols) * k // cols
    for step in range(ROUNDS + 1):
        used, of = np.unique(of, return_inverse=True)
        k = len(used)
        tables = np.stack([_normalized(counts[of == i].sum(0)) for i in range(k)])
        costs = (counts.astype(np.float64) @ _prices()[tables].T.astype(np.float64)).astype(
            np.int64
        )  # exact below 2**53
        if step == ROUNDS or k == 1:
            break
        of = costs.argmin(1)
    head = sum(len(_written(f)) for f in tables) + ((cols + 1) // 2 if k > 1 else 0)
    return 8 * 256 * head + int(costs[np.arange(cols), of].sum()), tables, of


def _best(m: Bytes) -> tuple[Array, Array]:
    cols = m.shape[1]
    counts = np.bincount((m + 256 * np.arange(cols)).ravel(), minlength=256 * cols).reshape(cols, 256)
    order = (counts * np.arange(256)).sum(1).argsort(kind="stable")
    found, k = _fit(counts, order, 1), 2
    while k <= min(TABLES, cols):
        other = _fit(counts, order, k)
        if other[0] >= found[0]:
            break
        found, k = other, 2 * k
    return found[1:]


def _streams(rows: int, cols: int) -> tuple[int, Array]:
    """Symbols of each stream, and their places in the matrix."""
    each = max(1, BLOCK // cols) * cols
    starts = np.arange(0, rows * cols, each)
    return each, starts


def _encode(m: Bytes) -> bytes:
    """As entropy.cpp does it; the streams of a matrix side by side."""
    rows, cols = m.shape
    tables, of = _best(m)
    head = bytearray((len(tables),))
    for f in tables:
        head += _written(f)
    if len(tables) > 1:
        padded = np.append(of, 0).astype(np.uint8)
        head += (padded[0 : cols + cols % 2 : 2] | padded[1 : cols + cols % 2 : 2] << 4).tobytes()
    each, starts = _streams(rows, cols)
    flat, total, shares = np.ascontiguousarray(m).ravel(), m.size, tables.cumsum(1) - tables
    steps = -(-min(each, total) // LANES)
    state = np.full((len(starts), LANES), LOW, np.int64)
    words, sent = np.zeros((steps, *state.shape), np.uint16), np.zeros((steps, *state.shape), bool)
    for step in range(steps - 1, -1, -1):
        i = step * LANES + np.arange(LANES)
        place = starts[:, None] + i
        live = (i < each) & (place < total)
        place = np.where(live, place, 0)
        table, symbol = of[place % cols], flat[place]
        f, start = np.where(live, tables[table, symbol], ONE), np.where(live, shares[table, symbol], 0)
        sent[step] = state >= f << (32 - BITS)
        words[step] = state & 0xFFFF
        state = np.where(sent[step], state >> 16, state)
        state = (state // f << BITS) + state % f + start
    streams = [
        state[s].astype("<u4").tobytes() + words[:, s][sent[:, s]].astype("<u2").tobytes() for s in range(len(starts))
    ]
    return bytes(head) + b"".join(struct.pack("<I", len(stream)) for stream in streams) + b"".join(streams)


def _read_tables(code: bytes) -> tuple[list[list[int]], int]:
    """Frequencies of each table, and where the columns start. IndexError where the code ends."""
    if not 1 <= code[0] <= TABLES:
        raise ValueError("no number of tables")
    tables, at = [], 1
    for _ in range(code[0]):
        first, last = code[at], code[at + 1]
        at += 2
        f = [0] * 256
        symbol = first
        while symbol <= last:
            value, at = code[at], at + 1
            if value & 128 or not value:
                value, symbol, at = (
                    (value & 127 | code[at] << 7, symbol, at + 1) if value else (0, symbol + code[at], at + 1)
                )
            if symbol <= 255:
                f[symbol] = value
            symbol += 1
        if sum(f) != ONE:
            raise ValueError("frequencies of another sum")
        tables.append(f)
    return tables, at


def _decode(code: bytes, out: Bytes) -> None:
    rows, cols = out.shape
    each, starts = _streams(rows, cols)
    try:
        tables, at = _read_tables(code)
        of = np.zeros(cols, np.int64)
        if len(tables) > 1:
            packed = np.frombuffer(code, np.uint8, (cols + 1) // 2, at)
            of = np.stack((packed & 15, packed >> 4), 1).ravel()[:cols].astype(np.int64)
            at += (cols + 1) // 2
        sizes = np.frombuffer(code, "<u4", len(starts), at).astype(np.int64)
    except IndexError:
        raise ValueError("a code that ends early") from None
    at += 4 * len(starts)
    if of.max() >= len(tables) or (sizes < 4 * LANES).any() or (sizes % 2).any() or at + sizes.sum() != len(code):
        raise ValueError("sizes that do not fit")
    begins = at + sizes.cumsum() - sizes
    state = np.stack([np.frombuffer(code, "<u4", LANES, begin) for begin in begins]).astype(np.int64)
    pool = np.frombuffer(code, "<u2", (len(code) - at) // 2, at).astype(np.int64)
    word, end = (begins - at) // 2 + 2 * LANES, (begins - at + sizes) // 2
    symbols = np.stack([np.repeat(np.arange(256), f) for f in tables])
    freqs = np.array(tables)
    shares = freqs.cumsum(1) - freqs
    flat = np.empty(out.size, np.uint8)
    for step in range(-(-min(each, out.size) // LANES)):
        i = step * LANES + np.arange(LANES)
        place = starts[:, None] + i
        live = (i < each) & (place < out.size)
        table, slot = of[place % cols], state & (ONE - 1)
        symbol = symbols[table, slot]
        flat[place[live]] = symbol[live]
        state = np.where(live, freqs[table, symbol] * (state >> BITS) + slot - shares[table, symbol], state)
        more = live & (state < LOW)
        taken = word[:, None] + more.cumsum(1) - 1
        word = word + more.sum(1)
        if (word > end).any():
            raise ValueError("a stream that ends early")
        state = np.where(more, state << 16 | pool[np.minimum(taken, len(pool) - 1)], state)
    if (word != end).any() or (state != LOW).any():
        raise ValueError("a stream that does not end where it began")
    out[...] = flat.reshape(rows, cols)
