"""What a code leaves over, as a product of two thin matrices: the low-rank part of GEAR (arXiv 2403.05527)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane
from kvloom.core.site import Site
from kvloom.errors import RecipeError
from kvloom.kernels.tile import Term, Tile
from kvloom.segments.nested import Nested

__all__ = ["LowRank"]


class LowRank(Nested):
    """Adds left right^T to what `inner` decodes to: the error that it made on `chunk` tokens, rank `rank` per head.

    `chunk` None: all that is frozen at once is one chunk. Power iteration finds the factors: `loops` products with the error
    and its transpose, the last ones orthonormalized, from a fixed random start. Attention takes the factors as they are:
    q k^T gains (q right) left^T, and p v gains (p left) right^T.

    Fields beside the inner ones: left [h, n, r], right [h, chunks, D, r], 16-bit.
    """

    def __init__(self, inner: Codec, rank: int, chunk: int | None = None, loops: int = 3) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise RecipeError(f"rank={rank!r} must be a whole number, at least 1.")
        if isinstance(loops, bool) or not isinstance(loops, int) or loops < 1:
            raise RecipeError(f"loops={loops!r} must be a whole number, at least 1.")
        if chunk is not None and rank > chunk:
            raise RecipeError(f"rank={rank} is more than the {chunk} tokens of a chunk. Use rank={chunk} or less.")
        super().__init__(inner, left=1, right=chunk or 0)
        self.rank, self.chunk, self.loops = rank, chunk, loops
        self.unit = max(inner.unit, chunk or 1)

    def __repr__(self) -> str:
        return f"LowRank({self.inner!r}, rank={self.rank}, chunk={self.chunk})"

    def check(self, site: Site, plane: Plane) -> None:
        super().check(site, plane)
        dim = site.key_dim if plane == "key" else site.value_dim
        if self.rank > dim:
            raise RecipeError(f"rank={self.rank} is more than the head size {dim} of layer {site.layer}. Use less.")

    def encode(self, x: Tensor, const: Const) -> Block:
        block = self.inner.encode(x, const)
        error = self._chunks(x.float() - self.inner.decode(block, const).float())
        start = torch.randn(x.shape[2], self.rank, generator=torch.Generator().manual_seed(0)).to(x.device)
        right = start.expand(*error.shape[:2], -1, -1)
        left = right
        for turn in reversed(range(self.loops)):
            right = torch.linalg.qr(right).Q if turn == 0 else right
            left = error @ right
            left = torch.linalg.qr(left).Q if turn == 0 else left
            right = error.transpose(2, 3) @ left
            if turn:  # only the span counts, and without this large errors would leave fp32
                right = right / right.norm(dim=(2, 3), keepdim=True).clamp_min(1e-30)
        small = x.dtype if x.dtype.itemsize == 2 else torch.float16
        width = self.rank - left.shape[3]  # fewer tokens than ranks
        left, right = (torch.nn.functional.pad(y, (0, width)) for y in (left, right))
        return {**block, "left": left.flatten(1, 2).to(small), "right": right.to(small)}

    def _chunks(self, x: Tensor) -> Tensor:
        """[h, n, ...] -> [h, chunks, tokens, ...]."""
        chunks: Tensor = x.unflatten(1, (-1, self.chunk or x.shape[1]))
        return chunks

    def decode(self, block: Block, const: Const) -> Tensor:
        more: Tensor = self._chunks(block["left"].float()) @ block["right"].float().transpose(2, 3)
        return self.inner.decode(self.within(block), const).float() + more.flatten(1, 2)

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        out = self.inner.dot(q, self.within(block), const, scale)
        thin = (q.float() * scale)[:, None] @ block["right"].float()  # [h, chunks, R, r]
        more = thin @ self._chunks(block["left"].float()).transpose(2, 3)
        return out.add_(more.transpose(1, 2).flatten(2))

    def mix(self, p: Tensor, block: Block, const: Const) -> Tensor:
        out = self.inner.mix(p, self.within(block), const)
        left = self._chunks(block["left"].float())
        thin = p.unflatten(2, (left.shape[1], -1)).transpose(1, 2) @ left  # [h, chunks, R, r]
        return out.add_((thin @ block["right"].float().transpose(2, 3)).sum(1))

    def tile(self, block: Block, const: Const) -> Tile | None:
        tile = self.inner.tile(self.within(block), const)
        return None if tile is None else tile.product(block["left"], block["right"], self.chunk)

    def terms(self, block: Block, const: Const, q: Tensor | None) -> list[Term] | None:
        terms = self.inner.terms(self.within(block), const, q)
        thin = Term(Tile.dense(block["left"]), q, (block["right"], self.chunk or 0))
        return None if terms is None else [*terms, thin]

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        chunks = (n // self.chunk if self.chunk else 1) if n else 0
        return self.inner.nbytes(n, heads, dim, itemsize) + heads * 2 * self.rank * (n + chunks * dim)
