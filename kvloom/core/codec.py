"""What turns keys or values into bytes and back. Codecs hold no data: they make blocks of named tensors.

A block's field has shape [h, rows, ...]; `Codec.per` says how many slots one row of the field spans (1: a row per slot,
32: one scale for 32 tokens, 0: one row for all that was frozen at once). A field that all heads share is [1, rows, ...]. So
growing, taking, forking, counting and writing bytes are written once, for all codecs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from kvloom.kernels import reference
from kvloom.kernels.dispatch import kernels_for
from kvloom.kernels.tile import Term, Tile

if TYPE_CHECKING:
    from kvloom.core.site import Site
    from kvloom.core.step import Step

__all__ = ["SCOPES", "Block", "Codec", "Const", "Exact", "Plane", "Scope", "Tapped", "gather", "of_heads"]

Block = dict[str, Tensor]
Const = dict[str, Tensor]
Plane = Literal["key", "value"]
Scope = Literal["head", "layer", "group", "model"]
SCOPES: tuple[Scope, ...] = ("head", "layer", "group", "model")
Tapped = Literal["pre-rope", "post-rope"]
LEAST, MOST = 1 << 16, 1 << 19  # numbers that are decoded at a time: small enough for a core's cache


def gather(x: Tensor, rows: Tensor) -> Tensor:
    """x [h, n, ...] (or [1, n, ...]), rows [h, r] -> [h, r, ...]; a copy."""
    if rows.shape[1] == 1:  # a decoded token's: the quickest call
        at = rows.reshape(len(rows), 1, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
        return x.expand(len(rows), *x.shape[1:]).gather(1, at)
    heads = torch.arange(rows.shape[0], device=x.device)[:, None]
    return x.expand(rows.shape[0], *x.shape[1:])[heads, rows]


def of_heads(x: Tensor, at: Tensor) -> Tensor:
    """Some heads of a field or a constant; what all heads share stays as it is."""
    return x if x.shape[0] == 1 else x[at]


class Codec:
    """One plane of a segment: how n slots of h heads become bytes. Shapes: x [h, n, D], q [h, R, D], p [h, R, n].

    `unit` slots are encoded together: fewer cannot be frozen or freed. `scope` is the widest set of heads or layers
    encoded together. `tap`: which keys it stores; those before RoPE are turned back by the plane, and on again when read.
    A nested codec delegates to `inner` and folds its transform into the query where it can.
    """

    scope: Scope = "head"
    tap: Tapped = "post-rope"
    exact: ClassVar[bool] = False
    fits: bool = False  # whether `fit` has constants to give
    flows: bool = False  # whether kernels can encode rows one by one as they decode
    fits_kept: bool = False  # whether they are taken from the slots that a placement has kept, not from all
    unit: int = 1
    per: dict[str, int]
    shared: frozenset[str] = frozenset()  # fields that the layers of a group hold together, once

    @property
    def joint(self) -> bool:
        """Whether layers are encoded together: by `encode_together`, when the last layer of a group settles."""
        return self.scope in ("group", "model")

    def check(self, site: Site, plane: Plane) -> None:
        """Raises RecipeError if this codec cannot store that plane of the layer."""

    def at(self, site: Site, plane: Plane) -> Sequence[tuple[tuple[int, ...] | None, Codec]]:
        """The codec of a layer: (None, codec), or some of its heads and theirs, where heads are not stored alike."""
        return [(None, self)]

    def const(self, site: Site, plane: Plane) -> Const:
        """Constants known before any text, such as a rotation or a profile, [h, ...] or [1, ...]: always the same tensors."""
        return {}

    def sized(self, n: int) -> Codec:
        """The codec of n slots that are frozen at once: itself, unless that depends on how many they are."""
        return self

    def fit(self, step: Step, x: Tensor) -> Const:
        """Constants of one sequence and layer, each [h, ...], computed once, before anything is encoded.

        x [h, n, D] fp32: the keys or values of the first rows, whichever the plane holds.
        """
        return {}

    def around(self, inner: Codec) -> Codec | None:
        """This codec with another one inside, where it has room for one: so two codecs compose."""
        return None

    def forms(self) -> tuple[Codec, ...]:
        """All codecs that `sized` may give."""
        return (self,)

    def encode(self, x: Tensor, const: Const) -> Block:
        """[h, n, D] -> block; n is a multiple of `unit`."""
        raise NotImplementedError

    def encode_together(self, planes: list[Tensor], consts: list[Const]) -> list[Block]:
        """The same n slots of every layer of a group, each [h, n, D] -> their blocks, with `shared` fields in common."""
        raise NotImplementedError

    def pays(self, planes: list[Tensor]) -> bool:
        """Whether encoding makes these smaller than they are; until then they stay exact. One plane, or one per layer."""
        return True

    def decode(self, block: Block, const: Const) -> Tensor:
        """Block -> [h, n, D] in the dtype that was encoded (the dtype of the block's scales)."""
        raise NotImplementedError

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        """Scaled logits [h, R, n] in fp32 of queries against the stored keys. Default: decode block by block."""
        parts = self.pieces(block, q.shape[0] * q.shape[2])
        return torch.cat([reference.logits(q, self.decode(part, const), scale) for _, part in parts], -1)

    def mix(self, p: Tensor, block: Block, const: Const) -> Tensor:
        """Weighted sums [h, R, D] in fp32 of the stored values. Default: decode block by block."""
        out = None
        for slots, part in self.pieces(block, p.shape[0] * 128):
            mine = reference.mix(p[..., slots], self.decode(part, const))
            out = mine if out is None else out.add_(mine)
        assert out is not None
        return out

    def slots(self, block: Block) -> int:
        """How many slots a block holds, or a part of its fields."""
        name, per = next((name, per) for name, per in self.per.items() if per and name in block)
        return block[name].shape[1] * per

    def cut(self, block: Block, start: int, stop: int) -> Block:
        """The slots [start, stop) of a block, whole units: views."""
        return {name: x[:, start // per : stop // per] if (per := self.per[name]) else x for name, x in block.items()}

    def take(self, block: Block, slots: Tensor) -> Block:
        """The slots [h, r] of a block, whole units in ascending order: copies."""
        found = {}
        for name, x in block.items():
            per = self.per[name]
            rows = slots[: x.shape[0]]  # what heads share, they drop together
            found[name] = gather(x, rows[:, ::per] // per if per > 1 else rows) if per else x
        return found

    def pieces(self, block: Block, size: int) -> Iterator[tuple[slice, Block]]:
        """A block of n slots of `size` numbers, cut into pieces of whole units: a 32nd, but neither tiny nor huge."""
        n = self.slots(block)
        each = max(LEAST // max(1, size), min(n // 32, MOST // max(1, size))) // self.unit * self.unit or self.unit
        for at in range(0, n, each):
            yield slice(at, min(at + each, n)), self.cut(block, at, min(at + each, n))

    def tile(self, block: Block, const: Const) -> Tile | None:
        """How a block decodes, step by step, for kernels that do so a tile at a time; None: only `decode` knows."""
        return None

    def terms(self, block: Block, const: Const, q: Tensor | None) -> list[Term] | None:
        """The block as a sum of tiles, keys with the queries that ask for each. Here: one, asked by q as it is."""
        tile = self.tile(block, const)
        return None if tile is None else [Term(tile, q)]

    def describe(self, block: Block, const: Const, q: Tensor | None, kept: list[Tensor]) -> Any:
        """The block for the kernels that work where it lies; None where they can't read it.

        q [h, R, D], as their `queries` gives them, if it holds keys. Tensors that it points into go to `kept`.
        """
        kernels = kernels_for(next(iter(block.values())))
        terms = None if kernels is None else self.terms(block, const, q)
        return None if kernels is None or terms is None else kernels.tile(self.slots(block), terms, kept)

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        """Bytes of n slots of each of so many heads, frozen at once; n is a multiple of `unit`.

        Of a layer in a full group, if layers are encoded together: its share of what they hold in common.
        """
        raise NotImplementedError


class Exact(Codec):
    """The model's own numbers."""

    exact: ClassVar[bool] = True

    def __init__(self) -> None:
        self.per = {"x": 1}

    def encode(self, x: Tensor, const: Const) -> Block:
        return {"x": x}

    def decode(self, block: Block, const: Const) -> Tensor:
        return block["x"]

    def tile(self, block: Block, const: Const) -> Tile | None:
        return Tile.dense(block["x"])

    def describe(self, block: Block, const: Const, q: Tensor | None, kept: list[Tensor]) -> Any:
        kernels = kernels_for(block["x"])
        return None if kernels is None else kernels.dense(block["x"], q)

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return n * heads * dim * itemsize

    def __repr__(self) -> str:
        return "Exact()"
