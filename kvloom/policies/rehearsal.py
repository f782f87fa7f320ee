"""The text read a second time, chunk by chunk, to see which slots the model needs to repeat it (KVzip, arXiv 2505.23416)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.cache import KVCache
from kvloom.core.group import Table
from kvloom.core.layer import Layer
from kvloom.core.recipe import Policy
from kvloom.core.step import Step
from kvloom.errors import CacheError
from kvloom.kernels import reference
from kvloom.policies.budgets import Tokens
from kvloom.policies.placements import Keep

__all__ = ["Rehearse", "policy"]

NOTE = "rehearsal"  # in a sequence's carry: (first, last) place of the chunk that is repeated, then each layer's counts by head
TILE = 1 << 19


@dataclass(frozen=True)
class _Repeated:
    """The largest weight that any row which repeats a slot's chunk, of any query head of its KV head, gives the slot."""

    queries = -1
    columns = 1

    def __call__(self, step: Step, table: Table) -> Tensor:
        note = step.carry.get(NOTE)
        if isinstance(note, tuple):
            segment = step.group.segments["main"]
            # what was not read again yet are the newest slots, in order
            start, stop = (segment.n - step.length + at for at in note)
            keys = segment.key.dense(start, stop).float()
            best = torch.zeros(step.heads, stop - start, device=table.device)
            each = max(1, TILE // (step.lse[..., 0].numel() * max(1, stop - start)))
            for at in range(0, step.q.shape[2], each):
                rows = step.q[:, :, at : at + each].float()
                s = step.logits.cap(rows @ keys[:, None].mT * step.logits.scale)
                s = reference.exp_(s.sub_(step.lse[:, :, at : at + each, None]))
                best = torch.maximum(best, s.amax((1, 2)))
            scores = table.column("score", step.heads).clone()
            scores[:, start:stop] = best
            table.store("score", scores)
        elif "score" not in step.group.segments["main"].cols:
            table.store("score", table.column("score", step.heads))
        return table.column("score", step.heads)


class _Counted:
    """How many slots each head keeps, as was found over all layers; all, before that."""

    def __call__(self, steps: list[Step], tables: list[Table], scores: list[Tensor], budget: int) -> list[Tensor]:
        shares = []
        for step, table, x in zip(steps, tables, scores, strict=True):
            note = step.carry.get(NOTE)
            if isinstance(note, dict):
                shares.append(step.group.pick(note[step.site.layer].to(x.device)))
            else:
                shares.append(torch.full((len(x),), table.n, device=x.device))
        return shares


@dataclass(frozen=True)
class _Always(Tokens):
    """Every probe has a say; `slots` is the budget."""

    def __call__(self, step: Step) -> int | None:
        return 0


def policy(size: int | float | str, sinks: int, recent: int) -> Policy:
    """What probes do: score slots, and at the last one drop the worst of the whole sequence."""
    return Policy(
        _Always(size, sinks + recent + 1, uneven=True), Keep(sinks=sinks, newest=recent), _Repeated(), allot=_Counted()
    )


@dataclass(frozen=True)
class Rehearse:
    """Reads the new text again behind itself, `chunk` tokens at a time, each behind the tokens `ask` and the `cue` before it.

    Then all heads of all layers keep, together, the best-scored slots up to the budget, the first `sinks` and the newest `recent`.
    """

    chunk: int
    cue: int
    sinks: int
    recent: int = 0
    ask: tuple[int, ...] = ()

    def __call__(self, model: PreTrainedModel, cache: KVCache) -> None:
        layers = list(cache.managed())
        rows = [row.layer for row in layers[0].rows]
        size = cache.recipe.policy["probe"].budget
        assert isinstance(size, Tokens)
        allowed = size.slots(rows[0].prompt)
        held = [sum(g.n * g.heads_of(x.site) for x in layers for g in x.rows[b].layer.groups) for b in range(len(rows))]
        heads = sum(layer.site.kv_heads for layer in layers)
        if allowed is None or max(held) <= allowed * heads:
            return
        if len({(row.length, row.read) for row in rows}) > 1 or len({id(row.unread) for row in rows} & {id(None)}):
            raise CacheError(
                f"{cache.recipe.name} reads texts again side by side, so rows of a batch must be equally long. Use one cache for "
                "each length."
            )
        text = torch.cat([row.unread.view for row in rows if row.unread is not None]).long()
        ask = torch.tensor([self.ask], dtype=torch.long, device=text.device).expand(len(rows), -1)
        first = rows[0].read
        for start in range(0, text.shape[1], self.chunk):
            stop = min(start + self.chunk, text.shape[1])
            for b in range(len(rows)):
                cache.carry(b)[NOTE] = (first + start, first + stop)
            cache.probe(model, torch.cat([ask, text[:, max(0, start - self.cue) : stop]], 1))
        for b in range(len(rows)):
            cache.carry(b)[NOTE] = self._counts({x.site.layer: x.rows[b].layer for x in layers}, allowed)
        cache.probe(model, text[:, -1:])  # one token, for the layers to settle by what was found
        for b, row in enumerate(rows):
            cache.carry(b).pop(NOTE)
            row.read, row.unread = row.length, None

    def _counts(self, layers: dict[int, Layer], allowed: int) -> dict[int, Tensor]:
        """Slots that each head of each layer keeps: of all together the best."""
        found, owners, total = [], [], 0
        for layer in layers.values():
            for group in layer.groups:
                segment = group.segments["main"]
                scores = segment.column("score")
                assert scores is not None
                heads = torch.arange(layer.site.kv_heads) if group.heads is None else group.heads.cpu()
                ends = (segment.index < self.sinks) | (segment.index >= layer.length - self.recent)
                found.append(scores.masked_fill(ends, torch.inf).flatten())
                owners.append((total + heads)[:, None].expand(-1, segment.n).flatten())
            total += layer.site.kv_heads
        flat = torch.cat(found)
        best = flat.topk(min(allowed * total, len(flat))).indices.cpu()
        counts = torch.bincount(torch.cat(owners)[best], minlength=total)
        sizes = [layer.site.kv_heads for layer in layers.values()]
        return dict(zip(layers, counts.split(sizes), strict=True))

    def foretell(self, layer: Layer) -> dict[str, Any] | None:
        size = layer.recipe.policy["probe"].budget
        assert isinstance(size, Tokens)
        allowed, n = size.slots(layer.prompt), layer.groups[0].n
        if allowed is None or n <= allowed:
            return None
        h = layer.site.kv_heads
        ends = self.sinks + self.recent
        rest = (allowed - ends) * h
        draw = torch.rand(h) + 0.5  # heads are seldom equal
        counts = (ends + (rest * draw / draw.sum()).long()).clamp_max(n)
        counts[0] += min(n - int(counts[0]), allowed * h - int(counts.sum()))
        layer.read, layer.unread = layer.length, None
        return {NOTE: {layer.site.layer: counts}}
