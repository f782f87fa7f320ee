"""How the bytes of a page are stored: as they are, by zstd, or by the entropy coder, whose tables know a tensor's columns.

None of it loses anything. A page that would not shrink is stored as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvloom.errors import StoreError, unknown
from kvloom.kernels import entropy
from kvloom.store.extra import need

__all__ = ["BEST", "CODINGS", "Coded", "Plain", "check_coding", "expand", "squeeze"]

CODINGS = ("raw", "zstd", "rans")
BEST = "best"  # the smallest of them, for each page
LEVEL = 1  # of zstd: others take far longer and gain little on keys and values
ROWS, COLUMNS = 16, 1 << 13  # a tensor with fewer rows or more columns than that is one column of bytes
BATCH = 64  # byte planes decoded at a time: the tables of one take up to 256 KiB
Buffer = bytes | bytearray | memoryview


class Plain(NamedTuple):
    """The bytes of a tensor of this shape, whose numbers take `itemsize` bytes."""

    data: Any
    shape: tuple[int, ...]
    itemsize: int


class Coded(NamedTuple):
    """What a tensor's bytes are stored as, and how many they are."""

    coding: str
    data: memoryview
    nbytes: int
    itemsize: int


def check_coding(coding: str) -> None:
    """Raises StoreError for a name that no page can have."""
    if coding not in (*CODINGS, BEST):
        raise StoreError(unknown("coding", coding, [*CODINGS, BEST]))


def squeeze(pages: Sequence[Plain], coding: str) -> list[tuple[str, Any]]:
    """Name of the coding, and the bytes that are stored, of each page. Raises StoreError for an unknown coding."""
    check_coding(coding)
    if coding == BEST:
        both = zip(squeeze(pages, "rans"), squeeze(pages, "zstd"))
        return [min(pair, key=lambda one: len(one[1])) for pair in both]
    if coding == "zstd":
        press = need("zstandard").ZstdCompressor(level=LEVEL)
        small = [press.compress(page.data) for page in pages]
    elif coding == "rans":
        small = _rans(pages)
    else:
        return [("raw", page.data) for page in pages]
    return [(coding, x) if len(x) < len(page.data) else ("raw", page.data) for x, page in zip(small, pages)]


def expand(pages: Sequence[Coded]) -> list[memoryview]:
    """The bytes of tensors, in memory of their own. Raises ValueError for what no `squeeze` made.

    Nothing but `nbytes` of each page is allocated, and tables of a fixed size.
    """
    outs: list[memoryview] = []
    jobs: list[tuple[memoryview, Any]] = []
    for page in pages:
        if page.coding == "zstd":
            outs.append(memoryview(_inflate(page)))
        elif page.coding == "rans":
            room = np.empty(page.nbytes, np.uint8)
            jobs += _planes(page, room)
            outs.append(memoryview(room))  # type: ignore[arg-type]
        else:
            outs.append(page.data)
    for at in range(0, len(jobs), BATCH):
        part = jobs[at : at + BATCH]
        entropy.decode([code for code, _ in part], [room for _, room in part])
    return outs


def _inflate(page: Coded) -> bytes:
    zstandard = need("zstandard")
    try:
        # the size that the data claims is what would be allocated: it is checked first
        if zstandard.get_frame_parameters(page.data).content_size != page.nbytes:
            raise ValueError("compressed data of another size")
        whole: bytes = zstandard.ZstdDecompressor().decompress(page.data, max_output_size=page.nbytes)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if len(whole) != page.nbytes:
        raise ValueError("compressed data of another size")
    return whole


def _rans(pages: Sequence[Plain]) -> list[bytes]:
    """Columns and sizes of the byte planes, each 4 bytes; then the planes, lowest bytes first, coded or as they are."""
    jobs: list[Any] = []
    for data, shape, itemsize in pages:
        if len(data):
            columns = _columns(shape)
            parts = np.frombuffer(data, np.uint8).reshape(-1, columns, itemsize)
            jobs += [parts[:, :, i] for i in range(itemsize)]
    codes = iter(zip(jobs, entropy.encode(jobs)))
    out = []
    for data, shape, itemsize in pages:
        taken = [next(codes) for _ in range(itemsize)] if len(data) else []
        kept = [code if len(code) < plane.size else np.ascontiguousarray(plane).tobytes() for plane, code in taken]
        sizes = [len(plane) for plane in kept]
        out.append(struct.pack(f"<{1 + len(sizes)}I", _columns(shape), *sizes) + b"".join(kept))
    return out


def _columns(shape: tuple[int, ...]) -> int:
    columns, rows = shape[-1] if shape else 1, 1
    for n in shape[:-1]:
        rows *= n
    return columns if rows >= ROWS and 0 < columns <= COLUMNS else 1


def _planes(page: Coded, room: Any) -> list[tuple[memoryview, Any]]:
    """The coded byte planes of a page and where each goes; those that are stored as they are, are copied at once."""
    k = page.itemsize
    head = 4 * (1 + k)
    if len(page.data) < head or not page.nbytes:
        raise ValueError("too few bytes for planes")
    columns, *sizes = struct.unpack_from(f"<{1 + k}I", page.data)
    if not 0 < columns <= COLUMNS or page.nbytes % (columns * k) or head + sum(sizes) != len(page.data):
        raise ValueError("planes that do not fit")
    parts, jobs, at = room.reshape(-1, columns, k), [], head
    for i, size in enumerate(sizes):
        piece = page.data[at : at + size]
        at += size
        if size == page.nbytes // k:
            parts[:, :, i] = np.frombuffer(piece, np.uint8).reshape(-1, columns)
        else:
            jobs.append((piece, parts[:, :, i]))
    return jobs
