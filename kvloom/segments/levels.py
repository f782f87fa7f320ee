"""Codes with levels that are not evenly spaced, from a profile (KVQuant, arXiv 2401.18079)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane, Tapped
from kvloom.core.site import Site
from kvloom.errors import RecipeError
from kvloom.kernels.pack import BITS, pack, unpack
from kvloom.kernels.tile import Tile

__all__ = ["Levels"]


class Levels(Codec):
    """The nearest of 2**bits levels of (x - mid) / half; read back as shown[code] * half + mid.

    `along` "tokens": mid and half belong to a channel and come from the profile; "channels": they are the middle and half
    the range of a token's numbers, over all heads (`scope` "layer") or in each. `profile[layer]` holds levels and shown
    [1, 2**bits], ascending, and along tokens mid and half [h, D]. Without a profile: levels evenly spaced over [-1, 1].

    Fields: codes [h, n, D * bits / 8] uint8; along channels mid and half [1 or h, n, 1], 16-bit.
    """

    def __init__(
        self,
        bits: int,
        along: Literal["tokens", "channels"],
        profile: Mapping[int, Const] | None = None,
        scope: Literal["layer", "head"] = "layer",
        tap: Tapped = "post-rope",
    ) -> None:
        if isinstance(bits, bool) or bits not in BITS:
            raise RecipeError(f"bits={bits!r} is not supported. Choose one of {', '.join(map(str, BITS))}.")
        self.bits, self.along, self.profile, self.tap = bits, along, profile, tap
        own = along == "channels"
        self.scope = scope if own else "head"
        self.per = {"codes": 1, "mid": 1, "half": 1} if own else {"codes": 1}

    def __repr__(self) -> str:
        return f"Levels(bits={self.bits}, along={self.along!r}, scope={self.scope!r})"

    def check(self, site: Site, plane: Plane) -> None:
        dim = site.key_dim if plane == "key" else site.value_dim
        if dim % 8:
            raise RecipeError(f"bits={self.bits} needs a head size that 8 divides; layer {site.layer} has {dim}.")

    def const(self, site: Site, plane: Plane) -> Const:
        if self.profile is not None:
            return dict(self.profile[site.layer])
        even = torch.linspace(-1, 1, 2**self.bits)[None]
        shape = (site.kv_heads, site.key_dim if plane == "key" else site.value_dim)
        channels = {"mid": torch.zeros(shape), "half": torch.ones(shape)} if self.along == "tokens" else {}
        return {"levels": even, "shown": even, **channels}

    def _range(self, block: Block, const: Const) -> tuple[Tensor, Tensor]:
        """mid and half, broadcastable to [h, n, D], fp32."""
        if self.along == "channels":
            return block["mid"].float(), block["half"].float()
        device = block["codes"].device
        return const["mid"].float().to(device)[:, None], const["half"].float().to(device)[:, None]

    def encode(self, x: Tensor, const: Const) -> Block:
        y, own = x.float(), {}
        if self.along == "channels":
            small = x.dtype if x.dtype.itemsize == 2 else torch.float16
            low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
            if self.scope == "layer":
                low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
            most = torch.finfo(small).max  # what 16 bits can't hold saturates
            own = {
                name: z.clamp(-most, most).to(small)
                for name, z in (("mid", (low + high) / 2), ("half", (high - low) / 2))
            }
        mid, half = self._range({"codes": x, **own}, const)
        table = const["levels"][0].to(x.device)
        spread = torch.where(half > 0, half, 1.0)
        codes = torch.bucketize(((y - mid) / spread).contiguous(), (table[1:] + table[:-1]) / 2).to(torch.uint8)
        return {"codes": pack(codes, self.bits), **own}

    def decode(self, block: Block, const: Const) -> Tensor:
        mid, half = self._range(block, const)
        return const["shown"][0].to(mid.device)[unpack(block["codes"], self.bits).int()] * half + mid

    def tile(self, block: Block, const: Const) -> Tile | None:
        tile = Tile.codes(block["codes"], self.bits, const["shown"])
        if self.along == "channels":
            return tile.affine(block["half"], block["mid"])
        return tile.affine(const["half"][:, None], const["mid"][:, None], per=0)

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        ranges = 0 if self.along == "tokens" else 4 * n * (1 if self.scope == "layer" else heads)
        return heads * n * dim * self.bits // 8 + ranges
