"""The store behind the beginnings that the engine keeps: read when a request begins, written when one is kept, by other threads.

A store may be slow or down: a request waits for it until a deadline, others not at all, and no answer depends on it.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from kvloom.core.blocks import Assembly, adopt, blockwise
from kvloom.core.cache import KVCache
from kvloom.engine.live import Live
from kvloom.engine.pool import Pool
from kvloom.engine.sequence import Outline, Sequence
from kvloom.store import snapshot
from kvloom.store.guard import Background
from kvloom.store.identity import START, ChunkKey, Identity, chunk_keys
from kvloom.store.store import Store
from kvloom.store.tier import Deadline

__all__ = ["Job", "Shelf"]

log = logging.getLogger("kvloom.engine")
QUEUE = 64  # parts that wait to be written; more are not written
READERS = 4  # requests that read at once
LEASE = 60.0  # seconds that chunks are kept from eviction while they are read
KNOWN = 1 << 16  # chunks that are known to be stored

Found = tuple[int, Sequence] | None


@dataclass(eq=False)
class Job:
    """A request that reads, or a part that is written (`request` is None). It holds memory until it is done."""

    request: Live | None
    done: Future[Found] = field(default_factory=Future)
    given_up: bool = False


@dataclass(frozen=True)
class _Form:
    """How caches of one recipe are stored. `blank`: an empty cache, to be copied."""

    identity: Identity
    blank: KVCache
    whole: str  # variant of chunks that hold all of a text; "" where each holds a part


class Shelf:
    """`part`: tokens of a chunk. `deadline`: seconds that a request waits for what is stored of it.

    Raises StoreError for a model or a recipe whose caches can't be stored.
    """

    def __init__(
        self, store: Store, model: PreTrainedModel, outlines: dict[str, Outline], part: int, deadline: float, pool: Pool
    ) -> None:
        self.store, self.part, self.deadline, self.pool = store, part, deadline, pool
        self.device, self.jobs = model.device, dict[Job, None]()
        self._forms = {outline: self._form(model, name) for name, outline in outlines.items()}
        self._known: OrderedDict[str, None] = OrderedDict()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="kvloom shelf")
        self._writer = Background("kvloom shelf writer", QUEUE)

    def _form(self, model: PreTrainedModel, name: str) -> _Form:
        blank = KVCache(model, name)
        identity = Identity.of(model, None, name, block=self.part)
        return _Form(identity, blank, "" if blockwise(blank.recipe) else f"whole, fed in parts of {self.part}")

    def _keys(self, r: Live, stop: int) -> list[ChunkKey]:
        """The keys of the parts of a request's text up to `stop`, each behind the one before."""
        done = len(r.chain) * self.part
        if done + self.part <= stop:
            own = self._forms[r.outline].identity
            identity = replace(own, salt=r.request.salt, adapter=r.adapter or own.adapter)
            context = r.chain[-1].digest if r.chain else START
            r.chain += chunk_keys(identity, r.tokens[done:stop], self.part, context=context, start=done)
        return r.chain[: stop // self.part]

    # ---- in

    def fetch(self, r: Live, stop: int) -> None:
        """Looks for more of the first `stop` tokens of a request, which has begun, than its sequence holds: `r.loading`."""
        assert r.sequence is not None
        keys = self._keys(r, stop)
        if len(keys) * self.part > r.length:
            r.loading = job = Job(r)
            self.jobs[job] = None
            base, form, limit = r.sequence.fork(), self._forms[r.outline], Deadline(self.deadline)
            self._readers.submit(self._fetch, job, form, keys, base, limit)

    def coming(self, r: Live) -> bool:
        """Whether another request reads what this one begins with, too."""
        first = r.tokens[: self.part] if self.jobs else []
        return any(
            x is not None and x is not r and x.space == r.space and x.tokens[: self.part] == first
            for x in (job.request for job in self.jobs)
        )

    def leave(self, r: Live) -> None:
        """A request that waits no longer; memory stays promised for what is on its way still."""
        if r.loading is not None:
            r.loading.given_up = True
            self.pool.promise(r.loading, self.pool.promise_of(r))
            r.loading = None

    def collect(self) -> Iterator[tuple[Live, int, Sequence]]:
        """Ends what is done. Yields requests whose sequences have come, with their lengths."""
        for job in [x for x in self.jobs if x.done.done()]:
            del self.jobs[job]
            self.pool.drop(job)
            r = job.request
            if r is not None and r.loading is job:
                r.loading, found = None, job.done.result()
                if found is not None:
                    yield r, *found

    def wait(self, seconds: float) -> None:
        """Waits until something is done."""
        wait([job.done for job in self.jobs], seconds, "FIRST_COMPLETED")

    def _fetch(self, job: Job, form: _Form, keys: list[ChunkKey], base: Sequence, limit: Deadline) -> None:
        found, reader = None, snapshot.Reader(self.store)
        try:
            if not job.given_up:
                found = (self._whole if form.whole else self._parts)(job, form, reader, keys, base, limit)
        except Exception as error:  # whatever a store does, the prompt can be computed
            log.warning("reading from the store failed, the prompt is computed: %s: %s", type(error).__name__, error)
        finally:
            reader.close()
            job.done.set_result(found)

    def _parts(
        self, job: Job, form: _Form, reader: snapshot.Reader, keys: list[ChunkKey], base: Sequence, limit: Deadline
    ) -> Found:
        cache, start = adopt(copy.deepcopy(form.blank), base.layers), base.length
        dtype = getattr(torch, form.identity.dtype)
        shapes = [(*layer, dtype) for layer in form.identity.layout]
        assembly = Assembly(cache, shapes, len(keys) * self.part - start, self.device)
        keys = keys[start // self.part :]
        lease = reader.pin(keys, LEASE)
        try:
            for key, hit in zip(keys, reader.read(keys, limit), strict=False):
                if job.given_up or not snapshot.add_block(self.store, key, hit, assembly):
                    break
            assembly.finish()
        finally:
            reader.unpin(lease)
        return (assembly.length, _taken(base, cache)) if assembly.length > start else None

    def _whole(
        self, job: Job, form: _Form, reader: snapshot.Reader, keys: list[ChunkKey], base: Sequence, limit: Deadline
    ) -> Found:
        while keys and len(keys) * self.part > base.length and not job.given_up and limit.left() > 0:
            key, cache = self._all(keys, form), copy.deepcopy(form.blank)
            for hit in reader.read([key], limit):
                if snapshot.load_whole(self.store, key, hit, cache, self.device, len(keys) * self.part):
                    return len(keys) * self.part, _taken(base, cache)
            keys = keys[:-1]
        return None

    @staticmethod
    def _all(keys: list[ChunkKey], form: _Form) -> ChunkKey:
        """The key of the state behind these parts."""
        return keys[-1].at(form.whole)

    # ---- out

    def save(self, r: Live, sequence: Sequence, seconds: float) -> None:
        """Writes what a sequence that is kept holds, or its last part. `seconds`: what computing a token takes."""
        keys, form = self._keys(r, sequence.length), self._forms[r.outline]
        if form.whole and r.outline.chains and sequence.length != (r.prompt - 1) // self.part * self.part:
            return  # a longer state follows, with all of this in it
        key = self._all(keys, form) if form.whole else keys[-1]
        if key.digest in self._known:
            return
        job = Job(None)
        identity = replace(form.identity, salt=r.request.salt, adapter=r.adapter or form.identity.adapter)
        self.pool.hold(job, sequence.storages())
        self.jobs[job] = None
        tokens = sequence.length if form.whole else self.part
        if not self._writer.offer(lambda: self._save(job, key, identity, form, sequence, seconds * tokens)):
            job.done.set_result(None)

    def _save(
        self, job: Job, key: ChunkKey, identity: Identity, form: _Form, sequence: Sequence, seconds: float
    ) -> None:
        try:
            cache = adopt(copy.deepcopy(form.blank), sequence.layers)
            save = snapshot.save_whole if form.whole else snapshot.save_block
            if save(self.store, key, identity, cache, seconds, "raw"):
                self._known[key.digest] = None
                while len(self._known) > KNOWN:
                    self._known.popitem(last=False)
        except Exception as error:  # the next one may be taken
            log.warning("a part is not stored: %s: %s", type(error).__name__, error)
        finally:
            job.done.set_result(None)

    def flush(self, seconds: float = 30.0) -> bool:
        """Waits until all is written that is to be; False if that takes longer."""
        return self._writer.flush(seconds) and self.store.flush(seconds)

    def close(self, seconds: float = 30.0) -> None:
        """Flushes, and lets its threads go. The store stays open."""
        self._writer.close(seconds)
        self._readers.shutdown(wait=False, cancel_futures=True)


def _taken(base: Sequence, cache: KVCache) -> Sequence:
    """The layers that a cache was filled with, as a sequence."""
    carry = base.layers[0].carry
    for i, layer in enumerate(cache.managed()):
        base.layers[i] = layer.rows[0].layer
        base.layers[i].carry = carry
    return base
