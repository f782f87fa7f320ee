"""Pages of a chunk read to where they are wanted: each piece is hashed while a core's cache still holds it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING

from torch import Tensor

from kvloom.errors import DamagedFrame, TierError
from kvloom.store.extra import need
from kvloom.store.frame import Frame, Page, Place, aligned

if TYPE_CHECKING:
    import xxhash
else:
    xxhash = need("xxhash")

__all__ = ["PIECE", "Permit", "Sink", "read_pages"]

new_checksum = xxhash.xxh3_128
PIECE = 1 << 20  # bytes read and then hashed: few enough to be in a cache still, many enough that Python costs little


class Permit:
    """To write to somebody's buffers, until it is revoked: a call that was given up must not write to them later."""

    def __init__(self) -> None:
        self._lock, self._revoked = Lock(), False

    def __enter__(self) -> None:
        """Write inside of this, and wait for nothing there."""
        self._lock.acquire()
        if self._revoked:
            self._lock.release()
            raise TierError("the caller has gone")

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def revoke(self) -> None:
        with self._lock:
            self._revoked = True


class Sink:
    """Takes the bytes of neighbouring pages in order, and verifies each page."""

    def __init__(self, pages: Iterable[tuple[Page, memoryview]], permit: Permit) -> None:
        self.permit = permit
        self._parts = [
            (page, view)
            for page, room in pages
            for view in (room, memoryview(bytearray(page.extent - len(room))))
            if view
        ]
        self.nbytes = sum(len(view) for _, view in self._parts)
        self._part = self._at = 0
        self._check = new_checksum()

    def next(self) -> memoryview | None:
        """Where the next bytes go, a piece at most; None when all have come. Write only with the permit."""
        if self._part == len(self._parts):
            return None
        return self._parts[self._part][1][self._at : self._at + PIECE]

    def done(self, n: int) -> None:
        """The first n bytes of that are there. Raises DamagedFrame when a page is complete and not what it should be."""
        page, view = self._parts[self._part]
        self._check.update(view[self._at : self._at + n])
        self._at += n
        if self._at < len(view):
            return
        self._part, self._at = self._part + 1, 0
        if self._part == len(self._parts) or self._parts[self._part][0] is not page:
            if self._check.hexdigest() != page.checksum:
                raise DamagedFrame(f"checksum of {page.place}")
            self._check = new_checksum()


def read_pages(
    frame: Frame,
    layers: Iterable[int] | None,
    into: Mapping[Place, Tensor],
    load: Callable[[int, Sink], int | None],
    permit: Permit,
) -> dict[Place, Tensor]:
    """The tensors of some layers (None: all), in the buffers of `into` where they are given.

    `load(start, sink)` fills the sink with the bytes of the frame from `start` on and says where the frame ends, as far
    as it knows (`Tier.read_into`). Raises what `Frame.read` raises; buffers hold anything then.
    """
    pages = frame.pages(layers, into)
    targets = [into.get(page.place) for page in pages]
    direct = [target is not None and _direct(page, target) for page, target in zip(pages, targets)]
    rooms = [_bytes(x) if x is not None and own else aligned(p.stored) for p, x, own in zip(pages, targets, direct)]
    first = 0
    while first < len(pages):
        last = first
        while last + 1 < len(pages) and pages[last + 1].offset == pages[last].offset + pages[last].extent:
            last += 1
        sink = Sink(zip(pages[first : last + 1], rooms[first : last + 1]), permit)
        start = frame.body + pages[first].offset
        end = load(start, sink) if sink.nbytes else start
        if end is None or end < start + sink.nbytes:
            raise DamagedFrame("ends inside a page")
        if layers is None and end > frame.nbytes:
            raise DamagedFrame(f"more bytes than the {frame.nbytes} of the frame")
        first = last + 1
    tensors: dict[Place, Tensor] = {}
    for page, room, target, own in zip(pages, rooms, targets, direct):
        if target is not None and own:
            tensors[page.place] = target
            continue
        found = frame.tensor(page, room, copy=False)
        if target is not None:
            with permit:
                found = target.copy_(found)
        tensors[page.place] = found
    return tensors


def _direct(page: Page, target: Tensor) -> bool:
    """Whether the stored bytes of a page are those of the tensor."""
    return page.plain and page.nbytes > 0 and target.is_contiguous() and target.is_cpu


def _bytes(target: Tensor) -> memoryview:
    """The memory of a contiguous tensor, which has to outlive this. By its address: views of torch cost several times more."""
    room = _array(target.nbytes).from_address(target.data_ptr())
    return memoryview(room).cast("B")


@lru_cache
def _array(nbytes: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    return ctypes.c_ubyte * nbytes
