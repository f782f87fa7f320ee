"""Block floating point: numbers that share one exponent (arXiv 2403.20137)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane
from kvloom.core.site import Site
from kvloom.errors import RecipeError
from kvloom.kernels.pack import pack, unpack
from kvloom.kernels.tile import Tile

__all__ = ["MANTISSAS", "BlockFloat"]

BIAS = 127  # of the exponents; they saturate at both ends
MANTISSAS = (2, 3, 4, 8)


class BlockFloat(Codec):
    """`size` neighbouring channels of a token share the exponent of the largest, e = floor(log2 max|x|); each has a signed
    mantissa of `bits` bits: step = 2^(e + 2 - bits), code = clamp(round(x / step), -2^(bits - 1), 2^(bits - 1) - 1).

    size=None, or more than the head has: the whole head. Fields: codes [h, n, D * bits / 8] uint8, plus 2^(bits - 1), and exponent [h, n, D / size] uint8.
    """

    def __init__(self, bits: int, size: int | None) -> None:
        if isinstance(bits, bool) or bits not in MANTISSAS:
            raise RecipeError(f"bits={bits!r} is not supported. Choose one of {', '.join(map(str, MANTISSAS))}.")
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 8 or size % 8):
            raise RecipeError(f"block={size!r} must be a positive multiple of 8, such as 32, or None.")
        self.bits, self.size = bits, size
        self.per = {"codes": 1, "exponent": 1}

    def __repr__(self) -> str:
        return f"BlockFloat(bits={self.bits}, size={self.size})"

    def width(self, dim: int) -> int:
        """Channels that share an exponent, in a head of `dim`."""
        return min(self.size or dim, dim)

    def check(self, site: Site, plane: Plane) -> None:
        dim = site.key_dim if plane == "key" else site.value_dim
        if dim % self.width(dim) or dim % 8:
            fits = [g for g in range(8, dim + 1, 8) if dim % g == 0]
            raise RecipeError(
                f"block={self.size} does not divide the head size {dim} of layer {site.layer}. Use one of {fits}."
            )

    def encode(self, x: Tensor, const: Const) -> Block:
        grouped = x.float().unflatten(2, (-1, self.width(x.shape[2])))
        # frexp's exponent is floor(log2) + 1; of 0 it is 0, whatever the numbers around it
        top = grouped.abs().amax(-1)
        exponent = (torch.frexp(top).exponent - 1).masked_fill_(top == 0, -BIAS).clamp_(-BIAS, 255 - BIAS)
        half = 2 ** (self.bits - 1)
        codes = torch.ldexp(grouped, (self.bits - 2 - exponent)[..., None]).round_().clamp_(-half, half - 1).add_(half)
        return {
            "codes": pack(codes.flatten(2).to(torch.uint8), self.bits),
            "exponent": (exponent + BIAS).to(torch.uint8),
        }

    def decode(self, block: Block, const: Const) -> Tensor:
        steps = torch.exp2(block["exponent"].float() + (2 - self.bits - BIAS))
        codes: Tensor = unpack(block["codes"], self.bits).float().sub_(2 ** (self.bits - 1))
        return codes.view(*steps.shape, -1).mul_(steps[..., None]).flatten(2)

    def tile(self, block: Block, const: Const) -> Tile | None:
        return Tile.codes(block["codes"], self.bits, _mantissas(self.bits)).affine(block["exponent"])

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return heads * n * (dim * self.bits // 8 + dim // self.width(dim))


@functools.cache
def _mantissas(bits: int) -> Tensor:
    """What the codes stand for where the exponent is 0: [1, 1, 2**bits, 1] fp32."""
    with torch.inference_mode(False):
        half = 2 ** (bits - 1)
        return (torch.arange(-half, half) * 2.0 ** (2 - bits))[None, None, :, None]
