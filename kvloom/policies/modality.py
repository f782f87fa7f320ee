"""Which tokens are text and which belong to images or frames, and what policies make of it.

`cache.tokens(kinds)` tells it: 0 for text, i for the i-th image or frame. What is not told is text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.codec import Scope
from kvloom.core.group import Table
from kvloom.core.step import Step

__all__ = ["Protect", "Relevance", "relevance"]


def relevance(embeddings: Tensor, kinds: Tensor) -> Tensor:
    """How much each image token is like the text, [.., T]: the mean of its dot products with the embeddings of all text tokens.

    embeddings [.., T, hidden]: what the decoder reads, images projected; kinds [.., T]. Text tokens get 0 (arXiv 2503.16257).
    """
    text = (kinds == 0)[..., None]
    mean = (embeddings.float() * text).sum(-2, keepdim=True) / text.sum(-2, keepdim=True).clamp_min(1)
    return ((embeddings.float() * mean).sum(-1)).masked_fill(kinds == 0, 0.0)


@dataclass(frozen=True)
class Relevance:
    """What `cache.tokens(kinds, relevance)` says of image tokens that came with this forward; all others -inf.

    Without a relevance, all image tokens are alike, and the newest count most.
    """

    queries = 0
    columns = 0

    def __call__(self, step: Step, table: Table) -> Tensor:
        index = table.index
        found = step.told("relevance", index)
        score = index.float() if found is None else found
        kinds = step.told("kinds", index)
        image = torch.zeros_like(index, dtype=torch.bool) if kinds is None else kinds > 0
        return score.masked_fill(~image | (index < step.first), -torch.inf).expand(step.heads, -1)


@dataclass(frozen=True)
class Protect:
    """The best-scored `share` of the slots that have a score go to a class, in multiples of `unit`, one at least; others stay."""

    share: float
    to: str
    unit: int
    scope: Scope = "layer"
    least: int = 0

    @property
    def moves(self) -> tuple[str, ...]:
        return (self.to,)

    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Tensor:
        assert scores is not None
        n = int((scores[0] > -torch.inf).sum())
        count = min(max(int(self.share * n + 1e-9), self.unit), n) // self.unit * self.unit
        route = torch.full_like(scores, step.classes.index(table.parts[0][0]), dtype=torch.long)
        best = scores.topk(count, -1).indices
        return route.scatter_(1, best, step.classes.index(self.to))
