"""What becomes of a slot that absorbs others: a weighted sum of itself and them, in one scatter-add."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvloom.core.rows import Rows

__all__ = ["Blend", "chosen", "pooled"]


def pooled(x: Tensor, into: Tensor, bins: int) -> Tensor:
    """Sums x [h, r, ...] by bin: [h, bins, ...] fp32. `into` [h, r]: the bin of each, -1: none."""
    h, r = into.shape
    at = (into.masked_fill(into < 0, bins) + torch.arange(h, device=x.device)[:, None] * (bins + 1)).flatten()
    sums = x.new_zeros((h * (bins + 1), *x.shape[2:]), dtype=torch.float32).index_add_(0, at, x.float().flatten(0, 1))
    return sums.view(h, bins + 1, *x.shape[2:])[:, :bins]


def chosen(x: Tensor, into: Tensor) -> Tensor:
    """Of x [h, bins, ...] the one that each slot goes into, [h, r, ...] fp32; the first one where there is none."""
    return x[torch.arange(len(into), device=x.device)[:, None], into.clamp_min(0)].float()


@dataclass(frozen=True)
class Blend:
    """Keys and values of a slot and of those that it absorbs, summed with the same weights.

    `weight`: "mean": all alike. "cosine": what is absorbed counts with its key's cosine to the slot's, and the sum is divided by
    the number of slots, so it shrinks (D2O's code, arXiv 2406.13035; LOOK-M's weighted merge, arXiv 2406.18139). "softmax": by
    the exponentials of those cosines. "pivot": the mean of the slot and of the midpoints between it and what it absorbs
    (LOOK-M's pivotal merge). "gauss": exp(-d^2 / 2 sigma^2) of the distance d of the keys (KVMerger, arXiv 2407.08454). "mass":
    by the attention that was received, the column `mass` (EMS, arXiv 2412.08521).

    `count`: how a slot stands for the tokens that are merged in it, and weighs that much when it is merged again: by a
    log-weight on its logit ("logits"), by its value times their number ("values"), or not at all (None). `norm`: keys keep the
    length that they had. `add`: columns that add up.
    """

    weight: Literal["mean", "cosine", "softmax", "pivot", "gauss", "mass"] = "mean"
    count: Literal["logits", "values"] | None = None
    norm: bool = False
    sigma: float = 5.0
    add: tuple[str, ...] = ()

    @property
    def columns(self) -> int:
        return int(self.count is not None)

    def __call__(self, kept: Rows, gone: Rows, into: Tensor) -> Rows:
        bins = kept.n
        mine, its = self._weights(kept, gone, into)
        name = "logw" if self.count == "logits" else "logn"
        before, more = kept.column(name).exp(), gone.column(name).exp()
        if self.count:
            mine, its = mine * before, its * more
        total = mine + pooled(its, into, bins)
        if self.weight == "cosine":
            total = 1 + pooled(torch.ones_like(its), into, bins)
        touched = pooled(torch.ones_like(its), into, bins)[..., None] > 0

        def blend(x: Tensor, others: Tensor) -> Tensor:
            return (x.float() * mine[..., None] + pooled(others.float() * its[..., None], into, bins)) / total[
                ..., None
            ]

        scaled, tokens = self.count == "values", before + pooled(more, into, bins)
        k = blend(kept.k, gone.k)
        if scaled:
            v = blend(kept.v / before[..., None], gone.v / more[..., None]) * tokens[..., None]
        else:
            v = blend(kept.v, gone.v)
        if self.norm:
            k = F.normalize(k, dim=-1) * kept.k.float().norm(dim=-1, keepdim=True)
        # what absorbs nothing stays as it is, to the bit
        k, v = (torch.where(touched, x.to(old.dtype), old) for x, old in ((k, kept.k), (v, kept.v)))
        cols = {column: kept.column(column) + pooled(gone.column(column), into, bins) for column in self.add}
        if self.count:
            cols[name] = tokens.log()
        return replace(kept, k=k, v=v, cols=cols)

    def _weights(self, kept: Rows, gone: Rows, into: Tensor) -> tuple[Tensor, Tensor]:
        """How much a slot itself weighs [h, bins], and each that it absorbs [h, r]; fp32."""
        one = kept.k.new_ones(kept.k.shape[:2], dtype=torch.float32)
        ones = kept.k.new_ones(into.shape, dtype=torch.float32)
        if self.weight == "mean":
            return one, ones
        if self.weight == "pivot":
            return 1 + pooled(ones, into, kept.n) / 2, ones / 2
        if self.weight == "mass":
            floor = torch.finfo(torch.float32).tiny
            return kept.column("mass").clamp_min(floor), gone.column("mass").clamp_min(floor)
        near, own = gone.k.float(), chosen(kept.k, into)
        if self.weight == "gauss":
            return one, (-(near - own).square().sum(-1) / (2 * self.sigma**2)).exp()
        alike = F.cosine_similarity(near, own, dim=-1)
        return one, alike if self.weight == "cosine" else (alike - 1).exp()
