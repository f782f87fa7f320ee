"""Next to the slots that a scorer finds important, a few that stand for the others (KVCrush)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvloom.core.group import Table
from kvloom.core.recipe import Scorer
from kvloom.core.step import Step

__all__ = ["ANCHORS", "Anchor", "Crushed"]

Anchor = Literal["mean", "alternating", "zeros", "ones", "random"]
ANCHORS: tuple[Anchor, ...] = ("mean", "alternating", "zeros", "ones", "random")


@dataclass(frozen=True)
class Crushed:
    """Raises the scores of `share` of the budget's slots: representatives of what the scorer `inner` would drop.

    A slot's bits say which KV heads have it in the better half of those that may leave; a block's bits are those of its
    `block` tokens. Tokens that every head holds and none finds important are sorted by the Hamming distance of their bits to
    an anchor, and taken at even ranks: the same in all heads. `newest` slots never leave (arXiv 2503.00022).
    """

    inner: Scorer
    share: float
    newest: int
    anchor: Anchor = "mean"
    block: int = 1

    @property
    def queries(self) -> int:
        return self.inner.queries

    @property
    def columns(self) -> int:
        return int(getattr(self.inner, "columns", 0))

    def __call__(self, step: Step, table: Table) -> Tensor:
        scores, budget = self.inner(step, table), step.budget
        wanted = 0 if budget is None else int(self.share * budget) // self.block * self.block
        if budget is None or table.n <= budget or not wanted:
            return scores
        index = table.index.expand(step.heads, -1)
        area = index < step.length - self.newest
        ranked = scores.masked_fill(~area, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        free = int(area[0].sum())
        important = self._first(ranked, max(0, budget - (table.n - free) - wanted))
        places, slot = index.unique(return_inverse=True)  # tokens, in text order, and which of them each slot is

        def by_token(x: Tensor) -> Tensor:
            return torch.zeros(step.heads, len(places), dtype=torch.bool, device=x.device).scatter_(1, slot, x)

        common = by_token(area).all(0) & ~by_token(important).any(0)
        chosen = self._spread(by_token(self._first(ranked, -(-free // 2))), common, wanted)
        raised = important | chosen[slot]
        return torch.where(raised, scores + (scores.amax() - scores.amin() + 1.0), scores)

    @staticmethod
    def _first(ranked: Tensor, count: int) -> Tensor:
        """bool [h, n]: the first slots of each head's ranking."""
        return torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, ranked[:, :count], True)

    def _spread(self, bits: Tensor, common: Tensor, wanted: int) -> Tensor:
        """Bits [h, t] of tokens, and which may be taken -> bool [t]: those taken, in whole blocks."""
        p, t = self.block, bits.shape[1] // self.block * self.block
        words = bits[:, :t].unflatten(1, (-1, p)).transpose(1, 2).flatten(0, 1)  # [h * p, blocks]
        at = common[:t].unflatten(0, (-1, p)).all(-1).nonzero()[:, 0]
        taken = torch.zeros_like(common)
        if len(at) == 0:
            return taken
        distance = (words[:, at] != self._anchor(words[:, at])[:, None]).sum(0)
        order = at[distance.argsort(stable=True)]
        count = min(wanted // p, len(order))
        best = order[torch.arange(count, device=order.device) * (len(order) // count)]
        taken[(best[:, None] * p + torch.arange(p, device=best.device)).flatten()] = True
        return taken

    def _anchor(self, words: Tensor) -> Tensor:
        n, device = len(words), words.device
        if self.anchor == "mean":
            return words.float().mean(1) > 0.5
        if self.anchor == "alternating":
            return torch.arange(n, device=device) % 2 == 1
        if self.anchor == "random":
            return torch.rand(n, generator=torch.Generator().manual_seed(0)).to(device) > 0.5
        return torch.full((n,), self.anchor == "ones", device=device)
