"""Codes of a sign, or of a sign and zero, for each number: VidKV's (arXiv 2503.16257)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const
from kvloom.errors import RecipeError
from kvloom.kernels.pack import pack, unpack
from kvloom.kernels.tile import Tile

__all__ = ["Sign", "Ternary"]

_TRITS = torch.stack([torch.arange(243) // 3**i % 3 - 1 for i in range(5)], 1).float()  # what each byte stands for


class _Grouped(Codec):
    """`group` consecutive tokens of one channel share a size, the mean of their absolute values, 16-bit.

    Block: codes uint8 [h, n / group, ...]; size [h, n / group, D].
    """

    def __init__(self, group: int) -> None:
        if isinstance(group, bool) or not isinstance(group, int) or group < 8 or group % 8:
            raise RecipeError(f"group={group!r} must be a positive multiple of 8, such as 32.")
        self.group = self.unit = group
        self.per = {"codes": group, "size": group}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.group})"

    def _sized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[h, n / G, D, G] fp32, and its sizes as they are stored [h, n / G, D]."""
        grouped = x.float().unflatten(1, (-1, self.group)).transpose(2, 3)
        small = x.dtype if x.dtype.itemsize == 2 else torch.float16
        return grouped, grouped.abs().mean(-1).clamp_max(torch.finfo(small).max).to(small)

    def decode(self, block: Block, const: Const) -> Tensor:
        codes = self.codes(block["codes"], block["size"].shape[2])
        out: Tensor = (codes * block["size"].float()[..., None]).transpose(2, 3).flatten(1, 2)
        return out

    def codes(self, packed: Tensor, dim: int) -> Tensor:
        """Packed bytes -> -1, 0 or 1, [h, n / G, D, G] fp32."""
        raise NotImplementedError


class Sign(_Grouped):
    """One bit: x is read as its sign times the size, which is the size of least error for given signs."""

    def tile(self, block: Block, const: Const) -> Tile | None:
        size = block["size"]
        return Tile.minmax("tokens", 1, self.group, block["codes"], size.float() * 2, -size.float())

    def encode(self, x: Tensor, const: Const) -> Block:
        grouped, size = self._sized(x)
        return {"codes": pack((grouped >= 0).to(torch.uint8), 1), "size": size}

    def codes(self, packed: Tensor, dim: int) -> Tensor:
        return unpack(packed, 1).float().mul_(2).sub_(1)

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return heads * n // self.group * dim * (self.group // 8 + 2)


class Ternary(_Grouped):
    """Zero where |x| is at most half of the size, else its sign; read as code times size. Five codes take a byte."""

    def tile(self, block: Block, const: Const) -> Tile | None:
        return Tile.trits(block["codes"], self.group, block["size"])

    def encode(self, x: Tensor, const: Const) -> Block:
        grouped, size = self._sized(x)
        edge = 0.5 * size.float()[..., None]
        trits = ((grouped > edge).to(torch.uint8) + 1 - (grouped < -edge).to(torch.uint8)).flatten(2)
        trits = torch.nn.functional.pad(trits, (0, -trits.shape[2] % 5), value=1).unflatten(2, (-1, 5))
        weights = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=x.device)
        return {"codes": (trits * weights).sum(-1, dtype=torch.uint8), "size": size}

    def codes(self, packed: Tensor, dim: int) -> Tensor:
        found: Tensor = _TRITS.to(packed.device)[packed.int()].flatten(2)
        wide: Tensor = found[..., : dim * self.group].unflatten(2, (dim, self.group))
        return wide

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return heads * n // self.group * (-(-dim * self.group // 5) + 2 * dim)
