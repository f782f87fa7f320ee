"""KV heads pooled by their mean, and which pooled head each of the model's heads reads (key-driven GQA, arXiv 2408.08454)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane
from kvloom.core.site import Site
from kvloom.errors import RecipeError
from kvloom.kernels.tile import Tile
from kvloom.segments.nested import Nested

if TYPE_CHECKING:
    from kvloom.core.step import Step

__all__ = ["Pooled", "allocate"]

Share = Literal["norms", "even"]


def allocate(norms: Tensor, count: int) -> list[int]:
    """How many of `count` readers each head gets, by its key norm: norms [n] from 0 to 1 (the least gets 0), rounded shares.

    While the sum is too large the largest loses one, while it is too small the smallest gains one. Equal norms share evenly.
    """
    x = norms.double()
    spread = x.max() - x.min()
    x = (x - x.min()) / spread if float(spread) > 1e-6 * float(x.max()) else torch.ones_like(x)
    found = (x / x.sum() * count).round().long().tolist()
    while sum(found) > count:
        found[found.index(max(found))] -= 1
    while sum(found) < count:
        found[found.index(min(found))] += 1
    return found


class Pooled(Nested):
    """Stores the mean of `join` adjacent heads in the inner codec; the model's heads read them in runs.

    `share` "norms": longer runs for pooled heads with larger keys, by `allocate` of the Frobenius norms of the first prompt's
    pooled keys, then frozen; "even": `join` each. Constants: reads [h], the pooled head that each head reads.
    """

    def __init__(self, inner: Codec, join: int = 2, share: Share = "norms") -> None:
        super().__init__(inner)
        self.join, self.share, self.scope, self.fits = join, share, "layer", True

    def __repr__(self) -> str:
        return f"Pooled({self.inner!r}, join={self.join}, share={self.share!r})"

    def check(self, site: Site, plane: Plane) -> None:
        if site.kv_heads % min(self.join, site.kv_heads):
            raise RecipeError(f"heads={self.join} does not divide the {site.kv_heads} KV heads of layer {site.layer}.")
        super().check(site, plane)

    def fit(self, step: Step, x: Tensor) -> Const:
        heads, join = len(x), min(self.join, len(x))
        keys = self._mean(step.group.segments["main"].key.dense(0, step.group.segments["main"].n).float())
        runs = [join] * (heads // join)
        if self.share == "norms":
            runs = allocate(keys.flatten(1).norm(dim=1), heads)
        reads = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs)).to(x.device)
        return {"reads": reads, **self.inner.fit(step, self._mean(x))}

    def _mean(self, x: Tensor) -> Tensor:
        pooled: Tensor = x.unflatten(0, (-1, min(self.join, len(x)))).mean(1)
        return pooled

    def encode(self, x: Tensor, const: Const) -> Block:
        return self.inner.encode(self._mean(x), const)

    def decode(self, block: Block, const: Const) -> Tensor:
        return self.inner.decode(block, const)[const["reads"]]

    def tile(self, block: Block, const: Const) -> Tile | None:
        tile = self.inner.tile(block, const)
        return None if tile is None else tile.read_by(const["reads"])

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return self.inner.nbytes(n, heads // min(self.join, heads), dim, itemsize)
