"""A chunk: the keys and values of a run of tokens, computed in some context, to be placed anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.cache import KVCache
from kvloom.core.rows import Rows
from kvloom.errors import CacheError, ModelError

if TYPE_CHECKING:
    from kvloom.store import ChunkKey, Identity, Store

__all__ = ["Chunk", "compute", "context_of", "key_of", "load", "save", "take"]

Note = str | int | float | bool | None


def context_of(prefix: Iterable[int]) -> str:
    """A digest of the tokens that a chunk was computed behind: 64 hex digits, "" for none."""
    tokens = [int(token) for token in prefix]
    if not tokens:
        return ""
    return hashlib.blake2b(" ".join(map(str, tokens)).encode(), digest_size=32, person=b"kvloom context").hexdigest()


@dataclass(frozen=True, eq=False)
class Chunk:
    """Keys and values of `tokens` in every layer, computed at the places `base`, `base + 1`, ... of some text.

    `rows[layer]`: k [H, n, D] post-RoPE at those places, v [H, n, Dv], in the model's dtype; `rows[layer].index` is `base`.
    `context`: `context_of` what stood before. `extra`: tensors of a method's own, by name, such as the attention that each
    token gave to what stood before; stored and loaded with the chunk. `notes`: small facts for people, stored with it
    but not loaded. Rows are shared with whoever holds the chunk: never write to them.
    """

    tokens: tuple[int, ...]
    base: int
    rows: tuple[Rows, ...]
    context: str = ""
    notes: Mapping[str, Note] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokens or not self.rows:
            raise CacheError("a chunk needs at least one token and one layer.")
        for i, rows in enumerate(self.rows):
            if rows.n != len(self.tokens) or rows.index != self.base:
                raise CacheError(
                    f"layer {i} of the chunk holds {rows.n} rows from {rows.index!r} for {len(self.tokens)} tokens from "
                    f"{self.base}; give as many rows as tokens, consecutive from the base."
                )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and extra tensors."""
        kept = [x for rows in self.rows for x in (rows.k, rows.v)] + list(self.extra.values())
        return sum(x.nbytes for x in kept)

    def to(self, device: torch.device) -> Chunk:
        """The chunk on a device; itself if it lies there."""
        if self.rows[0].k.device == device:
            return self
        rows = tuple(Rows(rows.k.to(device), rows.v.to(device), self.base) for rows in self.rows)
        return replace(self, rows=rows, extra={name: x.to(device) for name, x in self.extra.items()})

    def part(self, start: int, stop: int) -> Chunk:
        """The tokens [start, stop) of the chunk; they share its memory, and keep its context. Without `extra`."""
        if not 0 <= start < stop <= len(self):
            raise CacheError(f"part({start}, {stop}) of a chunk of {len(self)} tokens: give a stretch inside it.")
        base = self.base + start
        rows = tuple(Rows(rows.k[:, start:stop], rows.v[:, start:stop], base) for rows in self.rows)
        return Chunk(self.tokens[start:stop], base, rows, self.context, self.notes)


@torch.no_grad()
def compute(
    model: PreTrainedModel,
    tokens: Sequence[int],
    prefix: Sequence[int] = (),
    held: KVCache | None = None,
    notes: Mapping[str, Note] | None = None,
) -> Chunk:
    """The chunk of `tokens` (ids) as the model computes it behind `prefix`; alone at place 0 without one.

    `held`: an exact cache of just the prefix, if there is one already; it is forked, not changed. Raises ModelError for a
    model with layers that KVCache leaves alone (sliding windows) or does not serve.
    """
    text, before = [int(t) for t in tokens], [int(t) for t in prefix]
    if not text:
        raise CacheError("compute(tokens=[]): give at least one token.")
    cache = KVCache(model) if held is None else deepcopy(held)
    whole_model(cache)
    if held is not None and held.get_seq_length() != len(before):
        raise CacheError(
            f"held holds {held.get_seq_length()} tokens, the prefix has {len(before)}; they have to agree."
        )
    new = text if held is not None else before + text
    model.base_model(input_ids=torch.tensor([new], device=model.device), past_key_values=cache, use_cache=True)
    return take(cache, text, len(before), context_of(before), notes)


@torch.no_grad()
def take(
    cache: KVCache, tokens: Sequence[int], start: int, context: str, notes: Mapping[str, Note] | None = None
) -> Chunk:
    """The chunk that a cache of one sequence holds from place `start` on; a copy. `tokens`: the ids that stand there.

    Encoded slots are decoded, and the note "recipe" says what had encoded them. Raises CacheError where slots are missing.
    """
    whole_model(cache)
    n, rows = len(tokens), []
    for layer in cache.managed():
        if len(layer.rows) != 1:
            raise CacheError(
                f"take() from a cache of {len(layer.rows)} sequences: it takes one; batch_select_indices first."
            )
        segments = [segment for group in layer.rows[0].layer.groups for segment in group]
        segment = segments[0] if len(segments) == 1 else None
        index = None if segment is None else segment.index[0]
        at = None if index is None else torch.searchsorted(index, torch.tensor(start, device=index.device))
        first = 0 if at is None else int(at)
        want = torch.arange(start, start + n)
        if segment is None or index is None or not torch.equal(index[first : first + n].cpu().long(), want):
            raise CacheError(
                f"places {start} to {start + n} are not all in one class of layer {layer.site.layer} ({cache.recipe.name}): "
                "take chunks from a cache that drops nothing."
            )
        k, v = segment.key.dense(first, first + n), segment.value.dense(first, first + n)
        rows.append(Rows(k.to(layer.site.dtype, copy=True), v.to(layer.site.dtype, copy=True), start))
    known: dict[str, Note] = (
        {} if all(kind.exact for kind in cache.recipe.kinds.values()) else {"recipe": cache.recipe.name}
    )
    return Chunk(tuple(int(t) for t in tokens), start, tuple(rows), context, {**known, **(notes or {})})


def whole_model(cache: KVCache) -> None:
    """Raises ModelError if some layers are not the cache's to manage: a chunk has to hold all of them."""
    if cache.left_alone:
        kinds = ", ".join(sorted(set(cache.left_alone.values())))
        raise ModelError(
            f"layers {sorted(cache.left_alone)} of this model keep a cache of their own ({kinds}), so chunks cannot hold "
            "them. Text beyond the prefix is reused only where all layers attend to the whole text."
        )


def key_of(identity: Identity, tokens: Sequence[int], base: int = 0, context: str = "") -> ChunkKey:
    """The key under which a chunk of these tokens, computed there, is stored."""
    from kvloom.store import ChunkKey

    return ChunkKey(identity.digest, context, base, tuple(int(t) for t in tokens), identity.tenant)


def save(store: Store, identity: Identity, chunk: Chunk, seconds: float = 0.0) -> bool:
    """Puts a chunk into a store. `seconds`: what computing it took, for eviction."""
    from kvloom.store import Place

    tensors = {
        Place(i, name): x for i, rows in enumerate(chunk.rows) for name, x in (("key", rows.k), ("value", rows.v))
    }
    tensors |= {Place(0, "extra", name): x for name, x in chunk.extra.items()}
    key = key_of(identity, chunk.tokens, chunk.base, chunk.context)
    return store.put(key, tensors, seconds=seconds, notes=chunk.notes)


def load(store: Store, identity: Identity, tokens: Sequence[int], base: int = 0, context: str = "") -> Chunk | None:
    """The chunk of these tokens, computed at `base` behind `context`, or None. The store has compared every token."""
    key = key_of(identity, tokens, base, context)
    tensors: dict[Any, Tensor] | None = store.get(key)
    if tensors is None:
        return None
    layers = [i for i, plane, _ in tensors if plane == "key"]
    if sorted(layers) != list(range(len(identity.layout))):
        return None
    rows = tuple(Rows(tensors[i, "key", "x"], tensors[i, "value", "x"], base) for i in range(len(layers)))
    extra = {name: x for (_, plane, name), x in tensors.items() if plane == "extra"}
    return Chunk(key.tokens, base, rows, context, {}, extra)
