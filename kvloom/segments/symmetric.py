"""Codes on both sides of 0, with a scale and no zero (FireQ, arXiv 2505.20839)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane
from kvloom.core.site import Site
from kvloom.errors import RecipeError
from kvloom.kernels.pack import pack, unpack
from kvloom.kernels.tile import Tile
from kvloom.segments.minmax import MinMax

__all__ = ["Symmetric"]


class Symmetric(Codec):
    """Along channels: s = max|x| / (2**(bits - 1) - 1) of `group` channels (None: the whole head), code = round(x / s), so a code
    is never the lowest. The scale is 16-bit, or with `fp8` e4m3, which spans 2**-9 to 448.

    Fields: codes [h, n, D * bits / 8] uint8, plus 2**(bits - 1); scale [h, n, D / group] 16-bit, or uint8 that hold e4m3.
    """

    def __init__(self, bits: int, group: int | None = None, fp8: bool = False) -> None:
        MinMax(bits, group, "channels")  # the same bits and groups are refused
        if bits < 2:
            raise RecipeError(f"bits={bits!r} leaves no sign to a symmetric code. Use 2 or more.")
        self.bits, self.group, self.fp8 = bits, group, fp8
        self.per = {"codes": 1, "scale": 1}

    def __repr__(self) -> str:
        return f"Symmetric(bits={self.bits}, group={self.group}{', fp8' if self.fp8 else ''})"

    def check(self, site: Site, plane: Plane) -> None:
        MinMax(self.bits, self.group, "channels").check(site, plane)

    def encode(self, x: Tensor, const: Const) -> Block:
        small = torch.float8_e4m3fn if self.fp8 else x.dtype if x.dtype.itemsize == 2 else torch.float16
        half, limits = 2 ** (self.bits - 1), torch.finfo(small)
        grouped = x.float().unflatten(2, (-1, self.group or x.shape[2]))
        exact = grouped.abs().amax(-1).div_(half - 1).clamp_(max=limits.max / half)
        scale = exact.to(small)
        step = scale.float().masked_fill_(exact == 0, 1.0).clamp_min_(2.0**-9 if self.fp8 else limits.tiny)
        codes = (grouped / step[..., None]).round_().clamp_(-half, half - 1).add_(half)
        held = scale.view(torch.uint8) if self.fp8 else scale
        return {"codes": pack(codes.flatten(2).to(torch.uint8), self.bits), "scale": held}

    def _scale(self, block: Block) -> Tensor:
        return block["scale"].contiguous().view(torch.float8_e4m3fn) if self.fp8 else block["scale"]

    def decode(self, block: Block, const: Const) -> Tensor:
        scale = self._scale(block).float()
        codes: Tensor = unpack(block["codes"], self.bits).float().sub_(2 ** (self.bits - 1))
        return codes.view(*scale.shape, -1).mul_(scale[..., None]).flatten(2)

    def tile(self, block: Block, const: Const) -> Tile | None:
        scale = self._scale(block)
        return Tile.codes(block["codes"], self.bits, _whole(self.bits)).affine(scale.bfloat16() if self.fp8 else scale)

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return heads * n * (dim * self.bits // 8 + (1 if self.fp8 else 2) * (dim // (self.group or dim)))


@functools.cache
def _whole(bits: int) -> Tensor:
    """What the codes stand for where the scale is 1: [1, 1, 2**bits, 1] fp32."""
    with torch.inference_mode(False):
        half = 2 ** (bits - 1)
        return torch.arange(-half, half, dtype=torch.float32)[None, None, :, None]
