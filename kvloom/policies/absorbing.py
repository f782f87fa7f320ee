"""Placements that name, for slots that leave, the slot that absorbs them. For classes that are exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvloom.core.codec import gather
from kvloom.core.group import Table
from kvloom.core.recipe import DROP, Away
from kvloom.core.step import Step
from kvloom.policies.placements import Keep

__all__ = ["Clusters", "Nearest", "Redundant", "Runs", "nearest"]

TILE = 1 << 20  # similarities at a time
FEW = 16  # slots that leave at a time while decoding


def nearest(x: Tensor, y: Tensor, v: Tensor | None = None, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each of x [h, r, D] the most similar of y [h, n, D]: its cosine [h, r], and which it is.

    With v [h, r, Dv] and w [h, n, Dv], similarity is the product of both cosines, of which neither counts below zero.
    In tiles, so nothing of size r x n exists.
    """
    x, y = F.normalize(x.float(), dim=-1), F.normalize(y.float(), dim=-1).mT
    if v is not None and w is not None:
        v, w = F.normalize(v.float(), dim=-1), F.normalize(w.float(), dim=-1).mT
    h, r, _ = x.shape
    each, found = max(1, TILE // max(1, h * y.shape[-1])), []
    for start in range(0, r, each):
        alike = x[:, start : start + each] @ y
        if v is not None and w is not None:
            alike = alike.clamp_(min=0).mul_((v[:, start : start + each] @ w).clamp_(min=0))
        found.append(alike.max(-1))
    return torch.cat([best.values for best in found], 1), torch.cat([best.indices for best in found], 1)


def _stored(table: Table) -> tuple[Tensor, Tensor]:
    """Keys and values of a table of one exact class."""
    _, segment = table.parts[0]
    return segment.key.dense(0, table.n), segment.value.dense(0, table.n)


def _which(mask: Tensor) -> Tensor:
    """Positions of the True entries of [h, n], equally many in each row: [h, r], ascending."""
    return mask.nonzero()[:, 1].view(len(mask), -1)


@dataclass(frozen=True)
class Nearest(Keep):
    """As Keep; what leaves goes into the slot that stays with the most similar key.

    `keep`: of a moving threshold on that cosine, how much of the old value stays (the rest is the mean of what leaves now);
    where the mean over heads is below it, slots are dropped (D2O, arXiv 2406.13035). None: all are merged.
    """

    keep: float | None = None

    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Away:
        scores, over = self._scored(step, table.index, scores, budget), table.n - budget
        scores = scores.expand(step.heads, -1)
        slots = (
            scores.argmin(-1, keepdim=True) if over == 1 else scores.topk(over, -1, largest=False).indices.sort().values
        )
        leaves = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, slots, True)
        k, _ = _stored(table)
        if over <= FEW:  # while decoding: where the keys lie, without a copy of them
            found = (F.normalize(gather(k, slots).float(), dim=-1) @ k.mT.float()) / k.norm(dim=-1)[:, None]
            alike, into = found.masked_fill_(leaves[:, None], -torch.inf).max(-1)
        else:
            stay = _which(~leaves)
            alike, at = nearest(gather(k, slots), gather(k, stay))
            into = stay.gather(1, at)
        if self.keep is not None:
            mean = alike.mean().expand(step.heads)
            held = step.group.state.get("threshold")
            limit = mean if held is None else self.keep * held + (1 - self.keep) * mean
            step.group.state["threshold"] = limit.clone()
            # of every head the oldest that leaves, then the next: slots need not lie in text order
            order = gather(table.index.expand(step.heads, -1), slots).argsort(-1)
            low = (alike.gather(1, order).mean(0) < limit[0]).expand_as(order)
            into = into.masked_fill(torch.zeros_like(low).scatter(1, order, low), -1)
        return Away(slots, DROP, into)


@dataclass(frozen=True)
class Redundant(Keep):
    """As Keep; of what leaves, the best-scored `share` of the budget goes into the slot that stays which is most like it.

    Alike are two slots by the product of the cosines of their keys and values; below `threshold` a slot goes into none
    (the zero class of EMS, arXiv 2412.08521).
    """

    share: float = 1.0
    threshold: float = 0.1

    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Away:
        scores = self._scored(step, table.index, scores, budget)
        over, (k, v) = table.n - budget, _stored(table)
        ranked = scores.topk(over, -1, largest=False).indices
        some = min(over, max(1, int(self.share * budget)))
        late = ranked[:, over - some :]  # the best of those that leave
        stay = _which(torch.ones_like(scores, dtype=torch.bool).scatter_(1, ranked, False))
        alike, at = nearest(gather(k, late), gather(k, stay), gather(v, late), gather(v, stay))
        found = stay.gather(1, at).masked_fill((alike < self.threshold) | (alike <= 0), -1)
        slots, order = ranked.sort(-1)
        return Away(slots, DROP, F.pad(found, (over - some, 0), value=-1).gather(1, order))


@dataclass(frozen=True)
class Runs(Keep):
    """Neighbours in the text with similar keys become one slot, at the place of the one with the highest score.

    The `newest` and the `best` of the others (shares of the budget) are left alone and end a run (KVMerger,
    arXiv 2407.08454). Of all pairs of neighbours the most similar are joined, as many as the budget wants.
    """

    best: float = 0.24

    def pairs(self, step: Step, table: Table, scores: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """Slots in text order [h, n], and the cosine of each one's key to the next one's, -inf where they can't be joined."""
        budget = step.budget or budget  # shares are of what a head may keep on average
        order = table.index.argsort(-1).expand(step.heads, -1)
        fixed = torch.zeros_like(scores, dtype=torch.bool)
        free = table.n - int(self.newest * budget)
        fixed[:, free:] = True
        top = scores.gather(1, order)[:, :free].topk(min(free, int(self.best * budget)), -1).indices
        fixed.scatter_(1, top, True)
        k = F.normalize(gather(_stored(table)[0], order).float(), dim=-1)
        alike = (k[:, 1:] * k[:, :-1]).sum(-1)
        return order, alike.masked_fill(fixed[:, 1:] | fixed[:, :-1], -torch.inf)

    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Away:
        assert scores is not None
        order, alike = self.pairs(step, table, scores, budget)
        joined = alike.topk(table.n - budget, -1).indices
        starts = torch.ones_like(order).scatter_(1, joined + 1, 0)
        run = starts.cumsum(-1) - 1
        score = scores.gather(1, order)
        high = torch.full_like(score[:, :budget], -torch.inf).scatter_reduce_(1, run, score, "amax")
        places = torch.arange(table.n, device=score.device).expand_as(run)
        first = torch.where(score == high.gather(1, run), places, table.n)
        pivot = torch.full_like(run[:, :budget], table.n).scatter_reduce_(1, run, first, "amin").gather(1, run)
        leaves = _which(pivot != places)
        slots, back = order.gather(1, leaves).sort(-1)
        return Away(slots, DROP, order.gather(1, pivot.gather(1, leaves)).gather(1, back))


@dataclass(frozen=True)
class Clusters(Keep):
    """Slots between `sinks` and `newest` are cut into chunks in text order; in each, every second one is matched with the
    most similar of the others, and the most similar pairs of all chunks are joined, round by round (Chelsea, arXiv 2506.11418).

    Keys of a cluster are their mean by tokens; a slot that stays stands for its cluster.
    """

    chunk: int = 64

    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Away:
        assert isinstance(self.newest, int)
        order = table.index.argsort(-1).expand(step.heads, -1)[:, self.sinks : table.n - self.newest]
        k = gather(_stored(table)[0], order).float()
        tokens = gather(table.column("logw", step.heads), order).exp()
        slot = label = torch.arange(order.shape[1], device=k.device).expand_as(order)
        over = table.n - budget
        while over > 0:
            pairs, into = self._pairs(k, over)
            r = pairs.shape[1]
            if r == 0:
                break
            over -= r
            stays = torch.ones_like(slot, dtype=torch.bool).scatter_(1, pairs, False)
            left = _which(stays)
            where = stays.cumsum(-1) - 1
            where = where.scatter(1, pairs, where.gather(1, into))  # of each slot, its cluster among those left
            label = where.gather(1, label)
            total = torch.zeros_like(tokens[:, : left.shape[1]]).scatter_add_(1, where, tokens)
            at = where[..., None].expand_as(k)
            k = torch.zeros_like(k[:, : left.shape[1]]).scatter_add_(1, at, k * tokens[..., None]) / total[..., None]
            tokens, slot = total, slot.gather(1, left)
        into = slot.gather(1, label)
        gone = _which(into != torch.arange(into.shape[1], device=k.device))
        slots, back = order.gather(1, gone).sort(-1)
        return Away(slots, DROP, order.gather(1, into.gather(1, gone)).gather(1, back))

    def _pairs(self, k: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Slots that are joined to another [h, r], and that one; r at most `most`, and at most half of the slots."""
        h, n, d = k.shape
        size = min(self.chunk, n + n % 2)
        chunks = -(-n // size)
        x = F.pad(F.normalize(k, dim=-1), (0, 0, 0, chunks * size - n)).view(h, chunks, size // 2, 2, d)
        place = torch.arange(chunks * size, device=k.device).view(chunks, size // 2, 2)
        alike = x[..., 0, :] @ x[..., 1, :].mT
        alike.masked_fill_((place[..., 1] >= n)[:, None, :], -torch.inf)
        alike.masked_fill_((place[..., 0] >= n)[:, :, None], -torch.inf)
        best = alike.max(-1)
        joined = best.values.flatten(1)
        last = n % size  # a chunk of one slot has no pair
        able = n // size * (size // 2) + ((last + 1) // 2 if last > 1 else 0)
        top = joined.topk(min(most, able), -1).indices
        other = best.indices.flatten(1).gather(1, top)
        chunk = top // (size // 2)
        return top * 2, chunk * size + 2 * other + 1
