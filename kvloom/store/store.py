"""Chunks over several tiers, fastest first. What is given out is what was put in, or nothing (docs/store.md)."""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from kvloom.errors import DamagedFrame, StoreError, TierError, unknown
from kvloom.store.address import cache_folder, open_tier
from kvloom.store.evict import Quotas
from kvloom.store.frame import LIMIT, Buffer, Frame, Place, copied, pack
from kvloom.store.guard import Background, Guard, TierDown
from kvloom.store.identity import ChunkKey, Identity
from kvloom.store.stream import Permit, read_pages
from kvloom.store.tier import Deadline, Facts, Tier, TierFull, TierTimeout
from kvloom.store.variants import key_of, opened, stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvloom.core.recipe import Recipe
    from kvloom.store.session import Attached

__all__ = ["Hit", "Store", "cache_folder", "open_tier"]

log = logging.getLogger("kvloom.store")
HEAD = 1 << 16  # bytes read first where only some layers are wanted; headers are rarely longer
BANNED = 4096  # quarantined chunks that a tier would not delete, remembered so that they are not read again


@dataclass(frozen=True)
class Hit:
    """A chunk as it was found: its tensors and notes, the tier that had it, the bytes of its frame."""

    tensors: dict[Place, Tensor]
    notes: dict[str, Any]
    tier: str
    nbytes: int


class Store:
    """Tiers, fastest first. Every call takes at most about `deadline` seconds for each tier; failing tiers cost time only.

    `write="through"`: put returns when all tiers have the chunk. `"back"`: tiers that may have to wait get it from a
    background thread, `queue` chunks at most; more are not written there. Safe to use from several threads.
    """

    def __init__(
        self,
        *tiers: Tier,
        write: Literal["through", "back"] = "through",
        deadline: float = 5.0,
        limit: int = LIMIT,
        queue: int = 32,
        failures: int = 3,
        pause: float = 5.0,
    ) -> None:
        if not tiers:
            raise StoreError("a store needs a tier; give one, or use Store.open() for memory over files.")
        if write not in ("through", "back"):
            raise StoreError(unknown("way to write", write, ["through", "back"]))
        if deadline <= 0 or queue < 1:
            raise StoreError(f"deadline={deadline}, queue={queue}: both have to be positive.")
        self.write, self.deadline, self.limit = write, deadline, limit
        self._guards = [Guard(tier, failures, pause) for tier in tiers]
        self._writer, self._prefetcher = Background("kvloom write-back", queue), Background("kvloom prefetch", queue)
        self._lock = Lock()
        self._counts: Counter[str] = Counter()
        self._banned: dict[tuple[int, str], None] = {}

    @classmethod
    def open(cls, *urls: str, quotas: Quotas | None = None, **options: Any) -> Store:
        """A store of the tiers at these addresses; without any, memory (1 GiB) over files (20 GiB) in the user's cache."""
        urls = urls or ("memory://?max=1GiB", f"{cache_folder().as_uri()}?max=20GiB")
        tiers: list[Tier] = []
        try:
            for url in urls:
                tiers.append(open_tier(url, quotas))
            return cls(*tiers, **options)
        except BaseException:
            for tier in tiers:
                tier.close()
            raise

    def attach(
        self, model: PreTrainedModel, tokenizer: Any = None, recipe: Recipe | str = "full", **options: Any
    ) -> Attached:
        """A model whose prompts are looked for here, and saved here: `kvloom.store.attach` with this store."""
        from kvloom.store.session import attach

        return attach(model, tokenizer, recipe, store=self, **options)

    def put(
        self,
        key: ChunkKey,
        tensors: Mapping[Place, Tensor],
        *,
        seconds: float = 0.0,
        notes: Mapping[str, Any] | None = None,
        coding: str = "raw",
        identity: Identity | None = None,
    ) -> bool:
        """Stores a chunk; True if a tier has it now or will have it. `seconds`: what computing it took, for eviction.

        `coding`: "raw", "zstd", "rans" or "best" (of these), all exact; or a lossy one, such as "cachegen(level=2)", a variant of the chunk that only
        a `get` with the same coding finds.

        Raises StoreError for tensors that no frame can hold, and, with the key's `identity`, for such as do not agree with it.
        """
        if identity is not None:
            identity.check(key, tensors)
        notes = {**(notes or {}), "seconds": float(seconds)}
        key, tensors, pages, notes = stored(key, tensors, coding, notes)
        data = pack(key, tensors, notes=notes, coding=pages, limit=self.limit).toreadonly()
        kept = [self._place(i, key, data, seconds) for i in range(len(self._guards))]
        return any(kept)

    def _place(self, i: int, key: ChunkKey, data: Buffer, seconds: float, *, wait: bool = False) -> bool:
        """Writes to one tier, now or in the background."""
        guard = self._guards[i]
        facts = Facts(key.tenant, seconds, key.start)

        def write() -> bool:
            new = self._call(i, lambda deadline: guard.tier.put(key.digest, data, facts, deadline))
            if new:
                self._count(i, "puts")
                with self._lock:
                    self._banned.pop((i, key.digest), None)
            return new is not None

        if guard.tier.quick or (self.write == "through" and not wait):
            return write()
        if self._writer.offer(write):
            return True
        self._count(i, "not queued")
        return False

    def get(
        self,
        key: ChunkKey,
        layers: Iterable[int] | None = None,
        *,
        into: Mapping[Place, Tensor] | None = None,
        coding: str = "raw",
    ) -> dict[Place, Tensor] | None:
        """The tensors of a chunk, or None. `layers`: only those are read. `into`: buffers to copy to.

        A chunk read as a whole from a slower tier is copied to the faster ones. Buffers may be written to before all of the
        chunk is verified: after a miss they hold anything. They are not written to once this has returned. Raises StoreError for layers that the
        chunk does not have and buffers that do not fit; never for a tier that fails.
        """
        key = key_of(key, coding)
        hit = self.find(key, layers, into=None if key.variant else into)
        return None if hit is None else opened(hit.tensors, coding, into)

    def find(
        self,
        key: ChunkKey,
        layers: Iterable[int] | None = None,
        *,
        into: Mapping[Place, Tensor] | None = None,
        lend: bool = False,
        deadline: float | None = None,
    ) -> Hit | None:
        """`get`, and where the chunk was. `lend`: tensors may be the tier's own memory, not to be written to.

        `deadline`: seconds for all tiers together, where that is less than each one's own.
        """
        wanted = None if layers is None else list(layers)
        whole = Deadline(self.deadline * len(self._guards) if deadline is None else deadline)
        for i in range(len(self._guards)):
            if (i, key.digest) in self._banned:
                self._count(i, "misses")
                continue
            hit = self._read(i, key, wanted, into, lend, Deadline(min(self.deadline, whole.left())))
            if hit is not None:
                return hit
        self._count(None, "misses")
        return None

    @property
    def quick(self) -> bool:
        """Whether no tier ever waits for anything."""
        return all(guard.tier.quick for guard in self._guards)

    def _read(
        self,
        i: int,
        key: ChunkKey,
        layers: list[int] | None,
        into: Mapping[Place, Tensor] | None,
        lend: bool,
        deadline: Deadline,
    ) -> Hit | None:
        guard = self._guards[i]

        def fetch(start: int, stop: int) -> Buffer | None:
            return guard.call(lambda d: guard.tier.get(key.digest, start, stop, d), deadline)

        if into is not None and (not i or layers is not None):
            return self._stream(i, key, layers, into, deadline)
        try:
            data = fetch(0, self.limit + 1 if layers is None else HEAD)
            if data is None:
                self._count(i, "misses")
                return None
            frame = Frame.open(data, self.limit) if layers is None else Frame(data, fetch, self.limit)
            other = frame.matches(key)
            if other:
                self._count(i, "wrong")
                self._quarantine(i, key, other)
                return None
            # memory that a tier shares is read-only, so it is lent or copied; bytes read for us alone are neither
            tensors = frame.read(layers, into=into, copy=False, lend=lend)
            if i and layers is None:
                # a copy, made before the caller can write to the tensors
                self._promote(i, key, frame, copied(data).toreadonly())
        except DamagedFrame as error:
            self._count(i, "damaged")
            self._quarantine(i, key, str(error))
            return None
        except TierError as error:
            self._failed(i, error)
            return None
        self._count(i, "hits")
        self._count(None, "hits")
        return Hit(tensors, dict(frame.header.notes), self._name(i), frame.nbytes)

    def _stream(
        self, i: int, key: ChunkKey, layers: list[int] | None, into: Mapping[Place, Tensor], deadline: Deadline
    ) -> Hit | None:
        """Reads to the caller's buffers, without a copy of the frame in between."""
        guard, permit = self._guards[i], Permit()

        def load(d: Deadline) -> Hit | StoreError | str | None:
            tier = guard.tier
            head = tier.get(key.digest, 0, HEAD, d)
            if head is None:
                return None
            try:
                frame = Frame(head, lambda start, stop: tier.get(key.digest, start, stop, d), self.limit)
                other = frame.matches(key)
                if other:
                    return other
                read = partial(tier.read_into, key.digest, deadline=d)
                tensors = read_pages(frame, layers, into, lambda start, sink: read(start, sink), permit)
            except TierError:
                raise
            except StoreError as error:  # not the tier's failure
                return error
            return Hit(tensors, dict(frame.header.notes), self._name(i), frame.nbytes)

        try:
            found = guard.call(load, deadline)
        except TierError as error:
            permit.revoke()
            self._failed(i, error)
            return None
        if isinstance(found, DamagedFrame | str):
            kind = "wrong" if isinstance(found, str) else "damaged"
            self._count(i, kind)
            self._quarantine(i, key, str(found))
            return None
        if isinstance(found, StoreError):
            raise found
        self._count(i, "misses" if found is None else "hits")
        if found is not None:
            self._count(None, "hits")
        return found

    def _promote(self, i: int, key: ChunkKey, frame: Frame, data: Buffer) -> None:
        seconds = frame.header.notes.get("seconds", 0.0)
        for faster in range(i):
            if self._place(faster, key, data, seconds if isinstance(seconds, float) else 0.0, wait=True):
                self._count(faster, "promoted")

    def _quarantine(self, i: int, key: ChunkKey, why: str) -> None:
        """A chunk that is not what it should be is removed; where that fails it is not read again."""
        guard = self._guards[i]
        log.warning("%s: chunk %s is not what was stored (%s); removed", guard.tier.name, key.digest, why)
        with self._lock:
            self._banned[i, key.digest] = None
            while len(self._banned) > BANNED:
                del self._banned[next(iter(self._banned))]
        if self._call(i, lambda deadline: guard.tier.delete(key.digest, deadline)) is not None:
            with self._lock:
                self._banned.pop((i, key.digest), None)

    def size(self, key: ChunkKey) -> int | None:
        """Bytes of what a tier has under the key, None without it; only reading verifies what it is."""
        for i, guard in enumerate(self._guards):
            size = self._call(i, lambda deadline, tier=guard.tier: tier.size(key.digest, deadline))  # type: ignore[misc]
            if size is not None and (i, key.digest) not in self._banned:
                return int(size)
        return None

    def contains(self, key: ChunkKey) -> bool:
        """Whether a tier has something under the key."""
        return self.size(key) is not None

    def match(self, keys: Sequence[ChunkKey]) -> int:
        """How many chunks, from the first on, the tiers have. Pin them to keep them until they are read."""
        return next((n for n, key in enumerate(keys) if not self.contains(key)), len(keys))

    def pin(self, keys: Iterable[ChunkKey], seconds: float = 60.0) -> str:
        """Keeps chunks from eviction, in tiers that evict by themselves, until `unpin` or for some seconds. The lease."""
        lease = uuid.uuid4().hex
        for key in keys:
            for i, guard in enumerate(self._guards):
                self._call(i, lambda d, t=guard.tier, k=key.digest: t.pin(k, lease, seconds, d))  # type: ignore[misc]
        return lease

    def unpin(self, lease: str) -> None:
        """Ends a lease before its time."""
        for i, guard in enumerate(self._guards):
            self._call(i, lambda deadline, tier=guard.tier: tier.unpin(lease, deadline))  # type: ignore[misc]

    def delete(self, key: ChunkKey) -> bool:
        """Removes a chunk from all tiers that can be reached; True if one had it."""
        gone = [self._call(i, lambda d, t=guard.tier: t.delete(key.digest, d)) for i, guard in enumerate(self._guards)]  # type: ignore[misc]
        return any(gone)

    def prefetch(self, keys: Iterable[ChunkKey]) -> int:
        """Brings chunks to the fastest tier in the background; how many the queue took."""
        taken = 0
        for key in keys:
            if not self._prefetcher.offer(partial(self.get, key)):
                self._count(None, "not queued")
                break
            taken += 1
        return taken

    def stat(self) -> dict[str, dict[str, int | None]]:
        """Counters of the store ("") and of each tier by name, with what the tiers that answer hold."""
        with self._lock:
            counts = dict(self._counts)
        report: dict[str, dict[str, int | None]] = {"": {}}
        for i, guard in enumerate(self._guards):
            entry = report.setdefault(self._name(i), {})
            held = self._call(i, guard.tier.stat)
            if held is not None:
                entry.update(count=held.count, nbytes=held.nbytes, max=held.max)
        for counter, n in counts.items():
            tier, _, what = counter.rpartition("|")
            report[tier][what] = n
        return report

    def flush(self, seconds: float = 30.0) -> bool:
        """Waits for what was put or asked for in the background; False if that takes longer."""
        return self._writer.flush(seconds) and self._prefetcher.flush(seconds)

    def close(self, seconds: float = 30.0) -> None:
        """Flushes and closes all tiers."""
        for background in (self._prefetcher, self._writer):
            if not background.close(seconds):
                log.warning("the store was closed before all of its background work was done")
        for guard in self._guards:
            guard.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _name(self, i: int) -> str:
        name = self._guards[i].tier.name
        same = [guard.tier.name for guard in self._guards].count(name) > 1
        return f"{name}#{i}" if same else name

    def _call(self, i: int, do: Callable[[Deadline], Any]) -> Any:
        """What a tier answers; None, counted, if it fails."""
        try:
            return self._guards[i].call(do, Deadline(self.deadline))
        except TierError as error:
            self._failed(i, error)
            return None

    def _failed(self, i: int, error: TierError) -> None:
        kinds = {TierTimeout: "late", TierFull: "full", TierDown: "skipped"}
        kind = kinds.get(type(error), "errors")
        self._count(i, kind)
        log.log(logging.DEBUG if kind in ("skipped", "full") else logging.WARNING, "%s", error)

    def _count(self, i: int | None, what: str) -> None:
        with self._lock:
            self._counts[f"{'' if i is None else self._name(i)}|{what}"] += 1
