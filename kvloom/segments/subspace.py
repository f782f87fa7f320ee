"""The tokens of several layers in one subspace (xKV, arXiv 2503.18893)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Tapped
from kvloom.errors import RecipeError
from kvloom.kernels.tile import Term, Tile

__all__ = ["Subspace"]


class Subspace(Codec):
    """Channels of all heads of all layers of a group side by side, X [n, channels], as a product of rank r: tokens basis^T.

    The singular vectors of X, found from X^T X in fp64: `tokens` are the rows of X along the r strongest of them, held once
    for the group, and each layer has its rows of the `basis`. `rank`: r, or a share of the group's channels. `layers`: of a
    full group, for the formula of bytes. Attention takes the factors as they are, unless keys have still to turn.

    Fields: tokens [1, n, r] of the group, basis [h, 1, D, r] of the layer, both in the model's dtype.
    """

    def __init__(self, rank: int | float, layers: int, tap: Tapped = "post-rope") -> None:
        whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
        if not whole and not (isinstance(rank, float) and 0 < rank <= 1):
            raise RecipeError(
                f"rank={rank!r} must be a whole number, at least 1, or a share of a group's channels up to 1.0."
            )
        self.rank, self.layers, self.tap, self.scope = rank, layers, tap, "group"
        self.shared, self.per = frozenset({"tokens"}), {"tokens": 1, "basis": 0}

    def __repr__(self) -> str:
        return f"Subspace(rank={self.rank}, layers={self.layers})"

    def _rank(self, channels: int) -> int:
        return min(self.rank, channels) if isinstance(self.rank, int) else max(1, round(self.rank * channels))

    def pays(self, planes: list[Tensor]) -> bool:
        channels = sum(x.shape[0] * x.shape[2] for x in planes)
        n, r = planes[0].shape[1], self._rank(channels)
        return r * (n + channels) < n * channels

    def encode_together(self, planes: list[Tensor], consts: list[Const]) -> list[Block]:
        wide = torch.cat([x.transpose(0, 1).flatten(1) for x in planes], 1)
        squares = torch.zeros(wide.shape[1], wide.shape[1], dtype=torch.float64, device=wide.device)
        for rows in wide.split(4096):
            squares += rows.double().T @ rows.double()
        vectors = torch.linalg.eigh(squares).eigenvectors.flip(1)[:, : self._rank(len(squares))]
        tokens = (wide.float() @ vectors.float())[None].to(wide.dtype)
        sizes = [x.shape[0] * x.shape[2] for x in planes]
        bases = [
            rows.unflatten(0, (len(x), -1))[:, None].to(wide.dtype)
            for rows, x in zip(vectors.split(sizes), planes, strict=True)
        ]
        return [{"tokens": tokens, "basis": basis} for basis in bases]

    def decode(self, block: Block, const: Const) -> Tensor:
        return block["tokens"] @ block["basis"][:, 0].mT

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        thin = ((q.float() * scale) @ block["basis"][:, 0].float()).flatten(0, 1)  # [h * R, r]
        parts = [thin @ part["tokens"][0].float().T for _, part in self.pieces(block, thin.shape[1])]
        out: Tensor = torch.cat(parts, 1).unflatten(0, q.shape[:2])
        return out

    def mix(self, p: Tensor, block: Block, const: Const) -> Tensor:
        rows, thin = p.flatten(0, 1), p.new_zeros(p.shape[0] * p.shape[1], block["tokens"].shape[2])
        for slots, part in self.pieces(block, thin.shape[1]):
            thin.addmm_(rows[:, slots], part["tokens"][0].float())
        out: Tensor = thin.unflatten(0, p.shape[:2]) @ block["basis"][:, 0].float().mT
        return out

    def tile(self, block: Block, const: Const) -> Tile | None:
        return Tile.dense(block["tokens"]).expand(block["basis"][:, 0].mT.contiguous())

    def terms(self, block: Block, const: Const, q: Tensor | None) -> list[Term] | None:
        return [Term(Tile.dense(block["tokens"]), q, (block["basis"], 0))]

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        r = self._rank(self.layers * heads * dim) if n else 0
        return r * (n + self.layers * heads * dim) * itemsize // self.layers
