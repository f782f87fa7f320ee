"""Outlier-victim pairs: of two neighbours one may be large, at the other's expense (OliVe, arXiv 2304.07493).

Four bits tell a whole number from -7 to 7. The sixteenth code marks a victim: it is 0, and its neighbour's code then stands
for a number beyond that range, with two bits of exponent and one of mantissa.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor

from kvloom.core.codec import Block, Const, Plane
from kvloom.core.site import Site
from kvloom.errors import RecipeError
from kvloom.kernels.tile import Tile
from kvloom.segments.product import Book

__all__ = ["LARGE", "Pairs"]

LARGE = (12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0)  # what outliers are told as; the others are 0 to 7
BORDER = 9.5  # nearer to 12 than to 7
VICTIM = 8
MOST = 1 << 19  # numbers that candidates are tried on at a time


@functools.cache
def _book() -> Tensor:
    """[1, 1, 256, 2]: what every byte says, the even channel's code in its lower half."""
    with torch.inference_mode(False):
        plain = torch.tensor([*range(8), 0, *range(-7, 0)], dtype=torch.float32)
        large = torch.tensor([0.0, *LARGE, 0.0, *(-x for x in LARGE)])
        low, high = torch.arange(256) & 15, torch.arange(256) >> 4
        even = torch.where(high == VICTIM, large[low], plain[low])
        odd = torch.where(low == VICTIM, large[high], plain[high])
        return torch.stack([even, odd], -1)[None, None]


def _codes(y: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [..., D] in units of the scale -> codes [..., D] int64 and what they are read back as."""
    steps, borders = (torch.tensor(x, device=y.device) for x in (LARGE, _borders()))
    far = y.abs() > BORDER
    even, odd = far.unflatten(-1, (-1, 2)).unbind(-1)
    keep = torch.stack([even, odd & ~even], -1).flatten(-2)  # of two outliers the left one survives
    gone = torch.stack([odd & ~even, even], -1).flatten(-2)
    place = torch.bucketize(y.abs(), borders)
    large, plain = steps[place].copysign(y), y.round().clamp(-7, 7)
    codes = torch.where(keep, place + 1 + 8 * (y < 0), plain.long() & 15).masked_fill_(gone, VICTIM)
    return codes, torch.where(keep, large, plain).masked_fill_(gone, 0.0)


def _borders() -> tuple[float, ...]:
    return tuple((a + b) / 2 for a, b in pairwise(LARGE))


class Pairs(Book):
    """Codes of 4 bits in units of a scale of each token and head: of the candidates alpha / 7, where alpha is `spans` times the
    larger of |mean - 3 sigma| and |mean + 3 sigma|, the one with the least squared error, victims included.

    Fields: codes [h, n, D / 2] uint8, channels 2i and 2i + 1 in byte i; scale [h, n, 1] 16-bit. Constants: book [1, 1, 256, 2].
    """

    def __init__(self, spans: tuple[float, ...]) -> None:
        if not spans or any(not isinstance(p, int | float) or p <= 0 for p in spans):
            raise RecipeError(f"spans={spans!r} must be positive numbers, such as (0.75, 1.0, 1.5).")
        super().__init__(2, 8)
        self.spans = tuple(map(float, spans))
        self.per = {"codes": 1, "scale": 1}

    def __repr__(self) -> str:
        return f"Pairs(spans of {len(self.spans)})"

    def check(self, site: Site, plane: Plane) -> None:
        dim = site.key_dim if plane == "key" else site.value_dim
        if dim % 2:
            raise RecipeError(f"pairs need an even head size; layer {site.layer} has {dim}.")

    def const(self, site: Site, plane: Plane) -> Const:
        return {"book": _book()}

    def scales(self, block: Block) -> Tensor:
        return block["scale"][..., 0].float()

    def tile(self, block: Block, const: Const) -> Tile | None:
        tile = super().tile(block, const)
        return None if tile is None else tile.affine(block["scale"])

    def encode(self, x: Tensor, const: Const) -> Block:
        small = x.dtype if x.dtype.itemsize == 2 else torch.float16
        each = max(1, MOST // (len(self.spans) * x.shape[0] * x.shape[2]))
        scale = torch.cat([self._scale(part.float(), small) for part in x.split(each, 1)], 1)
        codes = _codes(_over(x.float(), scale))[0]
        even, odd = codes.unflatten(2, (-1, 2)).unbind(-1)
        return {"codes": (even | odd << 4).to(torch.uint8), "scale": scale}

    def _scale(self, x: Tensor, small: torch.dtype) -> Tensor:
        """[h, n, 1] 16-bit."""
        sigma, mean = torch.std_mean(x, -1, correction=0, keepdim=True)
        base = mean.abs() + 3 * sigma
        spans = torch.tensor(self.spans, device=x.device)[:, None, None, None]
        tried = (spans * base / 7).clamp(max=torch.finfo(small).max).to(small)  # [spans, h, n, 1]
        y = _over(x, tried)
        error = ((_codes(y)[1] - y) * tried.float()).square().sum(-1, keepdim=True)
        return tried.gather(0, error.argmin(0, keepdim=True))[0]

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return heads * n * (dim // 2 + 2)


def _over(x: Tensor, scale: Tensor) -> Tensor:
    return x / scale.float().masked_fill(scale == 0, 1.0)
