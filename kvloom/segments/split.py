"""Some channels in one code, the others in another: by their range, as VidKV does (arXiv 2503.16257)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane
from kvloom.core.site import Site
from kvloom.errors import RecipeError
from kvloom.kernels.tile import Term

if TYPE_CHECKING:
    from kvloom.core.step import Step

__all__ = ["ByRange"]


class ByRange(Codec):
    """The `share` of channels with the largest range goes to `hard`, the rest to `easy`: the same ones in all heads of a layer.

    They are chosen once, by the first prompt, over all heads and tokens together. Fields of `easy` are named "easy_...".
    Constants: order [1, D] int16, the hard channels, ascending, then the others.
    """

    def __init__(self, hard: Codec, easy: Codec, share: float) -> None:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise RecipeError(f"share={share!r} of the channels must be between 0.0 and 1.0.")
        self.hard, self.easy, self.share = hard, easy, float(share)
        self.unit, self.fits = max(hard.unit, easy.unit), True
        self.per = {} if share == 1 else {f"easy_{name}": per for name, per in easy.per.items()}
        self.per |= hard.per if share else {}

    def __repr__(self) -> str:
        return f"ByRange({self.hard!r}, {self.easy!r}, {self.share})"

    def width(self, dim: int) -> int:
        """Hard ones of so many channels, a multiple of 8."""
        return min(dim, max(8, int(self.share * dim + 1e-9) // 8 * 8)) if self.share else 0

    def _sites(self, site: Site) -> tuple[Site, Site]:
        dim = site.key_dim
        wide = self.width(dim)
        return replace(site, key_dim=wide, value_dim=wide), replace(site, key_dim=dim - wide, value_dim=dim - wide)

    def check(self, site: Site, plane: Plane) -> None:
        for codec, part in zip((self.hard, self.easy), self._sites(site), strict=True):
            if part.key_dim:
                codec.check(part, plane)

    def const(self, site: Site, plane: Plane) -> Const:
        hard, easy = self._sites(site)
        found = self.hard.const(hard, plane) if hard.key_dim else {}
        return {**found, **(self.easy.const(easy, plane) if easy.key_dim else {})}

    def fit(self, step: Step, x: Tensor) -> Const:
        spread = x.amax((0, 1)) - x.amin((0, 1))
        wide = self.width(x.shape[2])
        best = spread.argsort(descending=True, stable=True)
        order = torch.cat([best[:wide].sort().values, best[wide:].sort().values])
        return {"order": order[None].to(torch.int16)}

    def encode(self, x: Tensor, const: Const) -> Block:
        parts = x[..., const["order"][0].to(x.device).long()].split([(w := self.width(x.shape[2])), x.shape[2] - w], 2)
        block = self.hard.encode(parts[0], const) if w else {}
        easy = self.easy.encode(parts[1], const) if parts[1].shape[2] else {}
        return {**block, **{f"easy_{name}": y for name, y in easy.items()}}

    def decode(self, block: Block, const: Const) -> Tensor:
        found = []
        for codec, mine in zip((self.hard, self.easy), self._parts(block), strict=True):
            if mine:
                found.append(codec.decode(mine, const).float())
        back = const["order"][0].to(found[0].device).long().argsort()
        return torch.cat(found, 2)[..., back]

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        asked = q[..., const["order"][0].to(q.device).long()]
        wide, out = self.width(q.shape[2]), None
        for codec, mine, some in zip(
            (self.hard, self.easy), self._parts(block), (asked[..., :wide], asked[..., wide:]), strict=True
        ):
            if mine:
                part = codec.dot(some, mine, const, scale)
                out = part if out is None else out.add_(part)
        assert out is not None
        return out

    def terms(self, block: Block, const: Const, q: Tensor | None) -> list[Term] | None:
        order = const["order"][0].long()
        wide, found = self.width(len(order)), list[Term]()
        for codec, mine, some in zip(
            (self.hard, self.easy), self._parts(block), (order[:wide], order[wide:]), strict=True
        ):
            if not mine:
                continue
            terms = codec.terms(mine, const, None if q is None else q[..., some].contiguous())
            if terms is None:
                return None
            back = torch.nn.functional.one_hot(some, len(order)).float().T[None].contiguous()
            found += terms if q is not None else [term.then(back) for term in terms]
        return found

    def _parts(self, block: Block) -> tuple[Block, Block]:
        easy = {name.removeprefix("easy_"): y for name, y in block.items() if name.startswith("easy_")}
        return {name: y for name, y in block.items() if not name.startswith("easy_")}, easy

    def slots(self, block: Block) -> int:
        return next(x.shape[1] * self.per[name] for name, x in block.items() if self.per[name])

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        wide = self.width(dim)
        return self.hard.nbytes(n, heads, wide, itemsize) + self.easy.nbytes(n, heads, dim - wide, itemsize)
