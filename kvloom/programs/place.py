"""Puts chunks into a cache, at other places of the text than they were computed at: one rotation of the keys per move."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kvloom.core.cache import KVCache, KVLayer
from kvloom.core.rope import Rope
from kvloom.core.rows import Rows
from kvloom.core.run import Buffer
from kvloom.core.segment import Segment
from kvloom.errors import CacheError, ModelError
from kvloom.programs.chunk import Chunk, whole_model

__all__ = ["insert", "main_of", "moved", "own", "place", "where_of"]


@torch.no_grad()
def place(cache: KVCache, chunk: Chunk | Sequence[Chunk], at: int | Sequence[int]) -> None:
    """Puts the rows of a chunk into a cache of one sequence, so that its first token stands at place `at` of the text.

    Keys are rotated once, from where they were computed, in fp32; values stay as they are. Several chunks at once, with as
    many places, cost one copy. Places that hold a row already are refused; places in between may stay empty until `feed`
    fills them. The length of the cache becomes one more than its last place.

    Raises CacheError for places that are taken and for a cache that drops, encodes or pads; ModelError where frequencies
    change with the length of the text (dynamic, longrope) or a layer's positions are no rotation.
    """
    chunks = [chunk] if isinstance(chunk, Chunk) else list(chunk)
    places = [at] if isinstance(at, int) else [int(x) for x in at]
    if len(chunks) != len(places) or any(x < 0 for x in places):
        raise CacheError(f"{len(chunks)} chunks at places {places}: give one place, 0 or more, for each.")
    if not chunks:
        return
    whole_model(cache)
    layers = list(cache.managed())
    order = sorted(range(len(chunks)), key=places.__getitem__)
    chunks, places = [chunks[i] for i in order], [places[i] for i in order]
    for (a, start), (_, after) in pairwise(zip(chunks, places)):
        if start + len(a) > after:
            raise CacheError(f"chunks at {start} ({len(a)} tokens) and {after} overlap; give each its own places.")
    for c in chunks:
        if len(c.rows) != len(layers):
            raise CacheError(
                f"a chunk of {len(c.rows)} layers for a model of {len(layers)}; compute it with this model."
            )
        for layer, rows in zip(layers, c.rows):
            _fits(layer, rows)
    ropes = _ropes(layers, any(c.base != start for c, start in zip(chunks, places)))
    index = torch.cat([torch.arange(start, start + len(c)) for c, start in zip(chunks, places)])
    for layer in layers:
        if layer.is_initialized:
            held = main_of(layer)
            at_hand = torch.isin(index, where_of(held))
            if bool(at_hand.any()):
                raise CacheError(f"place {int(index[at_hand][0])} of the text is in the cache already; crop it first.")
    turns: dict[int, list[Turn]] = {}
    for i, layer in enumerate(layers):
        rope = ropes[i]
        key = -1 if rope is None else next((j for j, r in enumerate(ropes[:i]) if r is not None and _same(r, rope)), i)
        if key not in turns:
            turns[key] = [Turn(rope, c.base, start, len(c)) for c, start in zip(chunks, places)]
        if not layer.is_initialized:
            layer.lazy_initialization(chunks[0].rows[i].k[None], chunks[0].rows[i].v[None])
        k = torch.cat([turn(c.rows[i].k) for turn, c in zip(turns[key], chunks)], 1)
        insert(layer, Rows(k, torch.cat([c.rows[i].v for c in chunks], 1), index.int()[None]))


def moved(chunk: Chunk, layer: KVLayer, at: int) -> Rows:
    """The rows of one layer of a chunk as they would stand at place `at`; a copy of the keys."""
    rows = chunk.rows[layer.site.layer]
    return Rows(Turn(_ropes([layer], chunk.base != at)[0], chunk.base, at, len(chunk))(rows.k), rows.v, at)


class Turn:
    """The rotation that takes keys of n consecutive places from `base` to `at`; angles are computed once for all layers."""

    def __init__(self, rope: Rope | None, base: int, at: int, n: int) -> None:
        self.rope = None if base == at else rope
        self.where, self.delta = torch.arange(base, base + n), at - base

    def __call__(self, k: Tensor) -> Tensor:
        return k if self.rope is None else self.rope.shift(k, self.delta, self.where.to(k.device))


def _same(a: Rope, b: Rope) -> bool:
    facts = [(r.layout, r.rotary_dim, r.offset, r.kind) for r in (a, b)]
    return facts[0] == facts[1] and torch.equal(a.inv_freq, b.inv_freq)


def _ropes(layers: list[KVLayer], move: bool) -> list[Rope | None]:
    """How each layer rotates its keys. Raises ModelError if chunks cannot move in this model."""
    if not move:
        return [None] * len(layers)
    ropes = [layer.site.rope for layer in layers]
    varies = next((rope for rope in ropes if rope is not None and rope.varies), None)
    if varies is not None:
        raise ModelError(
            f"frequencies of this model's {varies.kind!r} RoPE change with the length of the text, so no rotation moves "
            "keys. Place chunks where they were computed, or give the model a fixed kind such as 'yarn'."
        )
    if all(rope is None for rope in ropes):
        raise ModelError(
            "this model rotates no keys: its positions are learned, or added to the logits. Place chunks where they "
            "were computed."
        )
    return ropes  # a layer without rotation among others has keys that know no place (NoPE)


def _fits(layer: KVLayer, rows: Rows) -> None:
    site = layer.site
    shape = (rows.k.shape[0], rows.k.shape[2], rows.v.shape[2], rows.k.dtype)
    if layer.is_initialized and shape != (site.kv_heads, site.key_dim, site.value_dim, site.dtype):
        raise CacheError(
            f"layer {site.layer}: the chunk has {shape[0]} heads of {shape[1]} and {shape[2]} channels in {shape[3]}, the "
            f"cache {site.kv_heads} of {site.key_dim} and {site.value_dim} in {site.dtype}. Compute it with this model."
        )


def main_of(layer: KVLayer) -> Segment:
    """The one segment that a layer of an exact cache of one sequence holds; CacheError for other caches."""
    recipe = layer.cache.recipe
    if recipe.policy or not all(kind.exact for kind in recipe.kinds.values()):
        raise CacheError(f"{recipe.name} drops or encodes slots; partial prefill needs an exact cache: KVCache(model).")
    if len(layer.rows) != 1:
        raise CacheError(f"this cache holds {len(layer.rows)} sequences; partial prefill works on one.")
    row = layer.rows[0]
    if row.gaps.at:
        raise CacheError("this cache was filled with padding; partial prefill works on text without any.")
    group = row.layer.groups[0]
    if len(row.layer.groups) > 1 or any(name != "main" for name, segment in group.segments.items() if segment.n):
        raise CacheError(f"layer {layer.site.layer} holds more than one class of slots; use KVCache(model).")
    row.layer.resolve()
    return group.segments["main"]


def insert(layer: KVLayer, rows: Rows) -> Segment:
    """Adds rows (index ascending, at places that hold none) to an exact layer, in the order of the text."""
    row, segment = layer.rows[0], main_of(layer)
    where = rows.where[0].long().cpu()
    if segment.n and int(where[0]) <= _last(segment):
        held = where_of(segment)
        where, order = torch.cat([held, where]).sort()
        order = order.to(rows.k.device)
        k = torch.cat([segment.key.dense(0, segment.n), rows.k], 1)[:, order]
        v = torch.cat([segment.value.dense(0, segment.n), rows.v], 1)[:, order]
        segment.clear()
        rows = Rows(k, v, where.int()[None])
    first, last = int(where[0]), int(where[-1])
    in_one = len(where) == last - first + 1
    segment.append(Rows(rows.k, rows.v, first if in_one else where.int()[None].to(rows.k.device)))
    row.layer.length = row.layer.prompt = layer.seen = max(row.layer.length, last + 1)
    return segment


def where_of(segment: Segment) -> Tensor:
    """The place in the text of every slot of a segment that all heads share, [n] long on the host."""
    if "index" in segment.cols:
        return segment.index[0].long().cpu()
    return torch.arange(segment.start, segment.start + segment.n)


def _last(segment: Segment) -> int:
    return segment.start + segment.n - 1 if "index" not in segment.cols else int(segment.index[0, -1])


def own(segment: Segment) -> tuple[Tensor, Tensor]:
    """Keys and values [H, n, D] of an exact segment, to write to: what a fork shares is copied first."""
    segment.own()
    for plane in (segment.key, segment.value):
        buffer = plane.runs[0].fields["x"]
        if buffer.data.is_inference() and not torch.is_inference_mode_enabled():  # torch forbids writing to it
            plane.runs[0].fields["x"] = Buffer(buffer.view)
    return segment.key.runs[0].fields["x"].view, segment.value.runs[0].fields["x"].view
