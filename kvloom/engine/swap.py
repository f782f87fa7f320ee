"""Where caches wait outside the KV memory: one range of memory, or of a file, which copies enter and leave in long runs.

What a sequence holds is a few hundred buffers. Their rows are written side by side, so that a cache leaves in one run and comes
back from few (FastSwitch, arXiv 2411.18424). A copy stays when its buffer is back: next time only the rows that came since leave.
"""

from __future__ import annotations

import mmap
import tempfile
from bisect import insort
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvloom.core.run import Buffer
from kvloom.engine.sequence import Sequence
from kvloom.errors import RequestError

__all__ = ["Room", "Swap", "buffers"]

ALIGN = 64


class Room:
    """Which of `limit` bytes are free, as runs that never touch one another."""

    def __init__(self, limit: int) -> None:
        self.limit, self.free = limit, limit
        self.runs: list[tuple[int, int]] = [(0, limit)] if limit else []  # (start, stop), ascending

    def take(self, nbytes: int) -> int | None:
        """Where so many bytes are free in one run, the shortest that will do; None: nowhere."""
        fits = [run for run in self.runs if run[1] - run[0] >= nbytes]
        if not fits:
            return None
        run = min(fits, key=lambda run: run[1] - run[0])
        self.runs.remove(run)
        if run[1] - run[0] > nbytes:
            insort(self.runs, (run[0] + nbytes, run[1]))
        self.free -= nbytes
        return run[0]

    def give(self, start: int, nbytes: int) -> None:
        """These bytes are free again."""
        stop = start + nbytes
        self.free += nbytes
        before = next((run for run in self.runs if run[1] == start), None)
        after = next((run for run in self.runs if run[0] == stop), None)
        for run in (before, after):
            if run is not None:
                self.runs.remove(run)
        insort(self.runs, (start if before is None else before[0], stop if after is None else after[1]))


class _Range:
    """Bytes that were taken; they are given back with the last piece that lies in them."""

    def __init__(self, swap: Swap, start: int, nbytes: int) -> None:
        self.swap, self.start, self.nbytes = swap, start, nbytes

    def __del__(self) -> None:
        self.swap.give(self.start, self.nbytes)


@dataclass
class _Copy:
    """Rows of a buffer, in pieces (range, start there, rows). `out`: the buffer itself holds none of them now."""

    shape: tuple[int, ...]  # without rows
    dtype: torch.dtype
    device: torch.device
    pieces: list[tuple[_Range, int, int]] = field(default_factory=list)
    out: bool = False

    @property
    def rows(self) -> int:
        return sum(rows for _, _, rows in self.pieces)

    def nbytes(self, rows: int) -> int:
        return prod(self.shape) * rows * self.dtype.itemsize


class Swap:
    """`limit` bytes of memory beside the KV memory; with `folder`, of a file there, which goes when the process ends.

    `out_bytes`, `in_bytes`: copied so far. `runs`: in how many runs.
    """

    def __init__(self, limit: int, folder: str | Path | None = None) -> None:
        if limit < mmap.PAGESIZE:
            raise RequestError(f"a swap area of {limit} bytes holds nothing. Give at least {mmap.PAGESIZE}, or none.")
        self.room = Room(limit // mmap.PAGESIZE * mmap.PAGESIZE)
        if folder is None:
            self._map = mmap.mmap(-1, self.room.limit)  # pages take memory when they are written
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:  # without a name: nothing is left behind
                file.truncate(self.room.limit)
                self._map = mmap.mmap(file.fileno(), self.room.limit)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._copies: WeakKeyDictionary[Buffer, _Copy] = WeakKeyDictionary()
        self.out_bytes = self.in_bytes = self.runs = 0

    @property
    def used(self) -> int:
        """Bytes that copies take."""
        return self.room.limit - self.room.free

    def give(self, start: int, nbytes: int) -> None:
        """Frees bytes, and the memory or disk under whole pages of them."""
        self.room.give(start, nbytes)
        first, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > first:
            with suppress(OSError, AttributeError, ValueError):  # not every file system can
                self._map.madvise(mmap.MADV_REMOVE, first, stop - first)

    def away(self, buffer: Buffer) -> bool:
        """Whether the rows of a buffer are here alone."""
        copy = self._copies.get(buffer)
        return copy is not None and copy.out

    @torch.inference_mode()
    def out(self, some: Iterable[tuple[Buffer, bool]]) -> bool:
        """Takes buffers out of memory: (buffer, whether rows that it has stay as they are). False, and nothing done, if there is no room."""
        due: list[tuple[Buffer, _Copy]] = []
        for buffer, steady in dict(some).items():
            copy = self._copies.pop(buffer, None)
            if copy is None or not (copy.out or (steady and buffer.start == 0 and copy.rows <= buffer.n)):
                x = buffer.data
                copy = _Copy((x.shape[0], *x.shape[2:]), x.dtype, x.device)
            self._copies[buffer] = copy  # the last to be given up
            if not copy.out:
                due.append((buffer, copy))
        new = [(buffer, copy, copy.rows, _aligned(copy.nbytes(buffer.n - copy.rows))) for buffer, copy in due]
        new = [each for each in new if each[3]]
        places = self._places([size for *_, size in new], {id(copy) for _, copy in due})
        if places is None:
            return False
        for (buffer, copy, rows, size), (held, start) in zip(new, places, strict=True):
            fresh = buffer.rows(rows, buffer.n)
            self._view(copy, start, fresh.shape[1]).copy_(fresh)
            if fresh.shape[1]:
                copy.pieces.append((held, start, fresh.shape[1]))
            self.out_bytes += size
        for buffer, copy in due:
            buffer.data, buffer.start, buffer.n, copy.out = buffer.data.new_empty(buffer.data[:, :0].shape), 0, 0, True
        return True

    @torch.inference_mode()
    def back(self, some: Iterable[Buffer]) -> None:
        """Brings back those of the buffers that are out."""
        for buffer in some:
            copy = self._copies.get(buffer)
            if copy is not None and copy.out:
                parts = [self._view(copy, start, rows) for _, start, rows in copy.pieces]
                parts = parts or [torch.empty(buffer.data.shape, dtype=copy.dtype)]
                made = Buffer.of(parts, buffer.per, 0, copy.device)
                buffer.data, buffer.start, buffer.n, copy.out = made.data, 0, made.n, False
                self.in_bytes += copy.nbytes(copy.rows)

    def nbytes(self, some: Iterable[Buffer]) -> int:
        """Bytes that `back` would bring, without empty room."""
        found = (self._copies.get(buffer) for buffer in set(some))
        return sum(copy.nbytes(copy.rows) for copy in found if copy is not None and copy.out)

    def _view(self, copy: _Copy, start: int, rows: int) -> Tensor:
        held = self._bytes[start : start + copy.nbytes(rows)]
        return held.view(copy.dtype).view(copy.shape[0], rows, *copy.shape[1:])

    def _places(self, sizes: list[int], wanted: set[int]) -> list[tuple[_Range, int]] | None:
        """Room for pieces, in one run if there is one. Copies of what is in memory, too, make room, the oldest first."""
        if not sizes:
            return []
        while (found := self._together(sizes) or self._apart(sizes)) is None:
            spare = next((b for b, copy in self._copies.items() if not copy.out and id(copy) not in wanted), None)
            if spare is None:
                return None
            del self._copies[spare]
        return found

    def _together(self, sizes: list[int]) -> list[tuple[_Range, int]] | None:
        start = self.room.take(sum(sizes))
        if start is None:
            return None
        held, found = _Range(self, start, sum(sizes)), []
        for size in sizes:
            found.append((held, start))
            start += size
        self.runs += 1
        return found

    def _apart(self, sizes: list[int]) -> list[tuple[_Range, int]] | None:
        if sum(sizes) > self.room.free:
            return None
        found: list[tuple[_Range, int]] = []
        for size in sizes:
            start = self.room.take(size)
            if start is None:
                return None
            found.append((_Range(self, start, size), start))
        self.runs += len(sizes)
        return found


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def buffers(sequence: Sequence) -> Iterator[tuple[Buffer, bool]]:
    """What of a sequence can leave: every buffer, and whether rows that it has stay as they are. What is small stays."""
    for i in range(len(sequence.layers)):
        layer = sequence.layer(i)
        for segment in (x for group in layer.groups for x in group.segments.values()):
            for plane in (segment.key, segment.value):
                steady = plane.codec.exact and sequence.outline.chains
                for run in () if plane.mirrors else plane.runs:
                    for buffer in run.stored.values():
                        yield buffer, run.sealed or steady or not run.codec.exact
            for buffer in segment.cols.values():
                yield buffer, False
            if segment.digest is not None and segment.digest.buffer is not None:
                yield segment.digest.buffer, False
        for state in (layer.recent, layer.unread):
            if state is not None:
                yield state, False
