"""How fast the store's tiers write and read, beside the disk itself and a checksum alone."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from kvloom.bench import show
from kvloom.bench.timing import Tell, alternate, silent
from kvloom.errors import StoreError
from kvloom.store import ChunkKey, Identity, Place, Store, chunk_keys, stream
from kvloom.store.files import FileTier
from kvloom.store.store import open_tier

__all__ = ["Rates", "Row", "run", "steps"]

TOKENS, WIDTH = 256, 128  # of a chunk; of a head
LAYERS = 32
BLOCK = 8 << 20  # bytes that the disk is read in
DISK, CACHED, SHARE, DISK_SHARE = 0.80, 6.0, 0.25, 0.03  # what is wanted: see the notes
Tensors = dict[Place, Tensor]
_ROOMS: dict[int, mmap.mmap] = {}


@dataclass(frozen=True)
class Row:
    """What was done, its median rate in GiB/s, the part of the time that checksums took, and what is wanted of it."""

    what: str
    rate: float
    checksum: float | None = None
    bar: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Rates:
    """All rows, for chunks of so many bytes."""

    chunks: int
    nbytes: int
    rows: list[Row]
    left_out: list[str]

    def table(self) -> Table:
        """A row for everything that was measured."""
        cells = [
            (
                row.what,
                f"{row.rate:.2f}",
                "" if row.checksum is None else f"{row.checksum:.1%}",
                row.bar,
                "" if row.met is None else "yes" if row.met else "NO",
            )
            for row in self.rows
        ]
        title = f"The store: {self.chunks} chunks of {self.nbytes / 2**20:.0f} MiB"
        return show.table(title, ("what", "GiB/s", "checksums", "wanted", "met"), cells)

    def notes(self) -> list[str]:
        """What the words mean, and what was left out."""
        return [
            "Reads go to buffers that are used again. From disk: the system's copy of the files is dropped first.",
            "checksums: the part of a reader's time, in a run of its own.",
            *self.left_out,
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return show.about() | asdict(self)


def steps(rounds: int, urls: int) -> int:
    """How often `run` tells."""
    return 2 + 5 * (rounds + 1) + 4 * rounds + 2 * urls


def run(folder: Path, urls: Sequence[str], chunks: int, nbytes: int, rounds: int, tell: Tell = silent) -> Rates:
    """The file tier in `folder`, memory, and the tiers at other addresses. Leaves nothing behind. Raises StoreError."""
    keys, tensors = _chunks(chunks, nbytes)
    size = sum(x.nbytes for x in tensors.values())
    rows: list[Row] = []
    left_out: list[str] = []
    buffers = [{place: torch.empty_like(x) for place, x in tensors.items()} for _ in range(2)]
    place = folder / f"kvloom-bench-{uuid.uuid4().hex}"
    total = chunks * size / 2**30
    try:
        with (
            Store(FileTier(place), deadline=600.0) as files,
            Store.open(f"memory://?max={2 * chunks * size}") as memory,
        ):
            rows += _writes(files, memory, keys, tensors, total, tell)
            paths = sorted(place.glob("chunks/*/*"))
            jobs: dict[str, Callable[[], object]] = {
                "checksum alone, 1 thread": lambda: _hash(tensors, chunks),
                "the page cache, copied, 1 thread": lambda: _disk(paths, False, BLOCK * 4),
                "memory, 1 reader": lambda: _read(memory, keys, buffers[:1]),
                "files in the page cache, 1 reader": lambda: _read(files, keys, buffers[:1]),
                "files in the page cache, 2 readers": lambda: _read(files, keys, buffers),
            }
            taken = alternate(jobs, rounds, tell=tell)
            rates = {name: total / median(times) for name, times in taken.items()}
            share = {}
            for name in list(jobs)[2:]:
                with hashing() as spent:
                    jobs[name]()
                share[name] = spent() / (median(taken[name]) * (2 if "2" in name else 1))
            cold, disk_share = _cold(files, keys, buffers, paths, total, rounds, tell)
        rows += [Row(name, rate, share.get(name)) for name, rate in rates.items()]
        best = max((name for name in rates if name.startswith("files")), key=lambda name: rates[name])
        rows = [_judged(row, CACHED, SHARE) if row.what == best else row for row in rows]
        disk = max(rate for name, rate in cold.items() if name.startswith("the disk"))
        fastest = max((name for name in cold if name.startswith("files")), key=lambda name: cold[name])
        for name, rate in cold.items():
            row = Row(name, rate, disk_share.get(name))
            rows.append(_judged(row, DISK * disk, DISK_SHARE) if name == fastest else row)
        for url in urls:
            rows += _remote(url, keys, tensors, buffers[:1], total, tell, left_out)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return Rates(chunks, size, rows, left_out)


def _chunks(chunks: int, nbytes: int) -> tuple[list[ChunkKey], Tensors]:
    """Keys, and the tensors that all of them hold: bf16, as many heads as make up the bytes."""
    heads = nbytes // (LAYERS * 2 * TOKENS * WIDTH * 2)
    if heads < 1:
        raise StoreError(
            f"chunks of {nbytes} bytes are too small to measure: give {LAYERS * 2 * TOKENS * WIDTH * 2} or more."
        )
    identity = Identity("bench", uuid.uuid4().hex, "bfloat16", ((heads, WIDTH, WIDTH),) * LAYERS)
    places = [Place(layer, plane) for layer in range(LAYERS) for plane in ("key", "value")]
    tensors = {place: torch.randn(heads, TOKENS, WIDTH).bfloat16() for place in places}
    return chunk_keys(identity, range(chunks * TOKENS), TOKENS), tensors


def _judged(row: Row, rate: float, share: float) -> Row:
    good = row.rate >= rate and (row.checksum or 0.0) <= share
    return Row(row.what, row.rate, row.checksum, f">= {rate:.2f}, <= {share:.0%}", good)


def _writes(
    files: Store, memory: Store, keys: list[ChunkKey], tensors: Tensors, total: float, tell: Tell
) -> Iterator[Row]:
    for name, store in (("memory, put", memory), ("files, put and synced", files)):
        tell(name)
        for _ in range(2):  # once, so that memory that the machine has never used before is used
            taken = []
            for key in keys:
                store.delete(key)
                before = time.perf_counter()
                if not store.put(key, tensors):
                    raise StoreError(f"{name}: a chunk could not be stored: {store.stat()}")
                taken.append(time.perf_counter() - before)
        yield Row(name, total / len(keys) / median(taken))


def _read(store: Store, keys: list[ChunkKey], buffers: Sequence[Tensors]) -> None:
    """All chunks, by as many readers as there are buffers."""

    def part(n: int) -> None:
        for key in keys[n :: len(buffers)]:
            if store.get(key, into=buffers[n]) is None:
                raise StoreError(f"a chunk that was stored is not found: {store.stat()}")

    if len(buffers) == 1:
        part(0)
        return
    with ThreadPoolExecutor(len(buffers)) as pool:
        list(pool.map(part, range(len(buffers))))


def _hash(tensors: Tensors, chunks: int) -> None:
    piece: Any = next(iter(tensors.values())).reshape(-1).view(torch.uint8)[: stream.PIECE].numpy()
    for _ in range(chunks * sum(x.nbytes for x in tensors.values()) // len(piece)):
        stream.new_checksum(piece).digest()


@contextlib.contextmanager
def hashing() -> Iterator[Callable[[], float]]:
    """Measures the seconds that readers spend in checksums of pages meanwhile, all threads together."""
    spent = [0.0]
    real = stream.new_checksum

    class Timed:
        def __init__(self) -> None:
            self.check = real()

        def update(self, data: memoryview) -> None:
            before = time.perf_counter()
            self.check.update(data)
            spent[0] += time.perf_counter() - before

        def hexdigest(self) -> str:
            return str(self.check.hexdigest())

    setattr(stream, "new_checksum", Timed)  # noqa: B010, mypy
    try:
        yield lambda: spent[0]
    finally:
        stream.new_checksum = real


def _drop(paths: Sequence[Path]) -> None:
    """Makes the system forget what it holds of files."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _disk(paths: Sequence[Path], direct: bool, size: int = BLOCK) -> None:
    """Reads files in order, as many bytes at a time, and does nothing with them."""
    room = _ROOMS.setdefault(size, mmap.mmap(-1, size))
    for path in paths:
        file = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        try:
            at, end = 0, os.fstat(file).st_size
            if not direct:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while at < end:
                at += os.preadv(file, [memoryview(room)[: size if direct else end - at]], at)
        finally:
            os.close(file)


def _cold(
    files: Store,
    keys: list[ChunkKey],
    buffers: Sequence[Tensors],
    paths: Sequence[Path],
    total: float,
    rounds: int,
    tell: Tell,
) -> tuple[dict[str, float], dict[str, float]]:
    """Rates from disk, of the disk itself and of the tier, and the part of checksums."""
    jobs: dict[str, Callable[[], object]] = {
        "the disk, O_DIRECT": lambda: _disk(paths, True),
        "the disk, read ahead by the system": lambda: _disk(paths, False),
        "files from disk, 1 reader": lambda: _read(files, keys, buffers[:1]),
        "files from disk, 2 readers": lambda: _read(files, keys, buffers),
    }
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            tell(name)
            _drop(paths)
            before = time.perf_counter()
            try:
                job()
            except OSError as error:  # a file system without O_DIRECT
                if not name.startswith("the disk, O_DIRECT"):
                    raise StoreError(f"{name}: {error}") from error
                continue
            taken[name].append(time.perf_counter() - before)
    share = {}
    for name in list(jobs)[2:]:
        _drop(paths)
        with hashing() as spent:
            jobs[name]()
        share[name] = spent() / (median(taken[name]) * (2 if "2" in name else 1))
    return {name: total / median(times) for name, times in taken.items() if times}, share


def _remote(
    url: str,
    keys: list[ChunkKey],
    tensors: Tensors,
    buffers: Sequence[Tensors],
    total: float,
    tell: Tell,
    left_out: list[str],
) -> Iterator[Row]:
    tier = open_tier(url)
    with Store(tier, deadline=600.0) as store:
        tell(f"{tier.name}, put")
        before = time.perf_counter()
        if sum(store.put(key, tensors) for key in keys) < len(keys):
            left_out.append(f"{tier.name}: a chunk could not be stored")
            return
        wrote = time.perf_counter() - before
        tell(f"{tier.name}, get")
        before = time.perf_counter()
        _read(store, keys, buffers)
        read = time.perf_counter() - before
        for key in keys:
            store.delete(key)
    yield Row(f"{tier.name}, put", total / wrote)
    yield Row(f"{tier.name}, get", total / read)
