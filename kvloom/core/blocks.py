"""A text's cache in blocks: what each stretch of tokens added to it, so that equal beginnings share what they have in common.

It serves recipes that drop nothing and encode a slot the same way whatever follows. The part of a block [a, b) is the slots that
were encoded while it came, and its own rows that were exact still when it ended. The state at any border is put together from the
parts up to there, and nothing is in two of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvloom.core.cache import KVCache, KVLayer
from kvloom.core.codec import Codec
from kvloom.core.codec import Plane as PlaneName
from kvloom.core.kind import EXACT
from kvloom.core.layer import Layer
from kvloom.core.plane import Plane
from kvloom.core.portable import Part, Shape, checked, fields_of, movable, shape_of
from kvloom.core.recipe import Recipe
from kvloom.core.run import Buffer, Run
from kvloom.errors import CacheError

PLANES: tuple[PlaneName, PlaneName] = ("key", "value")
Fields = dict[str, tuple[int, tuple[int, ...], torch.dtype]]

__all__ = ["Assembly", "adopt", "block_of", "blockwise", "rowwise"]


def blockwise(recipe: Recipe) -> bool:
    """Whether what is stored of a token never depends on what follows it, and runs of it can be joined."""
    main = recipe.kinds["main"]
    plain = not recipe.policy and not (main.fold or main.turn or main.merge or main.hidden)
    return plain and all(
        codec.exact
        or (
            not codec.fits
            and type(codec).at is Codec.at
            and codec.forms() == (codec,)
            and "x" not in codec.per
            and all(codec.per.values())
        )
        for codec in (main.key, main.value)
    )


def rowwise(recipe: Recipe) -> bool:
    """Whether, moreover, every token is stored by itself and read as it was computed: then any first rows of a block serve."""
    return blockwise(recipe) and recipe.kinds["main"].exact


def _frozen(recipe: Recipe, n: int) -> dict[str, int]:
    keys, values = recipe.kinds["main"].frozen(n)
    return {"key": keys, "value": values}


def _codecs(recipe: Recipe) -> dict[str, Codec]:
    main = recipe.kinds["main"]
    return {"key": main.key, "value": main.value}


def adopt(cache: KVCache, layers: Sequence[Layer]) -> KVCache:
    """An empty cache with these layers of one sequence in it, so that what works on caches works on them. Returns the cache."""
    for layer, inner in zip(movable(cache), layers, strict=True):
        if inner.length:
            _begin(layer, shape_of(inner.site), "cpu")
            layer.rows[0].layer, layer.seen = inner, inner.length
    return cache


def _begin(layer: KVLayer, shape: Shape, device: torch.device | str) -> None:
    heads, *dims, dtype = shape
    key, value = (torch.empty(1, heads, 0, dim, dtype=dtype, device=device) for dim in dims)
    layer.lazy_initialization(key, value)


def block_of(cache: KVCache, start: int, stop: int) -> dict[Part, Tensor]:
    """The part of tokens [start, stop): views of the cache's memory.

    Raises CacheError if the recipe encodes and the cache has gone on beyond `stop`, where some rows are exact no more.
    """
    recipe, seen = cache.recipe, cache.get_seq_length()
    if not blockwise(recipe):
        raise CacheError(f"{recipe.name} keeps slots for what follows them; its caches are stored as a whole.")
    if not 0 <= start < stop <= seen or (stop < seen and not rowwise(recipe)):
        raise CacheError(f"tokens {start} to {stop} of {seen} are no block that {recipe.name} still has.")
    before, after, parts = _frozen(recipe, start), _frozen(recipe, stop), {}
    for layer in movable(cache):
        (row,) = layer.rows
        (group,) = row.layer.groups
        segment = group.segments["main"]
        for which, plane in (("key", segment.key), ("value", segment.value)):
            a, b = before[which], after[which]
            if b > a:
                runs = [run for run in plane.runs if not run.codec.exact]
                for name, x in _slots(runs, a, b).items():
                    parts[Part(layer.site.layer, which, name)] = x
            if b < stop:
                first = max(start, b)
                exact = [run for run in plane.runs if run.codec.exact]
                offset = plane.frozen
                parts[Part(layer.site.layer, which, "x")] = _slots(exact, first - offset, stop - offset)["x"]
    return parts


def _slots(runs: Sequence[Run], start: int, stop: int) -> dict[str, Tensor]:
    """The fields of slots [start, stop) of consecutive runs of one codec."""
    pieces, at = [], 0
    for run in runs:
        a, b = max(start - at, 0), min(stop - at, run.n)
        if a < b:
            pieces.append(run.part(a, b))
        at += run.n
    if len(pieces) == 1:
        return pieces[0]
    return {name: torch.cat([piece[name] for piece in pieces], 1) for name in pieces[0]}


class Assembly:
    """Puts a cache together from the parts of the blocks of its text, behind those that it holds already, first to last.

    `shapes`: of the keys and values of every layer. `room`: tokens that will be held soon, so that they find room.
    """

    def __init__(self, cache: KVCache, shapes: Sequence[Shape], room: int, device: torch.device | str = "cpu") -> None:
        self.cache, self.shapes, self.room, self.device = cache, shapes, room, device
        self.layers = movable(cache)
        self.length = cache.get_seq_length()
        self._held: dict[Part, list[Tensor]] = {}
        self._tails: dict[Part, list[tuple[int, Tensor]]] = {}
        self._fields: dict[tuple[Shape, str], Fields] = {}

    def add(self, stop: int, parts: Mapping[Part, Tensor], rows: int | None = None) -> None:
        """Takes the part of tokens [length, stop), or its first `rows` where tokens are stored one by one.

        The tensors are read until `finish`. Raises CacheError for a part that is not what the recipe makes.
        """
        start, recipe = self.length, self.cache.recipe
        checked("half a block of a recipe that encodes", rows is None or rowwise(recipe))
        before, after, codecs = _frozen(recipe, start), _frozen(recipe, stop), _codecs(recipe)
        left, held, tails = dict(parts), [], []
        for layer, shape in zip(self.layers, self.shapes, strict=True):
            heads, *dims, dtype = shape
            for which, dim in zip(PLANES, dims, strict=True):
                a, b, codec = before[which], after[which], codecs[which]
                if b > a:
                    for name, (h, row, kind) in self._fields_of(layer, shape, which, dim).items():
                        part, per = Part(layer.site.layer, which, name), codec.per[name]
                        held.append((part, _fit(left, part, (h, b // per - a // per, *row), kind)))
                if b < stop:
                    first = max(start, b)
                    part = Part(layer.site.layer, which, "x")
                    tails.append((part, first, _fit(left, part, (heads, stop - first, dim), dtype)))
        checked("a block with tensors that belong nowhere", not left, next(iter(left), None))
        for part, x in held:
            self._held.setdefault(part, []).append(x)
        for part, first, x in tails:
            self._tails.setdefault(part, []).append((first, x if rows is None else x[:, :rows]))
        self.length = stop if rows is None else start + rows

    def _fields_of(self, layer: KVLayer, shape: Shape, which: PlaneName, dim: int) -> Fields:
        if (shape, which) not in self._fields:
            codec = _codecs(self.cache.recipe)[which]
            self._fields[shape, which] = fields_of(codec, shape[0], dim, shape[3], codec.const(layer.site, which))
        return self._fields[shape, which]

    def finish(self) -> None:
        """Fills the cache with what came."""
        recipe, n = self.cache.recipe, self.length
        if n == self.cache.get_seq_length():
            return
        frozen = _frozen(recipe, n)
        for layer, shape in zip(self.layers, self.shapes, strict=True):
            if not layer.rows:
                _begin(layer, shape, self.device)
            inner = layer.rows[0].layer
            (group,) = inner.groups
            segment = group.segments["main"]
            for which, plane in zip(PLANES, (segment.key, segment.value), strict=True):
                self._fill(plane, which, layer.site.layer, frozen[which], shape)
            segment.n = inner.length = inner.prompt = layer.seen = n

    def _fill(self, plane: Plane, which: PlaneName, layer: int, done: int, shape: Shape) -> None:
        """`done`: slots that are encoded in the end."""
        codec, before, n = plane.codec, plane.frozen, plane.n
        tails = list(self._tails.get(Part(layer, which, "x"), ()))
        if done > before:
            if before < n:  # rows of earlier blocks that were encoded since, or are to stand behind those that were
                tails.insert(0, (before, torch.cat([x.fields["x"].view for x in plane.runs if x.codec.exact], 1)))
                plane.runs = [x for x in plane.runs if not x.codec.exact]
            fields = {name: self._held[Part(layer, which, name)] for name in self._fields[shape, which]}
            run = Run(codec, {name: x[0][:, :0] for name, x in fields.items()}, plane.const, plane.tap, before)
            for name, pieces in fields.items():
                run.fields[name] = self._buffer(pieces, codec.per[name], self.room)
            plane.runs.append(run)
        tail = [x[:, max(0, done - first) :] for first, x in tails if first + x.shape[1] > done]
        if tail:
            run = Run(EXACT, {"x": tail[0][:, :0]}, {})
            run.fields["x"] = self._buffer(tail, 1, max(0, self.room - done))
            plane.runs.append(run)

    def _buffer(self, pieces: list[Tensor], per: int, room: int) -> Buffer:
        return Buffer.of(pieces, per, room // per, self.device)


def _fit(left: dict[Part, Tensor], part: Part, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = left.pop(part, None)
    if x is None:
        raise CacheError(f"the block does not fit this cache: {part} is missing.")
    checked(f"{part} is not {dtype} {shape}", tuple(x.shape) == shape and x.dtype == dtype, (x.dtype, tuple(x.shape)))
    return x
