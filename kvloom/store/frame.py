"""One chunk as bytes that describe and check themselves. docs/store.md has the format byte by byte.

Nothing is taken from the bytes before its checksum is verified, and nothing is allocated before its size is checked
against the limit. What does not fit raises DamagedFrame; a frame never gives other numbers than were packed.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.errors import DamagedFrame, StoreError
from kvloom.store.coding import CODINGS, Coded, Plain, expand, squeeze
from kvloom.store.extra import need
from kvloom.store.identity import FORMAT, ChunkKey

__all__ = ["LIMIT", "Buffer", "Frame", "Place", "pack"]

if TYPE_CHECKING:
    import msgspec
    import xxhash
else:
    msgspec = need("msgspec")
    xxhash = need("xxhash")

MAGIC = b"KVLOOM\r\n"  # a transfer that changes line ends is noticed at once
PRELUDE = struct.Struct("<8sHHIQ")  # magic, version, flags, bytes of the header, bytes of the frame
CHECK = 16  # XXH3-128 of prelude and header
BODY = PRELUDE.size + CHECK  # where the header starts
ALIGN = 64
HEADER_LIMIT = 4 << 20
HUGE = 4 << 20  # bytes from which on memory is asked for in large pages: new memory costs a fault for each page
LIMIT = 1 << 30  # bytes of a frame, and of the tensors in it, unless the reader says otherwise
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    + (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}

Buffer = bytes | bytearray | memoryview
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
Name = Annotated[str, msgspec.Meta(max_length=64)]
Digest = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]


class Place(NamedTuple):
    """Where a tensor belongs: layer, plane ("key", "value" or another name) and field of the codec's block."""

    layer: int
    plane: str = "key"
    field: str = "x"


class Page(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: `nbytes` of it stored as `stored` bytes at `offset` of the body, filled up to a multiple of ALIGN."""

    layer: Count
    plane: Name
    field: Name
    dtype: Name
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=8)]
    offset: Count
    nbytes: Count
    stored: Count
    coding: Name
    checksum: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]

    @property
    def place(self) -> Place:
        return Place(self.layer, self.plane, self.field)

    @property
    def extent(self) -> int:
        return _aligned(self.stored)

    @property
    def plain(self) -> bool:
        """Whether what is stored are the bytes of the tensor."""
        return self.coding == "raw"


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a frame says of itself. `notes`: small facts for people and tools, such as a codec's measured error."""

    identity: Digest
    context: Digest
    key: Digest
    start: Count
    tokens: Annotated[tuple[int, ...], msgspec.Meta(max_length=1 << 18)]
    pages: Annotated[tuple[Page, ...], msgspec.Meta(max_length=1 << 14)]
    notes: dict[str, str | int | float | bool | None]


_decoder = msgspec.json.Decoder(Header)


def _aligned(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


def aligned(nbytes: int) -> memoryview:
    """Memory that starts at a multiple of ALIGN, as a bytearray's does not: processors copy to it several times as fast."""
    if nbytes >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # where the system has no large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(pages)
    data: Any = torch.empty(nbytes, dtype=torch.uint8).numpy()
    return memoryview(data)


def copied(data: Buffer) -> memoryview:
    """A copy in aligned memory."""
    out = aligned(len(data))
    out[:] = data
    return out


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)


def pack(
    key: ChunkKey,
    tensors: Mapping[Place, Tensor],
    *,
    notes: Mapping[str, Any] | None = None,
    coding: str = "raw",
    limit: int = LIMIT,
) -> memoryview:
    """The frame of a chunk. `coding`: "raw", "zstd", "rans" or "best" (the smallest) for every page; one that would not
    shrink stays as it is.

    Raises StoreError for a coding, dtype, name, note or size that a reader would refuse.
    """
    plain: list[Plain] = []
    for place, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise StoreError(f"{Place(*place)} has dtype {dtype}; a frame holds {', '.join(DTYPES)}.")
        plain.append(Plain(_bytes_of(tensor), tuple(tensor.shape), tensor.itemsize))
    pages: list[Page] = []
    datas: list[Any] = []
    offset = 0
    for (place, tensor), whole, (name, data) in zip(tensors.items(), plain, squeeze(plain, coding)):
        dtype, stored = str(tensor.dtype).removeprefix("torch."), len(data)
        check = xxhash.xxh3_128(data)
        check.update(bytes(_aligned(stored) - stored))
        pages.append(Page(*place, dtype, whole.shape, offset, len(whole.data), stored, name, check.hexdigest()))
        datas.append(data)
        offset += _aligned(stored)
    header = Header(key.identity, key.context, key.digest, key.start, key.tokens, tuple(pages), dict(notes or {}))
    text: bytes = msgspec.json.encode(header)
    text = text.ljust(_aligned(BODY + len(text)) - BODY)
    total = BODY + len(text) + offset
    if total > limit:
        raise StoreError(f"the chunk takes {total} bytes and limit={limit}: store fewer tokens in one chunk.")
    try:
        _parse(text, offset, limit)
    except DamagedFrame as error:
        raise StoreError(f"the chunk does not fit the format: {error}") from error
    prelude = PRELUDE.pack(MAGIC, FORMAT, 0, len(text), total)
    frame = aligned(total)
    frame[: len(prelude)] = prelude
    frame[len(prelude) : BODY] = _checksum(prelude, text)
    frame[BODY : BODY + len(text)] = text
    for page, data in zip(pages, datas):
        at = BODY + len(text) + page.offset
        frame[at : at + page.stored] = data
        frame[at + page.stored : at + page.extent] = bytes(page.extent - page.stored)
    return frame


def _checksum(prelude: Buffer, text: Buffer) -> bytes:
    check = xxhash.xxh3_128(prelude)
    check.update(text)
    digest: bytes = check.digest()
    return digest


def _parse(text: Buffer, body: int, limit: int) -> Header:
    """The header, if it can be true: known dtypes, sizes that agree, pages that fill the body without gaps or overlaps."""
    try:
        header: Header = _decoder.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DamagedFrame(f"header: {error}") from error
    at = total = 0
    for page in header.pages:
        dtype = DTYPES.get(page.dtype)
        if dtype is None:
            raise DamagedFrame(f"{page.place}: unknown dtype {page.dtype!r}")
        if page.coding not in CODINGS:
            raise DamagedFrame(f"{page.place}: unknown coding {page.coding!r}")
        if page.nbytes != math.prod(page.shape) * dtype.itemsize or (page.plain and page.stored != page.nbytes):
            raise DamagedFrame(f"{page.place}: {page.nbytes} bytes, stored as {page.stored}, for shape {page.shape}")
        if page.offset != at:
            raise DamagedFrame(f"{page.place}: at byte {page.offset} of the body, where {at} is due")
        at += page.extent
        total += page.nbytes
    if at != body or total > limit or any(max(p.shape, default=0) > limit for p in header.pages):
        raise DamagedFrame(f"pages of {at} bytes in a body of {body}; {total} bytes of tensors, at most {limit}")
    if len({page.place for page in header.pages}) < len(header.pages):
        raise DamagedFrame("two pages for one place")
    if any(not -(1 << 63) <= token < 1 << 63 for token in header.tokens):
        raise DamagedFrame("a token of more than 64 bits")
    return header


class Frame:
    """A frame whose header is verified. `fetch(start, stop)` gives bytes of it; only what `read` asks for is fetched."""

    def __init__(self, head: Buffer, fetch: Callable[[int, int], Buffer | None], limit: int = LIMIT) -> None:
        """`head`: the first bytes, as many as are at hand. Raises DamagedFrame, also if there are fewer than announced."""
        if len(head) < BODY:
            raise DamagedFrame(f"{len(head)} bytes, too few for a frame")
        magic, version, flags, length, self.nbytes = PRELUDE.unpack_from(head)
        if magic != MAGIC or version != FORMAT or flags:
            raise DamagedFrame(f"magic {magic!r}, version {version}, flags {flags}; this reads version {FORMAT}")
        if length > HEADER_LIMIT or not BODY + length <= self.nbytes <= limit:
            raise DamagedFrame(f"header of {length} bytes in a frame of {self.nbytes}; limits {HEADER_LIMIT}, {limit}")
        self.body = BODY + length
        if len(head) < self.body:
            head = fetch(0, self.body) or b""
            if len(head) < self.body:
                raise DamagedFrame("ends inside the header")
            if PRELUDE.unpack_from(head) != (magic, version, flags, length, self.nbytes):
                raise DamagedFrame("changed while it was read")
        view = memoryview(head)
        text = view[BODY : self.body]
        if _checksum(view[: PRELUDE.size], text) != view[PRELUDE.size : BODY]:
            raise DamagedFrame("checksum of the header")
        self.header = _parse(text, self.nbytes - self.body, limit)
        self._fetch = fetch

    @classmethod
    def open(cls, data: Buffer, limit: int = LIMIT) -> Frame:
        """A frame that lies in memory as a whole, neither cut nor followed by anything."""
        view = memoryview(data)
        frame = cls(view, lambda start, stop: view[start:stop], limit)
        if frame.nbytes != len(view):
            raise DamagedFrame(f"{len(view)} bytes for a frame of {frame.nbytes}")
        return frame

    def matches(self, key: ChunkKey) -> str:
        """Why this is not the chunk asked for; "" if it is."""
        header = self.header
        for name, ours, theirs in (
            ("identity", key.identity, header.identity),
            ("context", key.context, header.context),
            ("start", key.start, header.start),
            ("tokens", key.tokens, header.tokens),
            ("key", key.digest, header.key),
        ):
            if ours != theirs:
                return f"another {name}"
        return ""

    def read(
        self,
        layers: Iterable[int] | None = None,
        *,
        into: Mapping[Place, Tensor] | None = None,
        copy: bool = True,
        lend: bool = False,
    ) -> dict[Place, Tensor]:
        """The tensors of some layers (default: all), each verified before any is given out.

        `into`: buffers to copy to, of the same shape and dtype, for the places named there. `copy=False`: views of the
        frame's memory where it can be written to and lies right; keep that memory to yourself. `lend`: views of memory that
        belongs to others, too; never write to them. Raises DamagedFrame, StoreError for a buffer that does not fit or a
        layer that the frame does not have.
        """
        targets = dict(into or {})
        pages = self.pages(layers, targets)
        found = self._verified(pages)
        opened = _expand([(page, data) for page, data in found if not page.plain and page.nbytes])
        tensors = {
            page.place: opened[page.place]
            if page.place in opened
            else self.tensor(page, data, copy and page.place not in targets, lend or page.place in targets)
            for page, data in found
        }
        for place, target in targets.items():
            if place in tensors:
                tensors[place] = target.copy_(tensors[place])
        return tensors

    def pages(self, layers: Iterable[int] | None, into: Mapping[Place, Tensor]) -> list[Page]:
        """The pages of some layers (None: all). Raises StoreError for layers that are not there, buffers that do not fit."""
        wanted = None if layers is None else set(layers)
        pages = [page for page in self.header.pages if wanted is None or page.layer in wanted]
        if wanted is not None and (missing := wanted - {page.layer for page in pages}):
            raise StoreError(f"layers={sorted(missing)} are not in the frame.")
        for page in pages:
            target = into.get(page.place)
            if target is not None and (tuple(target.shape) != page.shape or target.dtype != DTYPES[page.dtype]):
                raise StoreError(
                    f"into[{page.place}] is {target.dtype} {tuple(target.shape)}; give {page.dtype} {page.shape}."
                )
        return pages

    def _verified(self, pages: list[Page]) -> list[tuple[Page, memoryview]]:
        """The bytes of pages; neighbours are fetched together."""
        found: list[tuple[Page, memoryview]] = []
        first = 0
        while first < len(pages):
            last = first
            while last + 1 < len(pages) and pages[last + 1].offset == pages[last].offset + pages[last].extent:
                last += 1
            start, stop = pages[first].offset, pages[last].offset + pages[last].extent
            data = b"" if start == stop else self._fetch(self.body + start, self.body + stop)
            if data is None or len(data) != stop - start:
                raise DamagedFrame("ends inside a page")
            for page in pages[first : last + 1]:
                extent = memoryview(data)[page.offset - start : page.offset - start + page.extent]
                if xxhash.xxh3_128(extent).hexdigest() != page.checksum:
                    raise DamagedFrame(f"checksum of {page.place}")
                found.append((page, extent[: page.stored]))
            first = last + 1
        return found

    @staticmethod
    def tensor(page: Page, data: memoryview, copy: bool, lend: bool = False) -> Tensor:
        dtype = DTYPES[page.dtype]
        if not page.nbytes:
            return torch.empty(page.shape, dtype=dtype)
        if not page.plain:
            return _expand([(page, data)])[page.place]
        if data.readonly and lend and not copy:
            return torch.frombuffer(_lent(data), dtype=dtype).reshape(page.shape)
        if copy or data.readonly:
            data = copied(data)
        return torch.frombuffer(data, dtype=dtype).reshape(page.shape)


def _lent(data: memoryview) -> Any:
    """The same memory as something that torch takes without a warning; holds on to the original."""
    address = np.frombuffer(data, np.uint8).ctypes.data
    lent = (ctypes.c_ubyte * len(data)).from_address(address)
    lent.owner = data  # type: ignore[attr-defined]
    return lent


def _expand(pages: list[tuple[Page, memoryview]]) -> dict[Place, Tensor]:
    """The tensors of coded pages, each in memory of its own."""
    try:
        datas = expand([Coded(p.coding, data, p.nbytes, DTYPES[p.dtype].itemsize) for p, data in pages])
    except StoreError:  # a library that is not installed is no damage
        raise
    except ValueError as error:
        raise DamagedFrame(f"{', '.join({p.coding for p, _ in pages})}: {error}") from error
    return {
        page.place: torch.frombuffer(copied(data) if data.readonly else data, dtype=DTYPES[page.dtype]).reshape(
            page.shape
        )
        for (page, _), data in zip(pages, datas)
    }
