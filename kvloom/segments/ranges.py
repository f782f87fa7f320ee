"""Min-max codes whose scales reach further than a group: ZipCache's keys and values (arXiv 2405.14256).

And values divided by what their channel can be before they share a token's scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane, Scope
from kvloom.core.site import Site
from kvloom.kernels.tile import Term, Tile
from kvloom.segments.minmax import MinMax
from kvloom.segments.nested import Nested

if TYPE_CHECKING:
    from kvloom.core.step import Step

__all__ = ["ChannelScale", "RunMinMax", "TokenMinMax"]


class RunMinMax(MinMax):
    """Min-max along tokens, where all that is frozen at once shares one scale and minimum per channel.

    Codes are packed `group` tokens at a time. Fields: scale and zero [h, 1, D].
    """

    def __init__(self, bits: int, group: int = 32) -> None:
        super().__init__(bits, group, "tokens")
        self.per = {"codes": self.unit, "scale": 0, "zero": 0}

    def __repr__(self) -> str:
        return f"RunMinMax(bits={self.bits}, group={self.group})"

    def limits(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        low, high = super().limits(grouped)
        return low.amin(1, keepdim=True), high.amax(1, keepdim=True)

    def tile(self, block: Block, const: Const) -> Tile | None:
        return super().tile(self._spread(block), const)

    def describe(self, block: Block, const: Const, q: Tensor | None, kept: list[Tensor]) -> Any:
        block = self._spread(block)
        kept += block.values()
        return super().describe(block, const, q, kept)

    def _spread(self, block: Block) -> Block:
        """With the scale of each group, as kernels want it, for the time of a call."""
        groups = block["codes"].shape[1]
        return {**block, **{name: block[name].expand(-1, groups, -1).contiguous() for name in ("scale", "zero")}}

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return heads * (n * dim * self.bits // 8 + 2 * 2 * dim * (n > 0))


class TokenMinMax(MinMax):
    """Min-max along channels, where row i of all heads together shares one scale and minimum.

    Heads may hold different tokens in row i; if they drop different rows, each goes on with scales of its own.
    Fields: scale and zero [1, n, 1].
    """

    scope: Scope = "layer"

    def __init__(self, bits: int) -> None:
        super().__init__(bits, None, "channels")

    def __repr__(self) -> str:
        return f"TokenMinMax(bits={self.bits})"

    def limits(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        low, high = super().limits(grouped)
        return low.amin(0, keepdim=True), high.amax(0, keepdim=True)

    def take(self, block: Block, slots: Tensor) -> Block:
        if len(block["scale"]) < len(slots) and bool((slots != slots[:1]).any()):
            block = {name: x.expand(len(slots), *x.shape[1:]) for name, x in block.items()}
        return super().take(block, slots)

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return heads * n * dim * self.bits // 8 + 2 * 2 * n


class ChannelScale(Nested):
    """Stores x / c, where c = sqrt(max |x|) of each channel: then channels of unlike size can share a token's scale.

    c is taken from the first prompt and stays, since codes made with one c can't be read with another; or `table[layer]` has it.
    """

    def __init__(self, inner: Codec, table: Mapping[int, Const] | None = None) -> None:
        super().__init__(inner)
        self.table, self.fits = table, table is None

    def const(self, site: Site, plane: Plane) -> Const:
        return {**({} if self.table is None else self.table[site.layer]), **self.inner.const(site, plane)}

    def __repr__(self) -> str:
        return f"ChannelScale({self.inner!r})"

    def fit(self, step: Step, x: Tensor) -> Const:
        c = x.abs().amax(1).sqrt()
        return {"channel": torch.where(c > 0, c, 1.0), **self.inner.fit(step, x)}

    def encode(self, x: Tensor, const: Const) -> Block:
        return self.inner.encode((x.float() / const["channel"][:, None]).to(x.dtype), const)

    def decode(self, block: Block, const: Const) -> Tensor:
        return self.inner.decode(block, const).float() * const["channel"][:, None]

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        return self.inner.dot(q.float() * const["channel"][:, None], block, const, scale)

    def mix(self, p: Tensor, block: Block, const: Const) -> Tensor:
        return self.inner.mix(p, block, const) * const["channel"][:, None]

    def tile(self, block: Block, const: Const) -> Tile | None:
        tile = self.inner.tile(block, const)
        return None if tile is None else tile.affine(const["channel"][:, None], per=0)

    def terms(self, block: Block, const: Const, q: Tensor | None) -> list[Term] | None:
        if q is None:
            return super().terms(block, const, q)
        return self.inner.terms(block, const, q * const["channel"][:, None])
