"""A per-channel balance between queries and keys, so that key outliers do not widen the groups (MiKV, arXiv 2402.18096)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const
from kvloom.kernels.tile import Term, Tile
from kvloom.segments.nested import Nested

if TYPE_CHECKING:
    from kvloom.core.step import Step

__all__ = ["Balance"]


class Balance(Nested):
    """Stores k * b in the inner codec and asks it with q / b, where b = sqrt(max |q| / max |k|) by head and channel.

    b is taken from the first prompt and then frozen, since codes made with one b can't be read with another.
    """

    def __init__(self, inner: Codec) -> None:
        super().__init__(inner)
        self.fits = True

    def __repr__(self) -> str:
        return f"Balance({self.inner!r})"

    def fit(self, step: Step, x: Tensor) -> Const:
        q = step.q.float().abs().amax((1, 2))
        k = x.abs().amax(1)
        balance = (q / k.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
        return {"balance": torch.where((q > 0) & (k > 0), balance, 1.0), **self.inner.fit(step, x)}

    def encode(self, x: Tensor, const: Const) -> Block:
        return self.inner.encode((x.float() * const["balance"][:, None]).to(x.dtype), const)

    def decode(self, block: Block, const: Const) -> Tensor:
        return self.inner.decode(block, const) / const["balance"][:, None]

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        return self.inner.dot(q.float() / const["balance"][:, None], block, const, scale)

    def tile(self, block: Block, const: Const) -> Tile | None:
        tile = self.inner.tile(block, const)
        return None if tile is None else tile.affine(1 / const["balance"][:, None], per=0)

    def terms(self, block: Block, const: Const, q: Tensor | None) -> list[Term] | None:
        if q is None:
            return super().terms(block, const, q)
        return self.inner.terms(block, const, q / const["balance"][:, None])

    def describe(self, block: Block, const: Const, q: Tensor | None, kept: list[Tensor]) -> Any:
        if q is None:
            return super().describe(block, const, q, kept)
        kept.append((q / const["balance"][:, None]).to(q.dtype))
        return self.inner.describe(block, const, kept[-1], kept)
