"""Product codes: a vector is cut into short parts, and each is told by the number of its nearest centroid (MILLION, arXiv
2504.03661). Keys are asked by lookup: a query's products with all centroids, computed once, then gathered."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane
from kvloom.core.site import Site
from kvloom.errors import RecipeError
from kvloom.kernels.pack import pack, unpack
from kvloom.kernels.tile import Tile

__all__ = ["Book", "Product", "kmeans", "nearest"]

SIZES = (1, 2, 3, 4, 8, 10, 12)  # bits of a code
MOST = 1 << 22  # distances at a time


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """The number of the centroid nearest to each part: x [M, n, d] fp32, book [M, C, d] fp32 -> [M, n] int64."""
    half = book.square().sum(-1)[:, None] / 2  # |x - c|^2 / 2 without |x|^2, which all centroids share
    each = max(1, MOST // (book.shape[0] * book.shape[1]))
    found = [torch.baddbmm(half, part, book.transpose(1, 2), alpha=-1).argmin(-1) for part in x.split(each, 1)]
    return torch.cat(found, 1)


def kmeans(x: Tensor, count: int, rounds: int = 25, seed: int = 0) -> Tensor:
    """`count` centroids of every part: x [M, n, d] -> [M, count, d] fp32. Starts at some of the vectors, the same for all parts.

    A centroid that is nearest to nothing stays where it is.
    """
    m, n, d = x.shape
    draw = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    book = x[:, draw[torch.arange(count) % n]].clone()
    first = torch.arange(m)[:, None] * count
    for _ in range(rounds):
        at = (nearest(x, book) + first).flatten()
        weight = torch.bincount(at, minlength=m * count).view(m, count, 1)
        sums = torch.zeros(m * count, d).index_add_(0, at, x.reshape(-1, d)).view(m, count, d)
        moved = torch.where(weight > 0, sums / weight.clamp_min(1), book)
        if torch.equal(moved, book):
            break
        book = moved
    return book


class Book(Codec):
    """Parts of `width` channels, each told by one code of `bits` bits; a codec says what the codes stand for.

    Fields: codes [h, n, D / width * bits / 8] uint8, packed as in `kernels.pack`; codes of more than 8 bits: the lower 8, then
    the others packed. Constants: book [1, M or 1, 2**bits, width], 16-bit or fp32.
    """

    def __init__(self, width: int, bits: int) -> None:
        self.width, self.bits = width, bits
        self.per = {"codes": 1}

    def scales(self, block: Block) -> Tensor | None:
        """What every slot's numbers are multiplied by, [h, n] fp32."""
        return None

    def book(self, const: Const, parts: int, device: torch.device) -> Tensor:
        """[M, 2**bits, width] fp32."""
        return const["book"][0].to(device).float().expand(parts, -1, -1)

    def packed(self, codes: Tensor) -> Tensor:
        """int [..., M] -> uint8 [..., M * bits / 8]."""
        if self.bits <= 8:
            return pack(codes.to(torch.uint8), self.bits)
        return torch.cat([(codes & 255).to(torch.uint8), pack((codes >> 8).to(torch.uint8), self.bits - 8)], -1)

    def places(self, block: Block) -> tuple[Tensor, int]:
        """Of every code the row of a book that has the parts one behind the other: int32 [h, n, M]; and M."""
        held = block["codes"]
        parts = held.shape[-1] * 8 // self.bits
        if self.bits <= 8:
            codes = unpack(held, self.bits).int()
        else:
            codes = held[..., :parts].int() | unpack(held[..., parts:], self.bits - 8).int() << 8
        return codes.add_(torch.arange(parts, dtype=torch.int32, device=held.device) << self.bits), parts

    def decode(self, block: Block, const: Const) -> Tensor:
        places, parts = self.places(block)
        book = self.book(const, parts, places.device).flatten(0, 1)
        x = torch.nn.functional.embedding(places, book).flatten(2)
        scales = self.scales(block)
        return x if scales is None else x.mul_(scales[..., None])

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        h, r, dim = q.shape
        book = self.book(const, dim // self.width, q.device)
        asked = (q.float() * scale).unflatten(2, (-1, self.width)).permute(0, 2, 1, 3)  # [h, M, R, width]
        table = (book @ asked.transpose(2, 3)).view(-1, r)  # [h * M * 2**bits, R]: every product that can be asked for
        head = len(table) // h
        out = []
        for _, part in self.pieces(block, 2 * h * (dim // self.width)):
            places = self.places(part)[0]
            places += torch.arange(0, h * head, head, dtype=torch.int32, device=q.device)[:, None, None]
            found = torch.nn.functional.embedding_bag(places.flatten(0, 1), table, mode="sum").view(h, -1, r)
            scales = self.scales(part)
            out.append(found if scales is None else found.mul_(scales[..., None]))
        return torch.cat(out, 1).transpose(1, 2).contiguous()

    def tile(self, block: Block, const: Const) -> Tile | None:
        return None if self.bits > 8 else Tile.codes(block["codes"], self.bits, const["book"].float(), self.width)

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return heads * n * (dim // self.width) * self.bits // 8


class Product(Book):
    """The nearest of 2**bits centroids of each part, by Euclidean distance in fp32.

    `book` [1, D / width, 2**bits, width] 16-bit: one for all layers and heads. Without one: zeros, which store nothing.
    """

    def __init__(self, width: int, bits: int = 8, book: Tensor | None = None) -> None:
        if isinstance(width, bool) or width not in (1, 2, 4, 8, 16):
            raise RecipeError(f"width={width!r} is not supported. Choose one of 1, 2, 4, 8, 16 channels for a code.")
        if isinstance(bits, bool) or bits not in SIZES:
            raise RecipeError(f"bits={bits!r} is not supported. Choose one of {', '.join(map(str, SIZES))}.")
        super().__init__(width, bits)
        self.held = book

    def __repr__(self) -> str:
        return f"Product(width={self.width}, bits={self.bits})"

    def check(self, site: Site, plane: Plane) -> None:
        dim = site.key_dim if plane == "key" else site.value_dim
        if dim % self.width or (dim // self.width % 8 and self.bits != 8):
            raise RecipeError(
                f"width={self.width} cuts the head size {dim} of layer {site.layer} into parts that codes of {self.bits} bits "
                "can't be packed for. Use a smaller width, or bits=8."
            )

    def const(self, site: Site, plane: Plane) -> Const:
        dim = site.key_dim if plane == "key" else site.value_dim
        return {"book": _blank(dim // self.width, self.bits, self.width) if self.held is None else self.held}

    def encode(self, x: Tensor, const: Const) -> Block:
        h, n, dim = x.shape
        parts = x.float().reshape(h * n, -1, self.width).transpose(0, 1)
        codes = nearest(parts, self.book(const, dim // self.width, x.device))
        return {"codes": self.packed(codes.t().reshape(h, n, -1))}


@functools.cache
def _blank(parts: int, bits: int, width: int) -> Tensor:
    return torch.zeros(1, parts, 2**bits, width, dtype=torch.float16)
