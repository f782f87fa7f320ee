"""Channels of a head in another order, so that those that share a scale are alike (arXiv 2403.20137)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane
from kvloom.core.site import Site
from kvloom.kernels.tile import Term, Tile
from kvloom.segments.nested import Nested

__all__ = ["Permute"]


class Permute(Nested):
    """Stores the channels of every head in the order of `orders[layer]` [H, D] (None: as they are); asks with queries in the
    same order, and brings sums of values back. Constants: order [H, D] int16: which channel comes first, second, ...
    """

    def __init__(self, inner: Codec, orders: Mapping[int, Tensor] | None = None) -> None:
        super().__init__(inner)
        self.orders = orders

    def __repr__(self) -> str:
        return f"Permute({self.inner!r})"

    def around(self, inner: Codec) -> Codec | None:
        own = self.inner.around(inner)
        return None if own is None else Permute(own, self.orders)

    def const(self, site: Site, plane: Plane) -> Const:
        dim = site.key_dim if plane == "key" else site.value_dim
        even = torch.arange(dim, dtype=torch.int16).expand(site.kv_heads, -1).contiguous()
        return {"order": even if self.orders is None else self.orders[site.layer], **self.inner.const(site, plane)}

    def encode(self, x: Tensor, const: Const) -> Block:
        return self.inner.encode(self._on(x, const), const)

    def decode(self, block: Block, const: Const) -> Tensor:
        return self._off(self.inner.decode(self.within(block), const), const)

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        return self.inner.dot(self._on(q, const), self.within(block), const, scale)

    def mix(self, p: Tensor, block: Block, const: Const) -> Tensor:
        return self._off(self.inner.mix(p, self.within(block), const), const)

    def tile(self, block: Block, const: Const) -> Tile | None:
        tile = self.inner.tile(self.within(block), const)
        return None if tile is None else tile.permute(const["order"].argsort(-1).int()[:, None])

    def terms(self, block: Block, const: Const, q: Tensor | None) -> list[Term] | None:
        if q is None:
            return super().terms(block, const, q)
        return self.inner.terms(self.within(block), const, self._on(q, const))

    def _at(self, x: Tensor, const: Const) -> Tensor:
        return const["order"].to(x.device).long()[:, None].expand(-1, x.shape[1], -1)

    def _on(self, x: Tensor, const: Const) -> Tensor:
        return x.gather(2, self._at(x, const))

    def _off(self, x: Tensor, const: Const) -> Tensor:
        return torch.empty_like(x).scatter_(2, self._at(x, const), x)
