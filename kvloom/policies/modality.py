"""Which tokens are text and which belong to images or frames, and what policies make of it.

`cache.tokens(kinds)` tells it: 0 for text, i for the i-th image or frame. What is not told is text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvloom.core.codec import Scope
from kvloom.core.group import Table
from kvloom.core.step import Step
from kvloom.policies.scorers import BLOCK, Window

__all__ = ["Protect", "Relevance", "Screens", "relevance"]


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


@dataclass(frozen=True)
class Screens(Window):
    """`Window`, with more for tokens of the last image whose inputs are long, and nothing for what it explains of earlier ones.

    GUI-KV (arXiv 2510.00536). `alpha` is shared out among the tokens of the last image that came with this forward, by softmax of their
    inputs' norms, standardized, over `temperature`. The keys of its first `rank` tokens span what it explains. The newest
    `queries`, or what a budget leaves of them, are infinite, and their images count as text. Without images it is `Window`.
    """

    alpha: float = 2.0
    temperature: float = 3.5
    rank: int = 32
    hidden = True

    def __call__(self, step: Step, table: Table) -> Tensor:
        assert step.budget is not None
        recent = max(1, min(self.queries, step.budget - 2))
        score = replace(self, queries=recent).pooled(step, table).mean(1)
        index, end = table.index.long(), step.length - recent
        kinds = step.told("kinds", torch.arange(end, device=index.device))
        last = int(kinds.max()) if kinds is not None and end > 0 else 0
        if kinds is not None and last:
            before = index.clamp_max(end - 1)
            score = score + self._salient(step, kinds == last)[before]
            images = kinds[before].masked_fill(index >= end, 0).expand(step.heads, -1)
            share = 1 - step.budget / table.n
            score = score.masked_fill(self._explained(table, images, last, share), 0.0)
        return score.masked_fill(index >= end, torch.inf)

    def _salient(self, step: Step, image: Tensor) -> Tensor:
        """What each token of an image, bool [T], gets for the norm of its input, [T]."""
        bonus, at = torch.zeros(len(image), device=image.device), image.nonzero()[:, 0]
        at = at[at >= step.first]
        if step.hidden is not None and len(at):
            norm = torch.linalg.vector_norm(step.hidden[at - step.first], dim=-1, dtype=torch.float32)
            spread = norm.std() if len(at) > 1 else 1.0
            bonus[at] = self.alpha * ((norm - norm.mean()) / (spread + 1e-8) / self.temperature).softmax(0)
        return bonus

    def _explained(self, table: Table, images: Tensor, last: int, share: float) -> Tensor:
        """The share of each head's slots of earlier images that the last image explains best; images [h, n], as told. bool [h, n]."""
        keys, own, earlier = table.parts[0][1].key, images == last, (images > 0) & (images < last)
        rank = min(self.rank, int(own.sum(-1).max()))
        if not rank or not bool(earlier.any()):
            return torch.zeros_like(own)
        far = table.index.expand_as(own).masked_fill(~own, torch.iinfo(torch.int32).max)
        first = far.argsort(-1)[:, :rank]  # in the order of the text; Q's first columns span the first tokens
        real = own.gather(1, first)[:, None]
        x = keys.rows(first).float().mT * real  # [h, D, rank]; heads that hold fewer of them have empty columns behind
        basis = torch.linalg.qr(x[..., : x.shape[1]]).Q * real[..., : x.shape[1]]
        left = []
        for start in range(0, table.n, BLOCK):
            k = keys.dense(start, min(start + BLOCK, table.n)).float()
            left.append((k - k @ basis @ basis.mT).norm(dim=-1))
        ranked = torch.cat(left, -1).masked_fill(~earlier, torch.inf).argsort(-1).argsort(-1)
        return ranked < (share * earlier.sum(-1, keepdim=True).double()).long()
