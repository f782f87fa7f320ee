"""A few numbers beside a code, exact, with their places (GEAR, arXiv 2403.05527; KVQuant, arXiv 2401.18079)."""

from __future__ import annotations

from math import ceil
from typing import Literal

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const
from kvloom.errors import RecipeError
from kvloom.kernels.tile import Tile
from kvloom.segments.nested import Nested

__all__ = ["ChannelOutliers", "RangeOutliers", "TokenOutliers", "ends", "shared_out"]


def shared_out(share: float, count: int) -> int:
    """How many of `count` numbers are taken out at each end when `share` of them are outliers: half of it, rounded."""
    return min(round(share / 2 * count), count // 2)


def place_type(count: int) -> torch.dtype:
    """The integers that hold places among `count` numbers, and one behind the last."""
    return torch.int16 if count < 2**15 else torch.int32


def ends(x: Tensor, each: int) -> Tensor:
    """Places of the `each` largest and `each` smallest numbers along the last dimension: [..., 2 * each]."""
    return torch.cat([x.topk(each, -1).indices, x.topk(each, -1, largest=False).indices], -1)


class _Outliers(Nested):
    """Fields beside the inner ones: `outlier`, the numbers themselves, and `place`, where they belong."""

    def __init__(self, inner: Codec, share: float, per: int) -> None:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise RecipeError(f"outliers={share!r} must be a share of the numbers, 0.0 to 1.0, such as 0.02.")
        super().__init__(inner, outlier=per, place=per)
        self.share = float(share)


class ChannelOutliers(_Outliers):
    """Along the tokens of each channel: the largest and the smallest numbers of `chunk` tokens (None: of all frozen at once).

    outlier, place [h, chunks, k, D]; a place is a token of its chunk, ascending along k.
    """

    def __init__(self, inner: Codec, share: float, chunk: int | None = None) -> None:
        super().__init__(inner, share, chunk or 0)
        self.chunk, self.unit = chunk, max(inner.unit, chunk or 1)

    def __repr__(self) -> str:
        return f"ChannelOutliers({self.inner!r}, share={self.share}, chunk={self.chunk})"

    def encode(self, x: Tensor, const: Const) -> Block:
        chunks = x.unflatten(1, (-1, self.chunk or x.shape[1])).transpose(2, 3)  # [h, chunks, D, tokens]
        place = ends(chunks.float(), shared_out(self.share, chunks.shape[3])).sort(-1).values
        value = chunks.gather(3, place)
        mean = chunks.float().mean(-1, keepdim=True).to(x.dtype)
        rest = chunks.scatter(3, place, mean.expand_as(value)).transpose(2, 3).flatten(1, 2)
        kind = place_type(chunks.shape[3])
        own = {"outlier": value.transpose(2, 3).contiguous(), "place": place.transpose(2, 3).to(kind)}
        return {**self.inner.encode(rest, const), **own}

    def decode(self, block: Block, const: Const) -> Tensor:
        y = self.inner.decode(self.within(block), const).float()
        chunks = torch.nn.functional.pad(y.unflatten(1, (-1, self.chunk or y.shape[1])), (0, 0, 0, 1))
        chunks.scatter_(2, block["place"].long(), block["outlier"].float())  # those of other pieces fall behind the end
        return chunks[:, :, :-1].flatten(1, 2)

    def cut(self, block: Block, start: int, stop: int) -> Block:
        found = super().cut(block, start, stop)
        if self.chunk is None and (start, stop) != (0, self.slots(block)):
            place = block["place"].int() - start
            self._ascending(found, torch.where((place >= 0) & (place < stop - start), place, stop - start))
        return found

    def take(self, block: Block, slots: Tensor) -> Block:
        found = super().take(block, slots)
        if self.chunk is None:
            left, heads = slots.shape[1], slots.shape[0]
            moved = torch.full((heads, self.slots(block) + 1), left, device=slots.device)
            moved.scatter_(1, slots, torch.arange(left, device=slots.device).expand(heads, -1))
            place = block["place"]
            self._ascending(found, moved.gather(1, place.long().flatten(1)).view_as(place))
        return found

    def _ascending(self, found: Block, place: Tensor) -> None:
        """Places in order, so that those of a stretch of tokens lie together; what is gone comes last."""
        order = place.sort(stable=True, dim=2)
        found["place"] = order.values.to(found["place"].dtype)
        found["outlier"] = found["outlier"].gather(2, order.indices)

    def tile(self, block: Block, const: Const) -> Tile | None:
        tile = self.inner.tile(self.within(block), const)
        return None if tile is None else tile.slots(block["place"], block["outlier"], self.chunk)

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        size = self.chunk or n
        each = 2 * shared_out(self.share, size) * (itemsize + place_type(size).itemsize)
        return self.inner.nbytes(n, heads, dim, itemsize) + (n // size * heads * dim * each if n else 0)


class TokenOutliers(_Outliers):
    """Inside each token: the largest and the smallest of all its numbers, over all heads (`scope` "layer") or head by head.

    `up`: half a number too many rather than too few at each end. The median stands in for what is taken out then, else the
    mean.

    outlier, place [1 or h, n, k]; a place counts channels, head after head.
    """

    def __init__(self, inner: Codec, share: float, scope: Literal["layer", "head"] = "layer", up: bool = False) -> None:
        super().__init__(inner, share, 1)
        self.scope, self.up = scope, up

    def __repr__(self) -> str:
        return f"TokenOutliers({self.inner!r}, share={self.share}, scope={self.scope!r})"

    def _wide(self, x: Tensor) -> Tensor:
        """[h, n, D] -> [1, n, h * D], or as it is."""
        return x.transpose(0, 1).flatten(1)[None] if self.scope == "layer" else x

    def _narrow(self, x: Tensor, heads: int) -> Tensor:
        return x[0].unflatten(1, (heads, -1)).transpose(0, 1) if self.scope == "layer" else x

    def encode(self, x: Tensor, const: Const) -> Block:
        wide = self._wide(x)
        place = self.choose(x, wide, const)
        value = wide.gather(2, place)
        rest = wide.scatter(2, place, self.fill(wide).expand_as(value))
        own = {"outlier": value, "place": place.to(place_type(wide.shape[2]))}
        return {**self.inner.encode(self._narrow(rest, len(x)), const), **own}

    def choose(self, x: Tensor, wide: Tensor, const: Const) -> Tensor:
        """Places of the outliers of each token."""
        return ends(wide.float(), self.each(wide.shape[2]))

    def each(self, count: int) -> int:
        """How many of `count` numbers are taken out at each end."""
        return min(ceil(self.share / 2 * count - 1e-9), count // 2) if self.up else shared_out(self.share, count)

    def fill(self, wide: Tensor) -> Tensor:
        """What stands in for outliers when the others are encoded, [1 or h, n, 1]."""
        middle = wide.median(-1, keepdim=True).values if self.up else wide.float().mean(-1, keepdim=True)
        return middle.to(wide.dtype)

    def decode(self, block: Block, const: Const) -> Tensor:
        y = self.inner.decode(self.within(block), const).float()
        wide = self._wide(y).contiguous().scatter_(2, block["place"].long(), block["outlier"].float())
        return self._narrow(wide, len(y))

    def tile(self, block: Block, const: Const) -> Tile | None:
        tile = self.inner.tile(self.within(block), const)
        return None if tile is None else tile.places(block["place"], block["outlier"], self.scope == "layer")

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        rows, count = (1, heads * dim) if self.scope == "layer" else (heads, dim)
        each = 2 * self.each(count) * (itemsize + place_type(count).itemsize)
        return self.inner.nbytes(n, heads, dim, itemsize) + n * rows * each


class RangeOutliers(TokenOutliers):
    """As many numbers of each token, those furthest outside the range that their channel has in `Levels`' profile."""

    def choose(self, x: Tensor, wide: Tensor, const: Const) -> Tensor:
        mid, half = (const[name].float().to(x.device)[:, None] for name in ("mid", "half"))
        far = self._wide(((x.float() - mid) / half).abs())
        return far.topk(2 * self.each(wide.shape[2]), -1).indices
