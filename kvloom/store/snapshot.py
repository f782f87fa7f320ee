"""Caches of models as chunks of a store: whole ones, and block by block. What does not fit is a miss, never an error."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from typing import Any

import torch
from torch import Tensor

from kvloom.core.blocks import Assembly, block_of
from kvloom.core.cache import KVCache
from kvloom.core.portable import Part, State, dump, load
from kvloom.errors import KvloomError, StoreError
from kvloom.store.frame import Place
from kvloom.store.identity import ChunkKey, Identity
from kvloom.store.store import Hit, Store
from kvloom.store.tier import Deadline

__all__ = ["Reader", "add_block", "load_whole", "save_block", "save_whole"]

log = logging.getLogger("kvloom.store")
FACTS = Place(0, "facts", "json")
AHEAD = 4  # chunks that are fetched at once from tiers that may have to wait


def save_block(store: Store, key: ChunkKey, identity: Identity, cache: KVCache, seconds: float, coding: str) -> int:
    """Stores what tokens [key.start, ...) added to a cache. The bytes of its tensors; 0 if nobody took them."""
    parts = block_of(cache, key.start, key.start + len(key.tokens))
    return _put(store, key, identity, {Place(*part): x for part, x in parts.items()}, seconds, coding)


def save_whole(store: Store, key: ChunkKey, identity: Identity, cache: KVCache, seconds: float, coding: str) -> int:
    """Stores a cache that holds the key's tokens, as it is. The bytes of its tensors; 0 if nobody took them."""
    state = dump(cache)
    tensors: dict[Place, Tensor] = {Place(*part): x for part, x in state.tensors.items()}
    text = json.dumps(state.facts, allow_nan=False).encode()
    tensors[FACTS] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return _put(store, key, None, tensors, seconds, coding)


def _put(
    store: Store, key: ChunkKey, identity: Identity | None, tensors: Mapping[Place, Tensor], seconds: float, coding: str
) -> int:
    try:
        kept = store.put(key, tensors, seconds=seconds, identity=identity, coding=coding)
    except StoreError as error:  # too long a text, say: generation goes on without
        log.warning("chunk %s is not stored: %s", key.digest, error)
        return 0
    return sum(x.nbytes for x in tensors.values()) if kept else 0


def add_block(store: Store, key: ChunkKey, hit: Hit, assembly: Assembly, rows: int | None = None) -> bool:
    """Adds a chunk to the cache that is being put together; False, and the chunk is gone, if it is none of this cache's."""
    try:
        assembly.add(key.start + len(key.tokens), {Part(*place): x for place, x in hit.tensors.items()}, rows)
    except KvloomError as error:
        _unfit(store, key, error)
        return False
    return True


def load_whole(
    store: Store, key: ChunkKey, hit: Hit, cache: KVCache, device: torch.device, length: int | None = None
) -> bool:
    """Fills an empty cache; False, and the chunk is gone, if it is none of this cache's. `length`: other than the key's."""
    length = len(key.tokens) if length is None else length
    tensors: dict[Place, Tensor] = dict(hit.tensors)
    try:
        facts = json.loads(tensors.pop(FACTS).numpy().tobytes())
        load(cache, State(facts, {Part(*place): x for place, x in tensors.items()}), device)
        if cache.get_seq_length() != length:
            raise StoreError(f"a state of {cache.get_seq_length()} tokens under a key of {length}")
    except (KvloomError, KeyError, TypeError, ValueError, RecursionError) as error:
        _unfit(store, key, error)
        cache.reset()
        return False
    return True


def _unfit(store: Store, key: ChunkKey, why: Exception) -> None:
    log.warning("chunk %s came back as it was stored, but does not fit; removed: %s", key.digest, why)
    store.delete(key)


class Reader:
    """Reads chunks one after another; from tiers that may have to wait, some are on the way while the first is used."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._pool: ThreadPoolExecutor | None = None

    def read(self, keys: Sequence[ChunkKey], deadline: Deadline | None = None) -> Iterator[Hit]:
        """The chunks up to the first that is missing or late. Their tensors are only to be read, until the next one."""
        if self.store.quick:
            for key in keys:
                hit = None if self._over(deadline) else self.store.find(key, lend=True, deadline=self._left(deadline))
                if hit is None:
                    return
                yield hit
            return
        waiting: list[Future[Hit | None]] = []
        try:
            for i in range(len(keys)):
                for key in keys[i + len(waiting) : i + AHEAD]:
                    waiting.append(self._start(key, deadline))
                try:
                    hit = waiting.pop(0).result(self._left(deadline))
                except (Late, CancelledError):
                    return
                if hit is None:
                    return
                yield hit
        finally:
            for future in waiting:
                future.cancel()

    def _start(self, key: ChunkKey, deadline: Deadline | None) -> Future[Hit | None]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="kvloom read")
        left = self._left(deadline)
        return self._pool.submit(lambda: self.store.find(key, lend=True, deadline=left))

    @staticmethod
    def _left(deadline: Deadline | None) -> float | None:
        return None if deadline is None else deadline.left()

    @staticmethod
    def _over(deadline: Deadline | None) -> bool:
        return deadline is not None and deadline.left() <= 0

    def pin(self, keys: Sequence[ChunkKey], seconds: float) -> Any:
        """Keeps chunks from eviction while they are read, without making anybody wait for it; `unpin` with what it gives."""
        if self.store.quick:
            return self.store.pin(keys, seconds)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="kvloom read")
        return self._pool.submit(self.store.pin, list(keys), seconds)

    def unpin(self, lease: Any) -> None:
        """Ends the lease."""
        if isinstance(lease, Future):
            lease.add_done_callback(lambda done: None if done.cancelled() else self.store.unpin(done.result()))
        else:
            self.store.unpin(lease)

    def close(self) -> None:
        """Lets its threads go."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
