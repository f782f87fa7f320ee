"""What a cache will hold, told without a model: the real `Layer`, run over heads that have no width.

Slots have a place in the text but no numbers, and attention is drawn by lot. Budgets, placements, classes, units, tails,
columns, groups and empty room are the code that serves models, so every recipe can be told, one of tomorrow too. How many
slots a placement keeps must not hang on what they hold; where it does, the forecast is one draw of many.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvloom.core import stack
from kvloom.core.attention import Logits, Visible
from kvloom.core.codec import Block, Codec, Const, Plane
from kvloom.core.group import Table
from kvloom.core.layer import Layer, _Pending
from kvloom.core.recipe import Recipe
from kvloom.core.rows import Rows
from kvloom.core.run import Buffer
from kvloom.core.segment import EXACT, Kind
from kvloom.core.site import Site
from kvloom.core.step import Step
from kvloom.core.together import together

__all__ = ["Held", "Stretch", "forecast"]


@dataclass(frozen=True)
class Stretch:
    """`slots` of each of `heads` KV heads, in one plane of one class, under one codec."""

    segment: str
    plane: Plane
    codec: Codec
    heads: int
    slots: int


@dataclass(frozen=True)
class Held:
    """One layer of one sequence. `parts`: bytes of keys, values, columns, constants and state (the newest queries).

    `room`: bytes of empty room for growth, which stand apart from `used`, as in the ledger.
    """

    stretches: tuple[Stretch, ...]
    parts: dict[str, int] = field(hash=False)
    room: int

    @property
    def used(self) -> int:
        """Bytes of what is stored."""
        return sum(self.parts.values())

    @property
    def nbytes(self) -> int:
        """Bytes with empty room."""
        return self.used + self.room


@torch.no_grad()
def forecast(recipe: Recipe, sites: Sequence[Site], tokens: int, decoded: int = 0) -> list[Held]:
    """What each layer of one sequence holds after a prompt of `tokens` in one forward, then `decoded` single tokens.

    `recipe` is `ready` and bound to the sites; see `Recipe.bind`. A layer whose recipe never asks which layer it is
    is run once for all that have its shape.
    """
    known: dict[Site, Held] = {}
    seen: dict[int, Tensor] = {}
    found: list[Held] = []
    text = None
    if recipe.groups:
        layers = _run(recipe, sites, tokens, decoded)
        return [_count(layer, site, seen) for layer, site in zip(layers, sites, strict=True)]
    for site in sites:
        shape = replace(site, layer=0)
        if shape not in known:
            watched = _Watched(**vars(site))
            (layer,) = _run(recipe, [watched], tokens, decoded)
            text = text or (layer.unread if recipe.again is not None and not found else None)
            shared = len(seen)
            held = _count(layer, watched, seen)
            if watched.asked or len(seen) > shared:  # constants may be the next layer's too, and are counted once
                found.append(held)
                continue
            known[shape] = held
        found.append(known[shape])
    if text is not None:  # a sequence's tokens are held once
        state = found[0].parts.get("state", 0) + text.used
        found[0] = replace(
            found[0], parts={**found[0].parts, "state": state}, room=found[0].room + text.data.nbytes - text.used
        )
    return found


class _Watched(Site):
    """A site that notices whether a policy asks which layer it is."""

    asked = False

    def __getattribute__(self, name: str) -> object:
        if name == "layer":
            object.__setattr__(self, "asked", True)
        return super().__getattribute__(name)


def _run(recipe: Recipe, sites: Sequence[Site], tokens: int, decoded: int) -> list[_Layer]:
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay what they were
        torch.default_generator.manual_seed(0)
        layers = [_Layer(site, recipe) for site in sites]
        for m in [tokens, *[1] * decoded]:
            for i, (site, layer) in enumerate(zip(sites, layers, strict=True)):
                rows, hidden = torch.empty(site.kv_heads, m, 0), torch.empty(1, m, 0)
                together([layer.forward(rows, rows, rows, Logits(1.0), None, None, hidden)])
                if recipe.again is not None:
                    layer.fed(torch.zeros(m))
                    if m == tokens:
                        layer.asked(recipe.again.foretell(layer))
                if layer.mates and (recipe.early or site.layer == layer.mates[-1]):
                    upto = [x for x in layers[: i + 1] if x.mates == layer.mates]
                    stack.settle(upto, len(layer.mates))
    return layers


class _Hollow(Codec):
    """Stands for a codec where slots have no numbers: its units, fields and constants are real, its rows are empty."""

    def __init__(self, inner: Codec, site: Site, which: Plane, dim: int) -> None:
        self.inner, self.unit, self.tap = inner, inner.unit, inner.tap
        self.fits, self.fits_kept = inner.fits, inner.fits_kept
        self.scope, self.shared = inner.scope, inner.shared
        self.site, self.which, self.per = site, which, inner.per
        self.dim = dim
        self.rows: dict[str, int] = {}  # bytes of one row of each field
        self.sizes: dict[int, _Hollow] = {}

    def at(self, site: Site, plane: Plane) -> list[tuple[tuple[int, ...] | None, Codec]]:
        return [(heads, _Hollow(codec, self.site, self.which, self.dim)) for heads, codec in self.inner.at(site, plane)]

    def const(self, site: Site, plane: Plane) -> Const:
        return self.inner.const(site, plane)

    def sized(self, n: int) -> Codec:
        found = self.inner.sized(n)
        if found is self.inner:
            return self
        return self.sizes.setdefault(id(found), _Hollow(found, self.site, self.which, self.dim))

    def fit(self, step: Step, x: Tensor) -> Const:
        # a few rows with numbers: constants have their size whatever these are
        some = replace(step, q=torch.rand(*step.q.shape[:2], 2, step.site.key_dim))
        return self.inner.fit(some, torch.rand(x.shape[0], 2, self.dim))

    def encode(self, x: Tensor, const: Const) -> Block:
        return self._emptied(x, self.inner.encode(self._some(x, self.unit), const))

    def encode_together(self, planes: list[Tensor], consts: list[Const]) -> list[Block]:
        found = self.inner.encode_together([self._some(x, self.unit) for x in planes], consts)
        return [self._emptied(x, some) for x, some in zip(planes, found, strict=True)]

    def pays(self, planes: list[Tensor]) -> bool:
        return self.inner.pays([self._some(x[:, :, :0], 1).expand(-1, x.shape[1], -1) for x in planes])

    def _some(self, x: Tensor, n: int) -> Tensor:
        return torch.rand(x.shape[0], n, self.dim).to(self.site.dtype)

    def _emptied(self, x: Tensor, some: Block) -> Block:
        n = x.shape[1]
        self.rows = {name: y[0, 0].nbytes for name, y in some.items()}
        return {name: x.new_empty(len(y), n // per if (per := self.per[name]) else 1, 0) for name, y in some.items()}

    def decode(self, block: Block, const: Const) -> Tensor:
        heads = max(len(x) for x in block.values())
        return next(iter(block.values())).new_empty(heads, self.slots(block), 0)


class _Step(Step):
    """Attention by lot, and queries without numbers, which nothing turns."""

    rope = None

    def mass(self, table: Table) -> Tensor:
        return torch.rand(self.heads, self.site.group, table.n)

    def rows(self, table: Table, newest: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.tensor([self.length - 1]), torch.rand(self.heads, 1, 1, table.n)

    def blocks(self, table: Table, rows: Tensor, ahead: float = 0.0) -> Iterator[tuple[Tensor, int, Tensor]]:
        yield (
            torch.tensor([self.length - 1]),
            0,
            2 * torch.rand(self.heads, 1, 1, table.n),
        )  # on both sides of an average

    def window(self, table: Table, rows: int) -> Tensor:
        return torch.rand(self.heads, self.site.group, table.n)

    def looks(self, table: Table, rows: int) -> Tensor:
        return torch.rand(self.heads, 1, rows, table.n)

    def probed(self, table: Table, rows: Tensor) -> Tensor:
        return torch.rand(self.heads, 1, table.n)


class _Layer(Layer):
    """A layer that stores and settles, but attends to nothing."""

    step = _Step

    def __init__(self, site: Site, recipe: Recipe) -> None:
        kinds = {name: _hollow(kind, site) for name, kind in recipe.kinds.items()}
        super().__init__(site, replace(recipe, kinds=kinds))

    def asked(self, carry: dict[str, Any] | None) -> None:
        """What a probe of no rows would do, with this in its carry."""
        if carry is not None:
            q = torch.zeros(self.site.kv_heads, self.site.group, 0, 0)
            self.carry = carry
            self._settle(_Pending(q, q.new_zeros(q.shape[:3]), self.length, "probe", Logits(1.0), None, 0))

    def _attend(
        self, q: Tensor, rows: Rows, logits: Logits, visible: Visible | None, emit: bool
    ) -> Generator[list[Any], None, tuple[Tensor, Tensor, list[dict[str, Tensor]]]]:
        self._append(rows)
        yield []
        return q, torch.zeros(1, 1).expand(q.shape[:2]), [{} for _ in self.groups] if emit else []


def _hollow(kind: Kind, site: Site) -> Kind:
    key = kind.key if kind.key.exact else _Hollow(kind.key, site, "key", kind.shape(site, "key")[1])
    value = kind.value if kind.value.exact else _Hollow(kind.value, site, "value", kind.shape(site, "value")[1])
    return replace(kind, key=key, value=value)


def _count(layer: Layer, site: Site, seen: dict[int, Any]) -> Held:
    """`seen`: constants and buffers that were counted, which layers and heads may share."""
    parts: dict[str, int] = defaultdict(int)
    stretches: Counter[tuple[str, Plane, Codec, int]] = Counter()
    room = 0

    def real(part: str, buffer: Buffer) -> None:
        nonlocal room
        parts[part] += buffer.used
        room += buffer.data.nbytes - buffer.used

    for group in layer.groups:
        heads = site.kv_heads if group.heads is None else len(group.heads)
        parts["columns"] += 0 if group.heads is None else group.heads.nbytes
        parts["state"] += sum(x.nbytes for x in group.state.values())
        for name, segment in group.segments.items():
            for plane in (segment.key, segment.value):
                all_heads, dim = segment.kind.shape(site, plane.which)
                h = min(heads, all_heads)
                parts[f"{plane.which}s"] += 0
                for run in () if plane.mirrors else plane.runs:
                    codec = run.codec.inner if isinstance(run.codec, _Hollow) else EXACT
                    stretches[name, plane.which, codec, h] += run.n
                    parts[f"{plane.which}s"] += 0 if codec.joint else codec.nbytes(run.n, h, dim, site.itemsize)
                    for part, buffer in run.fields.items():
                        if part in codec.shared and seen.setdefault(id(buffer), layer) is not layer:
                            continue
                        row = run.codec.rows[part] if isinstance(run.codec, _Hollow) else dim * site.itemsize
                        parts[f"{plane.which}s"] += buffer.n * buffer.data.shape[0] * row if codec.joint else 0
                        room += (buffer.data.shape[1] - buffer.n) * buffer.data.shape[0] * row
                    if run.at is not None:
                        real(f"{plane.which}s", run.at)
                for x in plane.const.values():
                    place = x.untyped_storage().data_ptr()
                    parts["constants"] += 0 if place in seen else x.nbytes
                    seen[place] = x
            for column in segment.cols.values():
                real("columns", column)
            digest = segment.digest and segment.digest.buffer
            if digest and segment.kind.select is not None:
                row = heads * segment.kind.select.width(site.key_dim) * site.itemsize
                parts["columns"] += digest.n * row
                room += (digest.data.shape[1] - digest.n) * row
    if layer.recent is not None:
        row = site.q_heads * site.key_dim * site.itemsize
        parts["state"] += layer.recent.n * row
        room += (layer.recent.data.shape[1] - layer.recent.n) * row
    return Held(tuple(Stretch(*key, n) for key, n in stretches.items()), dict(parts), room)
