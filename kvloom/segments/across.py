"""Channels of all heads together: turned over several heads at once and put in a learned order (RotateKV, arXiv 2501.16383)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane, Tapped
from kvloom.core.site import Site
from kvloom.errors import RecipeError
from kvloom.kernels.tile import Tile
from kvloom.segments.nested import Nested
from kvloom.segments.rotate import hadamard

__all__ = ["AcrossHeads", "blocked", "turned_together"]


def turned_together(heads: int, most: int) -> int:
    """How many of `heads` KV heads are turned together: as many as divide both."""
    return gcd(heads, most)


def blocked(x: Tensor, size: int) -> Tensor:
    """Hadamard's transform of every `size` consecutive channels of the last dimension; its own inverse. fp32."""
    return hadamard(x.unflatten(-1, (-1, size))).flatten(-2)


class AcrossHeads(Nested):
    """Stores all heads of a token as one wide one: turned by Hadamard's matrix over `together` heads at a time (or the most
    below that which divides their number), its channels in the order of a profile, so that those next to one another are
    alike. `orders[layer]` [H, D] int16: which of the H * D turned channels comes first, second, ...; None: as they are.

    Heads are mixed, so this can't be folded into a query; what is read is turned back, some slots at a time.
    Fields: those of `inner` for one head of H * D channels. Constants: order [H, D] int16.
    """

    def __init__(
        self, inner: Codec, together: int = 4, orders: Mapping[int, Tensor] | None = None, tap: Tapped = "post-rope"
    ) -> None:
        if isinstance(together, bool) or not isinstance(together, int) or together < 1:
            raise RecipeError(
                f"heads={together!r} must be a whole number of heads that are turned together, such as 4."
            )
        super().__init__(inner)
        self.together, self.orders = together, orders
        self.scope, self.tap = "layer", tap

    def __repr__(self) -> str:
        return f"AcrossHeads({self.inner!r}, together={self.together})"

    def check(self, site: Site, plane: Plane) -> None:
        dim = site.key_dim if plane == "key" else site.value_dim
        size = turned_together(site.kv_heads, self.together) * dim
        if size & (size - 1):
            raise RecipeError(
                f"heads={self.together}: {size // dim} heads of {dim} channels in layer {site.layer} are {size}, and Hadamard's "
                "transform needs a power of two. Use a recipe such as turboquant, whose rotation takes any head size."
            )
        self.inner.check(_wide(site), plane)

    def const(self, site: Site, plane: Plane) -> Const:
        if self.orders is not None:
            order = self.orders[site.layer]
        else:
            dim = site.key_dim if plane == "key" else site.value_dim
            order = torch.arange(site.kv_heads * dim, dtype=torch.int16).view(site.kv_heads, dim)
        return {"order": order, **self.inner.const(_wide(site), plane)}

    def encode(self, x: Tensor, const: Const) -> Block:
        wide = x.transpose(0, 1).flatten(1)[None]
        turned = blocked(wide, self._size(const))
        order = const["order"].flatten().int().to(x.device)
        return self.inner.encode(turned.index_select(2, order).to(x.dtype), const)

    def decode(self, block: Block, const: Const) -> Tensor:
        ordered = self.inner.decode(block, const).float()
        order = const["order"].flatten().to(ordered.device).long()
        turned = torch.empty_like(ordered).index_copy_(2, order, ordered)
        heads, dim = const["order"].shape
        return blocked(turned, self._size(const))[0].view(-1, heads, dim).transpose(0, 1)

    def tile(self, block: Block, const: Const) -> Tile | None:
        """Every head reads all channels, and makes its own of them by a part of one matrix."""
        heads, dim = const["order"].shape
        tile = self.inner.tile({name: x.expand(heads, *x.shape[1:]) for name, x in block.items()}, const)
        if tile is None:
            return None
        turn = _turn(heads * dim, self._size(const))[const["order"].flatten().long()]
        return tile.expand(turn.view(heads * dim, heads, dim).transpose(0, 1).contiguous())

    def _size(self, const: Const) -> int:
        heads, dim = const["order"].shape
        return turned_together(heads, self.together) * dim

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return self.inner.nbytes(n, 1, heads * dim, itemsize)


@functools.cache
def _turn(channels: int, size: int) -> Tensor:
    """`blocked` as a matrix [C, C] fp32."""
    with torch.inference_mode(False):
        return blocked(torch.eye(channels), size)


def _wide(site: Site) -> Site:
    """The layer as one with a single head of all channels."""
    return replace(site, kv_heads=1, key_dim=site.kv_heads * site.key_dim, value_dim=site.kv_heads * site.value_dim)
