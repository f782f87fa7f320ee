"""Fills caches: loads what a store has of a prompt, computes the rest, saves it. How is said in `kvloom.store.session`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import PreTrainedModel

from kvloom.core.blocks import Assembly
from kvloom.core.cache import KVCache
from kvloom.core.view import last_logits
from kvloom.errors import CacheError, StoreError
from kvloom.store import snapshot
from kvloom.store.identity import START, ChunkKey, Identity, chunk_keys
from kvloom.store.prompt import Span
from kvloom.store.tier import Deadline

if TYPE_CHECKING:
    from kvloom.store.session import Attached

__all__ = ["Filler", "Program", "Report"]

log = logging.getLogger("kvloom.store")
LEASE = 60.0  # seconds that chunks are kept from eviction while a prompt is read


class Program(Protocol):
    """Uses documents that stand anywhere in a prompt, as `kvloom.programs` do."""

    def __call__(self, cache: KVCache, tokens: Sequence[int], spans: Sequence[Span]) -> None:
        """Brings a cache, which holds the first tokens already, up to all of `tokens`. `spans`: documents that begin later."""


@dataclass
class Report:
    """What `prefill` did. `reused`: tokens by the tier that had them; `left`: tokens that `generate` feeds.

    `seconds`: "lookup" (identity and keys), "load" (tiers, checksums, putting together), "compute", "save".
    `mixed`: a program reused documents, so what the cache holds is never stored as the text's own.
    """

    tokens: int
    reused: dict[str, int] = field(default_factory=dict)
    computed: int = 0
    left: int = 0
    loaded_bytes: int = 0
    saved_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    mixed: bool = False

    @property
    def hits(self) -> int:
        """Tokens that were not computed."""
        return sum(self.reused.values())

    def __str__(self) -> str:
        reused = ", ".join(f"{n:,} from {tier}" for tier, n in self.reused.items()) or "none from the store"
        times = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in self.seconds.items())
        return f"{self.tokens:,} tokens: {reused}, {self.computed:,} computed, {self.left:,} left to generate ({times})"


class Filler:
    """Caches of one model for one tenant. `stored`: digests of chunks that the store is known to have."""

    def __init__(self, attached: Attached, tenant: str) -> None:
        self.attached, self.tenant = attached, tenant
        self.stored: set[str] = set()
        self._last: tuple[Identity, list[ChunkKey]] | None = None  # of the last prompt
        self._rate = 0.0  # seconds that computing a token took

    def fill(
        self, tokens: list[int], target: int, spans: Sequence[Span] = (), deadline: float | None = None
    ) -> tuple[KVCache, Report]:
        """A cache of the first `target` tokens: loaded as far as it goes, computed from there on, and saved.

        Where tokens are stored one by one, what follows the last whole block is not computed here: `generate` feeds it with
        the last token, in one forward instead of two.
        """
        attached, clock = self.attached, _Clock(self.attached.model)
        if attached.model.training:
            raise StoreError("the model is in training mode, where dropout changes numbers; call model.eval() first.")
        report = Report(len(tokens))
        limit = None if deadline is None else Deadline(deadline)
        identity = attached.identity(self.tenant)
        if attached.mode == "whole":
            keys = [ChunkKey(identity.digest, START, 0, tuple(tokens[:target]), identity.tenant)] if target else []
        else:
            keys = chunk_keys(identity, tokens, attached.block)
            keys = [key for key in keys if key.start < target]
        for key in keys:
            key.digest  # noqa: B018  # computed here, where time is counted as lookup
        self._last = (identity, keys)
        report.seconds["lookup"] = clock.lap()
        try:
            cache = self._load(keys, tokens, target, identity, report, limit)
        except Exception as error:  # whatever a store does, the prompt can be computed
            log.warning("loading failed, the prompt is computed: %s: %s", type(error).__name__, error)
            cache, report.reused, report.loaded_bytes = KVCache(attached.model, attached.recipe), {}, 0
        report.seconds["load"] = clock.lap()
        have = cache.get_seq_length()
        later = [span for span in spans if span.start >= have]
        if later and attached.program is not None and attached.mode == "rows":
            report.mixed = True
            attached.program(cache, tokens[:target], later)
            if cache.get_seq_length() != target:
                raise CacheError(f"the program left {cache.get_seq_length()} tokens in the cache, not {target}.")
            report.computed, report.seconds["compute"] = target - have, clock.lap()
        else:
            if attached.mode == "rows":
                target = max(have, target // attached.block * attached.block)
            self._compute(cache, tokens, target, keys, identity, report, clock)
        report.left = len(tokens) - target
        return cache, report

    def _load(
        self,
        keys: list[ChunkKey],
        tokens: list[int],
        target: int,
        identity: Identity,
        report: Report,
        limit: Deadline | None,
    ) -> KVCache:
        attached, cache = self.attached, KVCache(self.attached.model, self.attached.recipe)
        if not keys:
            return cache
        reader, store, device = attached.reader, attached.store, attached.model.device
        lease = reader.pin(keys, LEASE)
        try:
            if attached.mode == "whole":
                for hit in reader.read(keys, limit):
                    if snapshot.load_whole(store, keys[0], hit, cache, device):
                        self._note(keys[0], hit, target, report)
                return cache
            dtype = getattr(torch, identity.dtype)
            assembly = Assembly(cache, [(*layer, dtype) for layer in identity.layout], target, device)
            for key, hit in zip(keys, reader.read(keys, limit)):
                rows = min(len(key.tokens), target - key.start)
                if not snapshot.add_block(store, key, hit, assembly, rows if rows < len(key.tokens) else None):
                    break
                self._note(key, hit, rows, report)
            have = assembly.length
            if attached.mode == "rows" and have < target and have % attached.block == 0:
                context = keys[have // attached.block - 1].digest if have else START
                near = attached.radix.longest(identity.digest, context, tokens[have:target])
                for hit in reader.read([near[0]], limit) if near else ():
                    if near and snapshot.add_block(store, near[0], hit, assembly, near[1]):
                        self._note(near[0], hit, near[1], report)
                if near and assembly.length == have:
                    attached.radix.forget(near[0])
            assembly.finish()
        finally:
            reader.unpin(lease)
        return cache

    def _note(self, key: ChunkKey, hit: Any, rows: int, report: Report) -> None:
        report.reused[hit.tier] = report.reused.get(hit.tier, 0) + rows
        report.loaded_bytes += hit.nbytes
        self.stored.add(key.digest)
        self.attached.radix.add(key)

    def _compute(
        self,
        cache: KVCache,
        tokens: list[int],
        target: int,
        keys: list[ChunkKey],
        identity: Identity,
        report: Report,
        clock: _Clock,
    ) -> None:
        """Feeds what is missing, and stores the chunks that are complete."""
        have, block, mode = cache.get_seq_length(), self.attached.block, self.attached.mode
        report.computed = target - have
        computing = saving = 0.0
        borders = [*range(have + block, target, block), target] if mode == "blocks" else [target]
        while have < target:
            stop = borders.pop(0)
            _feed(self.attached.model, cache, tokens[have:stop])
            took = clock.lap()
            computing += took
            self._rate = took / (stop - have)
            for key in keys:
                end = key.start + len(key.tokens)
                if have < end <= stop:
                    report.saved_bytes += self._save(key, identity, cache, self._rate * len(key.tokens))
            saving += clock.lap()
            have = stop
        report.seconds |= {"compute": computing, "save": saving}

    def _save(self, key: ChunkKey, identity: Identity, cache: KVCache, seconds: float) -> int:
        save = snapshot.save_whole if self.attached.mode == "whole" else snapshot.save_block
        try:
            nbytes = save(self.attached.store, key, identity, cache, seconds, self.attached.coding)
        except Exception as error:
            log.warning("chunk %s is not stored: %s: %s", key.digest, type(error).__name__, error)
            return 0
        if nbytes:
            self.stored.add(key.digest)
            self.attached.radix.add(key)
        return nbytes

    def keep(self, cache: KVCache, tokens: Sequence[int]) -> int:
        """Stores the blocks of the last prompt, and of what it was continued with, from a cache that holds them row by row."""
        assert self._last is not None
        identity, known = self._last
        block = self.attached.block
        keys = [key for key in known if key.start + len(key.tokens) <= len(tokens)]
        done = len(keys) * block
        context = keys[-1].digest if keys else START
        keys += chunk_keys(identity, tokens[done:], block, context=context, start=done)
        new = [key for key in keys if key.digest not in self.stored]
        return sum(self._save(key, identity, cache, self._rate * block) for key in new)


class _Clock:
    """Seconds since the last lap, with what a GPU still has to do."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.cuda = model.device.type == "cuda"
        self.at = time.perf_counter()

    def lap(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        before, self.at = self.at, time.perf_counter()
        return self.at - before


@torch.no_grad()
def _feed(model: PreTrainedModel, cache: KVCache, tokens: Sequence[int]) -> None:
    model(torch.tensor([tokens], device=model.device), past_key_values=cache, use_cache=True, **last_logits(model))
