"""Asymmetric min-max quantization in groups, packed: the code of KIVI (arXiv 2402.02750) and of MiKV's low class.

z = min, s = (max - min) / (2**bits - 1), code = round((x - z) / s), and x is read back as code * s + z.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane
from kvloom.core.site import Site
from kvloom.errors import RecipeError
from kvloom.kernels import reference
from kvloom.kernels.dispatch import kernels_for
from kvloom.kernels.pack import BITS, pack, unpack
from kvloom.kernels.tile import Tile

__all__ = ["Clipped", "MinMax"]

CHUNK = 1 << 19  # numbers that are decoded at a time: 2 MiB of fp32, which a core's cache still holds


class MinMax(Codec):
    """`along` "tokens": `group` consecutive tokens of one channel share scale and minimum (keys: outliers are channels);
    "channels": `group` consecutive channels of one token do (None: the whole head). Scale and minimum are 16-bit.

    Block: codes uint8 [h, n / group, D, group * bits / 8] or [h, n, D * bits / 8]; scale and zero [h, n / group, D] or
    [h, n, D / group].
    """

    def __init__(self, bits: int, group: int | None, along: Literal["tokens", "channels"]) -> None:
        if bits not in BITS:
            raise RecipeError(f"bits={bits!r} is not supported. Choose one of {', '.join(map(str, BITS))}.")
        if group is not None and (not isinstance(group, int) or group < 8 or group % 8):
            raise RecipeError(f"group={group!r} must be a positive multiple of 8, such as 32 or 64.")
        if group is None and along == "tokens":
            raise RecipeError("group=None means the whole head, which only per-token groups can have. Give a number.")
        self.bits, self.group, self.along = bits, group, along
        self.unit = group if along == "tokens" and group else 1
        self.per = dict.fromkeys(("codes", "scale", "zero"), self.unit)
        self.flows = type(self) is MinMax and along == "channels"

    def width(self, dim: int) -> int:
        """Numbers that share a scale, in a head of `dim` channels."""
        return self.group or dim

    def __repr__(self) -> str:
        return f"MinMax(bits={self.bits}, group={self.group}, along={self.along!r})"

    def check(self, site: Site, plane: Plane) -> None:
        dim = site.key_dim if plane == "key" else site.value_dim
        group = self.width(dim)
        if self.along == "channels" and dim % group:
            fits = [g for g in range(8, dim + 1, 8) if dim % g == 0]
            raise RecipeError(
                f"group={group} does not divide the head size {dim} of layer {site.layer}. Use one of {fits or [dim]}."
            )
        if dim % 8 and self.along == "channels" and self.bits < 8:
            raise RecipeError(f"bits={self.bits} needs a head size that 8 divides; layer {site.layer} has {dim}.")

    def _grouped(self, x: Tensor) -> Tensor:
        """[h, n, D] -> [h, n / G, D, G] along tokens, [h, n, D / G, G] along channels."""
        h, n, dim = x.shape
        if self.along == "tokens":
            return x.reshape(h, n // self.unit, self.unit, dim).transpose(2, 3)
        group = self.width(dim)
        return x.reshape(h, n, dim // group, group)

    def limits(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest number of [h, groups, rows, numbers] that share a scale."""
        low, high = grouped.aminmax(dim=-1)
        return low, high

    def encode(self, x: Tensor, const: Const) -> Block:
        kernels = kernels_for(x) if type(self) is MinMax else None
        found = None if kernels is None else kernels.encode(x, self.along, self.bits, self.width(x.shape[2]))
        if found is not None:
            return dict(zip(("codes", "scale", "zero"), found, strict=True))
        small = x.dtype if x.dtype.itemsize == 2 else torch.float16
        grouped = self._grouped(x).float()
        low, high = self.limits(grouped)
        most = torch.finfo(small).max  # what 16 bits can't hold saturates
        zero = low.clamp(-most, most).to(small)
        scale = ((high - zero.float()) / (2**self.bits - 1)).clamp_(0, most).to(small)
        step = scale.float().masked_fill(scale == 0, 1.0)[..., None]
        codes = ((grouped - zero.float()[..., None]) / step).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)
        if self.along == "channels":
            codes = codes.flatten(2)
        return {"codes": pack(codes, self.bits), "scale": scale, "zero": zero}

    def decode(self, block: Block, const: Const) -> Tensor:
        codes = unpack(block["codes"], self.bits)
        scale, zero = block["scale"].float()[..., None], block["zero"].float()[..., None]
        if self.along == "tokens":
            return torch.addcmul(zero, codes.float(), scale).transpose(2, 3).flatten(1, 2)
        return torch.addcmul(zero, codes.float().unflatten(2, (block["scale"].shape[2], -1)), scale).flatten(2)

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        return torch.cat([self._dot(q, part, scale) for _, part in self._chunks(block)], -1)

    def _dot(self, q: Tensor, block: Block, scale: float) -> Tensor:
        """Along tokens the scale of a channel folds into the query, so codes are multiplied as they are."""
        if self.along == "channels":
            return reference.logits(q, self.decode(block, {}), scale)
        q = q.float() * scale
        codes = unpack(block["codes"], self.bits).float()  # [h, N, D, G]
        s, z = block["scale"].float(), block["zero"].float()  # [h, N, D]
        out = torch.matmul(q[:, None] * s[:, :, None], codes)  # [h, N, R, G]
        out += torch.matmul(q, z.transpose(1, 2)).transpose(1, 2)[..., None]
        return out.transpose(1, 2).flatten(2)

    def mix(self, p: Tensor, block: Block, const: Const) -> Tensor:
        out = None
        for rows, part in self._chunks(block):
            mine = reference.mix(p[..., rows], self.decode(part, const))
            out = mine if out is None else out.add_(mine)
        assert out is not None
        return out

    def _chunks(self, block: Block) -> list[tuple[slice, Block]]:
        """The block in pieces whose decoded form stays in cache; slots and rows of each."""
        h, rows = block["codes"].shape[:2]
        each = max(1, CHUNK // (h * (block["codes"][0, 0].numel() * 8 // self.bits if rows else 1)))
        return [
            (
                slice(at * self.unit, (at + each) * self.unit),
                {name: x[:, at : at + each] if self.per[name] else x for name, x in block.items()},
            )
            for at in range(0, rows, each)
        ]

    def tile(self, block: Block, const: Const) -> Tile | None:
        group = self.width(block["codes"].shape[2] * 8 // self.bits)
        return Tile.minmax(self.along, self.bits, group, block["codes"], block["scale"], block["zero"])

    def describe(self, block: Block, const: Const, q: Tensor | None, kept: list[Tensor]) -> Any:
        kernels = kernels_for(block["codes"])
        if kernels is None:
            return None
        group = self.width(block["codes"].shape[2] * 8 // self.bits)
        return kernels.packed(self.along, self.bits, group, block["codes"], block["scale"], block["zero"], q)

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        group = self.width(dim)
        return heads * (n * dim * self.bits // 8 + 2 * 2 * (n * dim // group))


class Clipped(MinMax):
    """Along channels, from a range that is narrowed toward 0 by `clip`, with 0 among the levels (RotateKV, arXiv 2501.16383):
    s = clip * (max - min) / (2**bits - 1), z = round(-clip * min / s), code = round(x / s) + z, read back as (code - z) * s.

    A group wider than the head is the whole head. Kept as `MinMax` keeps it, with -z * s as the zero.
    """

    def __init__(self, bits: int, group: int, clip: float) -> None:
        if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0 < clip <= 1:
            raise RecipeError(f"clip={clip!r} must be a share of the range, above 0.0 and up to 1.0, such as 0.8.")
        super().__init__(bits, group, "channels")
        self.clip = float(clip)

    def width(self, dim: int) -> int:
        return min(self.group or dim, dim)

    def __repr__(self) -> str:
        return f"Clipped(bits={self.bits}, group={self.group}, clip={self.clip})"

    def encode(self, x: Tensor, const: Const) -> Block:
        small = x.dtype if x.dtype.itemsize == 2 else torch.float16
        most, top = torch.finfo(small).max, 2**self.bits - 1
        grouped = self._grouped(x).float()
        low, high = grouped.aminmax(dim=-1)
        scale = (self.clip * (high - low) / top).clamp_(0, most).to(small)
        step = scale.float().masked_fill(scale == 0, 1.0)
        zero = (self.clip * low / step).round_().mul_(step).clamp_(-most, most).to(small)  # -z * s
        zero = torch.where(scale == 0, low.clamp(-most, most).to(small), zero)  # all numbers alike
        codes = ((grouped - zero.float()[..., None]) / step[..., None]).round_().clamp_(0, top).to(torch.uint8)
        return {"codes": pack(codes.flatten(2), self.bits), "scale": scale, "zero": zero}
