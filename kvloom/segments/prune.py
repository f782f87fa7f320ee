"""Only some channels of each head: those that the newest queries make the most of (ThinK, arXiv 2407.21018)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const
from kvloom.errors import RecipeError
from kvloom.kernels.tile import Term, Tile
from kvloom.segments.nested import Nested, chain

if TYPE_CHECKING:
    from kvloom.core.step import Step

__all__ = ["Prune"]


class Prune(Nested):
    """Stores, in the inner codec, the channels of each head that matter most; the others count as zero.

    Channel c matters by mean(q_c^2) mean(k_c^2): the square of what it adds to the logits' matrix, over the newest `window`
    queries of the head's group and the keys that a placement has kept. The choice is made once, after the first prompt.
    Queries give up the same channels, so attention costs less too; the scale of the logits stays that of the whole head.
    Constants: order [h, D] int16, the channels that stay, ascending, then the others.
    """

    def __init__(self, inner: Codec, ratio: float, window: int = 32) -> None:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise RecipeError(f"ratio={ratio!r} must be the share of channels to prune, from 0.0 to below 1.0.")
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise RecipeError(f"window={window!r} must be a number of queries, at least 1.")
        super().__init__(inner)
        self.ratio, self.window = float(ratio), window
        self.fits = self.fits_kept = True

    def __repr__(self) -> str:
        return f"Prune({self.inner!r}, ratio={self.ratio})"

    def around(self, inner: Codec) -> Codec | None:
        taken = not self.inner.exact or any(isinstance(each, Prune) for each in chain(inner))
        return None if taken else Prune(inner, self.ratio, self.window)

    def width(self, dim: int) -> int:
        """Channels that stay of so many."""
        return dim - int(self.ratio * dim + 1e-9)

    def fit(self, step: Step, keys: Tensor) -> Const:
        asked = step.q[:, :, -self.window :].float().square().mean((1, 2))
        score = asked * keys.float().square().mean(1)
        width = self.width(keys.shape[2])
        best = torch.argsort(score, dim=-1, descending=True, stable=True)
        order = torch.cat([best[:, :width].sort(-1).values, best[:, width:].sort(-1).values], 1)
        return {"order": order.to(torch.int16), **self.inner.fit(step, keys)}

    def _narrow(self, x: Tensor, const: Const) -> Tensor:
        """[h, n, D] -> [h, n, width]."""
        at = const["order"][:, : self.width(x.shape[2])].to(x.device).long()
        return x.gather(2, at[:, None].expand(-1, x.shape[1], -1))

    def _wide(self, x: Tensor, const: Const) -> Tensor:
        """The inverse, with zeros."""
        order = const["order"].to(x.device).long()
        at = order[:, None, : x.shape[2]].expand(-1, x.shape[1], -1)
        return x.new_zeros(*x.shape[:2], order.shape[1]).scatter_(2, at, x)

    def encode(self, x: Tensor, const: Const) -> Block:
        return self.inner.encode(self._narrow(x, const), const)

    def decode(self, block: Block, const: Const) -> Tensor:
        return self._wide(self.inner.decode(block, const), const)

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        return self.inner.dot(self._narrow(q, const), block, const, scale)

    def mix(self, p: Tensor, block: Block, const: Const) -> Tensor:
        return self._wide(self.inner.mix(p, block, const), const)

    def tile(self, block: Block, const: Const) -> Tile | None:
        tile = self.inner.tile(block, const)
        return None if tile is None else tile.expand(self._matrix(const))

    def terms(self, block: Block, const: Const, q: Tensor | None) -> list[Term] | None:
        terms = self.inner.terms(block, const, None if q is None else self._narrow(q, const).contiguous())
        if terms is None or q is not None:
            return terms
        back = self._matrix(const).transpose(1, 2).contiguous()
        return [term.then(back) for term in terms]

    def _matrix(self, const: Const) -> Tensor:
        """What puts the channels that stay where they belong: [h, width, D], ones and zeros."""
        order = const["order"].long()
        dim = order.shape[1]
        return torch.nn.functional.one_hot(order[:, : self.width(dim)], dim).float()

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return self.inner.nbytes(n, heads, self.width(dim), itemsize)
