"""Codes for vectors whose direction is as good as random: a length and one fixed codebook (TurboQuant, arXiv 2504.19874)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane
from kvloom.core.site import Site
from kvloom.errors import RecipeError
from kvloom.kernels.pack import BITS, pack, unpack
from kvloom.kernels.tile import Term, Tile
from kvloom.segments.lloyd import lloyd
from kvloom.segments.nested import Nested

__all__ = ["SignResidual", "Sphere", "levels"]

GRID = 1 << 16  # cells in which the density of a coordinate is known
ROUNDS = 20000
SIGNS = torch.tensor([[-1.0, 1.0]])


@functools.cache
def levels(bits: int, dim: int) -> Tensor:
    """The 2**bits numbers with least mean squared error for one coordinate of a random unit vector: [1, 2**bits] fp32.

    Lloyd's iteration on the density (1 - x^2)^((dim - 3) / 2), started at evenly likely numbers; ascending, symmetric.
    """
    with torch.inference_mode(False):
        if dim < 3:
            raise RecipeError(f"a head size of {dim} is too small for this code.")
        x = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID * 2 - 1
        mass = torch.exp((dim - 3) / 2 * torch.log1p(-x * x))
        found = lloyd(x, mass, 2**bits, ROUNDS)
        return ((found - found.flip(0)) / 2).float()[None]


def _sized(x: Tensor, like: torch.dtype) -> Tensor:
    """Lengths [h, n, 1] in 16 bits; what those can't hold saturates."""
    small = like if like.itemsize == 2 else torch.float16
    return x.clamp(max=torch.finfo(small).max).to(small)


class Sphere(Codec):
    """x = ||x|| u, and each coordinate of u by its nearest of `levels`, scaled for the head size. Wants rotated vectors.

    `renorm`: what the codes say is brought back to length 1 before it is multiplied by ||x||.
    Fields: codes [h, n, D * bits / 8] uint8, size [h, n, 1] 16-bit. Constants: levels [1, 2**bits], one for the model.
    """

    def __init__(self, bits: int, renorm: bool = False) -> None:
        if isinstance(bits, bool) or bits not in BITS:
            raise RecipeError(f"bits={bits!r} is not supported. Choose one of {', '.join(map(str, BITS))}.")
        self.bits, self.renorm = bits, bool(renorm)
        self.per = {"codes": 1, "size": 1}

    def __repr__(self) -> str:
        return f"Sphere(bits={self.bits}{', renorm=True' if self.renorm else ''})"

    def check(self, site: Site, plane: Plane) -> None:
        dim = site.key_dim if plane == "key" else site.value_dim
        if dim % 8:
            raise RecipeError(
                f"codes of {self.bits} bits need a head size that 8 divides; layer {site.layer} has {dim}."
            )

    def const(self, site: Site, plane: Plane) -> Const:
        return {"levels": levels(self.bits, site.key_dim if plane == "key" else site.value_dim)}

    def encode(self, x: Tensor, const: Const) -> Block:
        y, table = x.float(), const["levels"][0].to(x.device)
        size = y.norm(dim=-1, keepdim=True)
        unit = y / size.masked_fill(size == 0, 1.0)
        codes = torch.bucketize(unit.contiguous(), (table[1:] + table[:-1]) / 2).to(torch.uint8)
        return {"codes": pack(codes, self.bits), "size": _sized(size, x.dtype)}

    def decode(self, block: Block, const: Const) -> Tensor:
        unit = const["levels"][0].to(block["codes"].device)[unpack(block["codes"], self.bits).int()]
        if self.renorm:
            unit = unit / unit.norm(dim=-1, keepdim=True)
        return unit * block["size"].float()

    def tile(self, block: Block, const: Const) -> Tile | None:
        tile = Tile.codes(block["codes"], self.bits, const["levels"])
        return (tile.unit() if self.renorm else tile).affine(block["size"])

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return heads * n * (dim * self.bits // 8 + 2)


@functools.cache
def _projection(dim: int, seed: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.randn(1, dim, dim, generator=torch.Generator().manual_seed(seed))


class SignResidual(Nested):
    """Beside the inner codes, the signs of a random projection of what they leave over: dot products without bias.

    <q, x> is told as <q, inner> + ||r|| sqrt(pi / 2) / D <S q, sign(S r)>, with r what the inner code leaves over.
    Fields beside the inner ones: signs [h, n, D / 8] uint8, rest [h, n, 1] 16-bit. Constants: projection S [1, D, D].
    """

    def __init__(self, inner: Codec, seed: int = 1) -> None:
        super().__init__(inner, signs=1, rest=1)
        self.seed = seed

    def __repr__(self) -> str:
        return f"SignResidual({self.inner!r})"

    def const(self, site: Site, plane: Plane) -> Const:
        dim = site.key_dim if plane == "key" else site.value_dim
        return {**self.inner.const(site, plane), "projection": _projection(dim, self.seed)}

    def encode(self, x: Tensor, const: Const) -> Block:
        block = self.inner.encode(x, const)
        rest = x.float() - self.inner.decode(block, const).float()
        signs = (rest @ const["projection"].to(x.device).transpose(1, 2) >= 0).to(torch.uint8)
        return {**block, "signs": pack(signs, 1), "rest": _sized(rest.norm(dim=-1, keepdim=True), x.dtype)}

    def decode(self, block: Block, const: Const) -> Tensor:
        signs = unpack(block["signs"], 1).float() * 2 - 1
        scale = block["rest"].float() * (math.sqrt(math.pi / 2) / signs.shape[-1])
        more = signs @ const["projection"].to(signs.device)
        return self.inner.decode(self.within(block), const).float() + more * scale

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        out = self.inner.dot(q, self.within(block), const, scale)
        asked = (q.float() * (scale * math.sqrt(math.pi / 2) / q.shape[-1])) @ const["projection"].to(
            q.device
        ).transpose(1, 2)
        for slots, part in self.pieces(block, q.shape[0] * q.shape[2]):
            signs = unpack(part["signs"], 1).float() * 2 - 1
            out[..., slots] += asked @ signs.transpose(1, 2) * part["rest"].float().transpose(1, 2)
        return out

    def terms(self, block: Block, const: Const, q: Tensor | None) -> list[Term] | None:
        """Queries and sums go through the projection, so signs stay signs."""
        terms = self.inner.terms(self.within(block), const, q)
        if terms is None:
            return None
        signs = Tile.codes(block["signs"], 1, SIGNS).affine(block["rest"])
        out = const["projection"].transpose(1, 2) * (math.sqrt(math.pi / 2) / signs.width)  # [1, D, D]
        more = Term(signs, right=(out.contiguous()[:, None], 0)) if q is None else Term(signs, q @ out)
        return [*terms, more]

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return self.inner.nbytes(n, heads, dim, itemsize) + heads * n * (dim // 8 + 2)
