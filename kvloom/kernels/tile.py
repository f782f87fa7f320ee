"""How a block decodes, as data: numbers, codes or groups, and what is done to them. Kernels carry it out tile by tile.

    Tile.codes(block["codes"], bits, table).affine(half, mid).turn(rope, start=0)

is a codec of levels with a range for each slot, before RoPE. Every tensor is [h, rows, ...], or [1, rows, ...] where heads
share it, with a row for `per` slots (0: one row for all). Nothing is copied or computed here; `native.tile` checks all
shapes and gives a kernel the addresses. What it can't read, plain torch decodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Op", "Stage", "Term", "Tile", "turns"]

Op = Literal["affine", "permute", "places", "slots", "product", "expand", "turn", "unit"]
NEAR = 64  # places whose cosines and sines are held apart, and multiples of which are


@dataclass(frozen=True)
class Stage:
    """A step; tensors with the number of slots that a row of each spans."""

    op: Op
    fields: Sequence[tuple[Tensor, int] | None]
    numbers: tuple[int, int, int] = (0, 0, 0)
    start: int = 0
    rounded: torch.dtype = torch.float32


@dataclass(frozen=True)
class Tile:
    """n slots of `width` numbers: a base and stages, in order. Methods give a longer tile."""

    n: int
    width: int
    kind: Literal["dense", "codes", "minmax", "trits"]
    base: tuple[Any, ...]
    base_width: int
    stages: tuple[Stage, ...] = field(default=())
    heads: Tensor | None = None  # whose slots each head reads, [h] int32; None: its own

    @staticmethod
    def dense(x: Tensor) -> Tile:
        """Numbers as they are: x [h or 1, n, D]."""
        return Tile(x.shape[1], x.shape[2], "dense", (x,), x.shape[2])

    @staticmethod
    def codes(codes: Tensor, bits: int, table: Tensor, each: int = 1) -> Tile:
        """Codes [h or 1, n, M * bits / 8], packed as `pack` does, that stand for `each` numbers of a table.

        table [h or 1, M or 1, 2**bits, each] fp32; what follows the second dimension may be flat.
        """
        width = codes.shape[2] * 8 // bits * each
        return Tile(codes.shape[1], width, "codes", (codes, bits, table, each), width)

    @staticmethod
    def minmax(along: str, bits: int, group: int, codes: Tensor, scale: Tensor, zero: Tensor) -> Tile:
        """Codes in groups, as `segments.minmax` lays them out."""
        if along == "tokens":
            n, width = codes.shape[1] * group, codes.shape[2]
        else:
            n, width = codes.shape[1], codes.shape[2] * 8 // bits
        return Tile(n, width, "minmax", (along, bits, group, codes, scale, zero), width)

    @staticmethod
    def trits(codes: Tensor, group: int, size: Tensor) -> Tile:
        """-1, 0 or 1 times the size of a channel in a group of tokens: codes [h or 1, n / group, bytes] uint8, of which each holds
        five of a group's [D, group] in base 3; size [h or 1, n / group, D].
        """
        return Tile(codes.shape[1] * group, size.shape[2], "trits", (codes, group, size), size.shape[2])

    def _then(self, op: Op, *fields: tuple[Tensor, int] | None, width: int | None = None, **more: Any) -> Tile:
        stage = Stage(op, fields, **more)
        return replace(self, width=self.width if width is None else width, stages=(*self.stages, stage))

    def affine(self, scale: Tensor | None, zero: Tensor | None = None, per: int = 1) -> Tile:
        """x * scale + zero, each [h or 1, rows, c]: a number for every width / c neighbouring channels.

        uint8 scales are exponents: 2 ** (e - 127).
        """
        return self._then("affine", *(None if x is None else (x, per) for x in (scale, zero)))

    def permute(self, order: Tensor) -> Tile:
        """Channel i becomes what channel order[i] was; order [h or 1, 1, D] int32."""
        return self._then("permute", (order, 0))

    def places(self, place: Tensor, value: Tensor, over_heads: bool = False, add: bool = False) -> Tile:
        """Numbers [h or 1, n, k] of each slot put in their places, which count the channels of a head, or of all of them."""
        return self._then("places", (place, 1), (value, 1), numbers=(over_heads, add, 0))

    def slots(self, place: Tensor, value: Tensor, chunk: int | None) -> Tile:
        """Numbers [h, chunks, k, D] put in places that count the slots of a chunk (None: all), ascending along k."""
        return self._then("slots", (place, chunk or 0), (value, chunk or 0))

    def product(self, left: Tensor, right: Tensor, chunk: int | None) -> Tile:
        """left [h, n, r] times right [h, chunks, D, r] transposed, added."""
        return self._then("product", (left, 1), (right, chunk or 0), numbers=(left.shape[2], 0, 0))

    def expand(self, matrix: Tensor) -> Tile:
        """x @ matrix [h or 1, width, D]."""
        return self._then("expand", (matrix[:, None], 0), width=matrix.shape[2], numbers=(matrix.shape[2], 0, 0))

    def read_by(self, heads: Tensor) -> Tile:
        """The same for other heads, each of which reads one of these: heads [h], which."""
        return replace(self, heads=heads.to("cpu", torch.int32).contiguous())

    def unit(self) -> Tile:
        """Every slot brought to length 1."""
        return self._then("unit")

    def turn(
        self, speed: Tensor, scaling: float, offset: int, interleaved: bool, at: Tensor | None, start: int,
        most: int, rounded: torch.dtype,
    ) -> Tile:  # fmt: skip
        """RoPE: radians per token and pair, places in the text at [h or 1, n] int32 below `most`, or from `start` on."""
        far, near, padded = turns(speed.numpy().tobytes(), scaling, 1 << max(most // NEAR, 1).bit_length())
        fields = ((far, 0), (near, 0), (padded, 0), None if at is None else (at[..., None], 1))
        return self._then("turn", *fields, numbers=(offset, len(speed), interleaved), start=start, rounded=rounded)


@dataclass(frozen=True)
class Term:
    """A tile asked by queries of its own, [h, R, width]; or, with `right` [h or 1, chunks, D, width], times right^T."""

    tile: Tile
    q: Tensor | None = None
    right: tuple[Tensor, int] | None = None

    def then(self, matrix: Tensor) -> Term:
        """The same times matrix^T [1, D, width]: what is summed is turned by it."""
        if self.right is None:
            return Term(self.tile, self.q, (matrix[:, None], 0))
        right, per = self.right
        return Term(self.tile, self.q, (matrix[:, None] @ right.float(), per))


@lru_cache(maxsize=32)
def turns(speed: bytes, scaling: float, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines and sines of places 0, 64, ... [1, rows, 2 P], times `scaling`; of 0 to 63 [1, 64, 2 P]; radians per token [1, 1, P].

    P: pairs, padded to a multiple of 16. Constants of a model; together they make those of any place.
    """
    with torch.inference_mode(False):
        radians = torch.frombuffer(bytearray(speed), dtype=torch.float32)
        radians = torch.nn.functional.pad(radians, (0, -len(radians) % 16))[None]
        far = torch.arange(rows, dtype=torch.float64)[None, :, None] * NEAR * radians.double()
        near = torch.arange(NEAR, dtype=torch.float64)[None, :, None] * radians.double()
        both = (torch.cat((angle.cos(), angle.sin()), 2) for angle in (far, near))
        return next(both).mul(scaling).float(), next(both).float(), radians[None]
