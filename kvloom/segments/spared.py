"""Tokens that stay exact beside a code because attention leans on them (attention sinks; RotateKV, arXiv 2501.16383)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const
from kvloom.errors import RecipeError
from kvloom.segments.outliers import ChannelOutliers

if TYPE_CHECKING:
    from kvloom.core.step import Step

__all__ = ["Spared"]

ROWS = 64  # newest queries whose attention is looked at


class Spared(ChannelOutliers):
    """The `count` tokens of the first prompt that its newest queries look at most, all heads together, stay exact.

    Of what comes later in one piece the first ones do; single tokens go to `inner` alone. Fields as of `ChannelOutliers`, the same places in every channel: outlier, place
    [h, 1, count, D]. Constants of a sequence: spared [h, count + 1] fp32, the tokens and how many there were.
    """

    def __init__(self, inner: Codec, count: int) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise RecipeError(f"sinks={count!r} must be a whole number of tokens.")
        super().__init__(inner, 0.0)
        self.count, self.fits, self.fits_kept = count, True, True

    def __repr__(self) -> str:
        return f"Spared({self.inner!r}, {self.count})"

    def sized(self, n: int) -> Codec:
        return self if n > 1 else self.inner

    def forms(self) -> tuple[Codec, ...]:
        return self, self.inner

    def fit(self, step: Step, x: Tensor) -> Const:
        keys = step.group.segments["main"].key.dense(0, x.shape[1]).float()
        q = step.q[:, :, -ROWS:].float().flatten(1, 2)
        best = torch.zeros(self.count, device=x.device)
        if keys.shape[2]:
            ahead = torch.arange(step.q.shape[2], device=x.device)[-ROWS:] + (x.shape[1] - step.q.shape[2])
            hidden = torch.arange(x.shape[1], device=x.device) > ahead.repeat(step.q.shape[1])[:, None]
            weights = (q @ keys.transpose(1, 2) * step.logits.scale).masked_fill_(hidden, -torch.inf).softmax(-1)
            found = weights.sum((0, 1)).topk(min(self.count, x.shape[1])).indices.sort().values.float()
            best[: len(found)], best[len(found) :] = found, found[-1]  # fewer tokens than that: one of them again
        told = torch.cat([best, best.new_tensor([x.shape[1]])])
        return {"spared": told.expand(len(x), -1).contiguous(), **self.inner.fit(step, x)}

    def encode(self, x: Tensor, const: Const) -> Block:
        h, n, dim = x.shape
        at = torch.arange(self.count).clamp_max(n - 1)
        if "spared" in const and int(const["spared"][0, -1]) == n:
            at = const["spared"][0, :-1].long()
        place = at.to(x.device, torch.int32)[None, None, :, None].expand(h, 1, -1, dim).contiguous()
        own = {"outlier": x[:, at.to(x.device)][:, None].contiguous(), "place": place}
        return {**self.inner.encode(x, const), **own}

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        own = heads * dim * self.count * (itemsize + 4) if n > 1 else 0
        return self.inner.nbytes(n, heads, dim, itemsize) + own
