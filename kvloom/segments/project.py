"""Keys or values as coordinates in a few directions: MatryoshkaKV (arXiv 2410.14731), CSKV (arXiv 2409.10593), joined KV heads
(arXiv 2406.07056), the key store of ShadowKV (arXiv 2410.21465).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane, Tapped
from kvloom.core.site import Site
from kvloom.errors import RecipeError
from kvloom.kernels.tile import Term, Tile
from kvloom.segments.nested import Nested

__all__ = ["Project"]


@cache
def _one() -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(1, 1, 1)


def ones_of(n: int) -> Tensor:
    """[1, n, 1], one number for all."""
    return _one().expand(1, n, 1)


class Project(Nested):
    """Stores c = (x - mean) U of `join` adjacent heads together (None: all) in the inner codec; read as c U^T + mean.

    U has `rank` orthonormal columns. Attention stays in those directions: queries are asked as q U, once per call, and sums of
    coordinates turn back by U^T once. Keys from before RoPE can't be asked so: the plane reads them piece by piece.

    `profile[layer]` holds basis [h / join, join, D, rank] and perhaps mean [h / join, join, D]. Without one the basis is that
    of what is frozen at once, by its singular vectors (all of them, if they are fewer than `rank`), and a field of its block; what would
    be larger so than it is stays exact. The inner codec sees h / join heads of
    `rank` channels. Fields beside the inner ones, without a profile: basis [h / join, 1, join, D, rank].
    """

    def __init__(
        self,
        inner: Codec,
        rank: int,
        join: int | None = 1,
        profile: Mapping[int, Const] | None = None,
        own: bool = False,
        tap: Tapped = "post-rope",
    ) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise RecipeError(f"rank={rank!r} must be a whole number, at least 1.")
        super().__init__(inner, **({"basis": 0} if own else {}))
        self.rank, self.join, self.profile, self.fresh, self.tap = rank, join, profile, own, tap
        self.scope = inner.scope if join == 1 else "layer"

    def __repr__(self) -> str:
        return f"Project({self.inner!r}, rank={self.rank}, join={self.join})"

    def check(self, site: Site, plane: Plane) -> None:
        dim = site.key_dim if plane == "key" else site.value_dim
        join = self.join or site.kv_heads
        if site.kv_heads % join:
            raise RecipeError(
                f"layer {site.layer} has {site.kv_heads} KV heads, which can't be joined {join} at a time. "
                f"Use one of {[n for n in range(1, site.kv_heads + 1) if site.kv_heads % n == 0]}."
            )
        if self.rank > join * dim and not self.fresh:
            raise RecipeError(
                f"rank={self.rank} is more than the {join * dim} channels of layer {site.layer}. Use less."
            )
        self.inner.check(replace(site, kv_heads=site.kv_heads // join, key_dim=self.rank, value_dim=self.rank), plane)

    def const(self, site: Site, plane: Plane) -> Const:
        inner = self.inner.const(site, plane)
        if self.fresh:
            return inner
        if self.profile is not None:
            return {**inner, **self.profile[site.layer]}
        dim, join = site.key_dim if plane == "key" else site.value_dim, self.join or site.kv_heads
        basis = torch.eye(join * dim, self.rank).unflatten(0, (join, dim))
        return {**inner, "basis": basis.expand(site.kv_heads // join, -1, -1, -1)}

    def encode(self, x: Tensor, const: Const) -> Block:
        join = self.join or len(x)
        wide = x.unflatten(0, (-1, join)).transpose(1, 2).flatten(2).float()  # [h / join, n, join * D]
        own: Block = {}
        if self.fresh:
            gram = wide.double()
            top = torch.linalg.eigh(gram.transpose(1, 2) @ gram).eigenvectors.flip(-1)[..., : self.rank]
            own = {"basis": top.unflatten(1, (join, -1))[:, None].to(x.dtype)}
        basis = self._basis(own, const, wide).flatten(1, 2)
        if "mean" in const:
            wide = wide - const["mean"].to(wide).flatten(1)[:, None]
        return {**self.inner.encode((wide @ basis).to(x.dtype), const), **own}

    def decode(self, block: Block, const: Const) -> Tensor:
        c = self.inner.decode(self.within(block), const)
        basis = self._basis(block, const, c)
        x: Tensor = torch.einsum("gnr,gtdr->gtnd", c.float(), basis).flatten(0, 1)
        if "mean" in const:
            x = x + const["mean"].to(x).flatten(0, 1)[:, None]
        return x.to(c.dtype)

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        basis = self._basis(block, const, q)
        asked = q.float() @ basis.flatten(0, 1)  # [h, R, rank]
        logits = self.inner.dot(self._joined(asked, basis), self.within(block), const, scale)
        logits = logits.reshape(*q.shape[:2], -1)
        if "mean" in const:
            logits += q.float() @ (scale * const["mean"].to(q.device).flatten(0, 1)[..., None])
        return logits

    def mix(self, p: Tensor, block: Block, const: Const) -> Tensor:
        basis = self._basis(block, const, p)
        c = self.inner.mix(self._joined(p, basis), self.within(block), const).reshape(*p.shape[:2], -1)
        out: Tensor = torch.matmul(c, basis.flatten(0, 1).transpose(1, 2))
        if "mean" in const:
            out += p.sum(-1, keepdim=True) * const["mean"].to(p).flatten(0, 1)[:, None]
        return out

    def tile(self, block: Block, const: Const) -> Tile | None:
        c = self.inner.tile(self.within(block), const)
        basis = self._basis(block, const, next(iter(block.values())))
        if c is None or len(basis) > 1 < basis.shape[1]:
            return None
        tile = c.expand(basis.flatten(0, 1).transpose(1, 2).contiguous())
        return tile.affine(None, const["mean"].flatten(0, 1)[:, None], per=0) if "mean" in const else tile

    def terms(self, block: Block, const: Const, q: Tensor | None) -> list[Term] | None:
        """Coordinates asked by q U, summed and then turned back; the mean as one more coordinate, always 1."""
        basis = self._basis(block, const, next(iter(block.values())))
        groups, join = basis.shape[:2]
        basis = basis.flatten(0, 1)
        terms = self.inner.terms(self.within(block), const, None if q is None else q @ basis)
        if terms is not None and groups > 1 < join:
            reads = torch.arange(groups).repeat_interleave(join)
            terms = [replace(term, tile=term.tile.read_by(reads)) for term in terms]
        if terms is None or "mean" not in const:
            return terms if terms is None or q is not None else [term.then(basis.contiguous()) for term in terms]
        mean = const["mean"].float().flatten(0, 1)[..., None]  # [h, D, 1]
        ones = Tile.dense(ones_of(self.slots(block)))
        if q is not None:
            return [*terms, Term(ones, (q @ mean).contiguous())]
        return [*(term.then(basis) for term in terms), Term(ones, right=(mean[:, None], 0))]

    def _basis(self, block: Block, const: Const, like: Tensor) -> Tensor:
        """[h / join, join, D, rank] fp32."""
        basis = block["basis"][:, 0] if self.fresh else const["basis"]
        return basis.to(like.device, torch.float32)

    @staticmethod
    def _joined(x: Tensor, basis: Tensor) -> Tensor:
        """Rows of heads that share coordinates, together: [h, R, m] -> [h / join, join * R, m]."""
        rows: Tensor = x.unflatten(0, basis.shape[:2]).flatten(1, 2)
        return rows

    def pays(self, planes: list[Tensor]) -> bool:
        h, n, dim = planes[0].shape
        return not self.fresh or self.nbytes(n, h, dim, 1) < n * h * dim

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        join = self.join or heads
        rank = min(self.rank, join * dim)
        own = rank * heads * dim * itemsize if self.fresh and n else 0
        return self.inner.nbytes(n, heads // join, rank, itemsize) + own
