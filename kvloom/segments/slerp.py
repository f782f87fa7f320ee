"""Two layers' vectors as one direction and two lengths (MiniCache, arXiv 2405.14366)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const
from kvloom.errors import RecipeError
from kvloom.kernels.tile import Tile
from kvloom.segments.nested import Nested

__all__ = ["Slerp", "angle", "slerp"]

FLAT = 1e-3  # sine below which the arc is as good as a line


def angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle between vectors [..., D] in units of pi, [...] fp32: 0 same direction, 1 opposite. Zero vectors: 0."""
    a, b = _unit(a)[0], _unit(b)[0]
    # of the sum and the difference: the cosine of a small angle says little in fp32
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)) / torch.pi


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The unit vector at the share t of the arc from unit vectors a to b, [..., D]."""
    w = angle(a, b)[..., None] * torch.pi
    sine = w.sin()
    line = (1 - t) * a + t * b
    arc = (((1 - t) * w).sin() * a + (t * w).sin() * b) / sine.clamp_min(FLAT)
    return _unit(torch.where(sine < FLAT, line, arc))[0]


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    length = x.norm(dim=-1, keepdim=True)
    return x / length.clamp_min(torch.finfo(torch.float32).tiny), length


class Slerp(Nested):
    """A pair of layers shares the direction at the share `t` of the arc between theirs; each keeps its vectors' lengths.

    Directions are stored by `inner`. Attention needs no full vectors: q.k is length times q.direction, and p v is
    (p length) directions. Fields beside the inner ones, which are the pair's: length [h, n], in the model's dtype.
    """

    def __init__(self, inner: Codec, t: float) -> None:
        if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t <= 1:
            raise RecipeError(f"t={t!r} must be a share of the way from the first layer to the second, 0.0 to 1.0.")
        super().__init__(inner, length=1)
        self.t, self.scope, self.shared = t, "group", frozenset(inner.per)

    def __repr__(self) -> str:
        return f"Slerp({self.inner!r}, t={self.t})"

    def encode_together(self, planes: list[Tensor], consts: list[Const]) -> list[Block]:
        found, dtype = [_unit(x) for x in planes], planes[0].dtype
        between = slerp(found[0][0], found[-1][0], self.t).to(dtype)
        common = self.inner.encode(between, consts[0])
        return [{**common, "length": length[..., 0].to(dtype)} for _, length in found]

    def decode(self, block: Block, const: Const) -> Tensor:
        direction = self.inner.decode(self.within(block), const)
        return direction.to(block["length"].dtype) * block["length"][..., None]

    def tile(self, block: Block, const: Const) -> Tile | None:
        tile = self.inner.tile(self.within(block), const)
        return None if tile is None else tile.affine(block["length"][..., None])

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        return self.inner.dot(q, self.within(block), const, scale).mul_(block["length"].float()[:, None])

    def mix(self, p: Tensor, block: Block, const: Const) -> Tensor:
        return self.inner.mix(p * block["length"].float()[:, None], self.within(block), const)

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return self.inner.nbytes(n, heads, dim, itemsize) // 2 + heads * n * itemsize
