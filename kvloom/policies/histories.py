"""How important each slot is, from attention that adds up row by row: counts and noisy weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvloom.core.group import Table
from kvloom.core.step import Step

__all__ = ["Noisy", "Unimportant"]

EVEN = 1e-6  # what rounding takes from an average weight
POOL = 1 << 20  # random numbers drawn for one forward of a layer


@dataclass(frozen=True)
class Unimportant:
    """Minus the number of the last `window` rows that gave a slot less than their average weight (arXiv 2305.17118).

    A row that sees n slots gives 1 / n on average, and is an average over a KV head's queries. Rows count from the last
    compression on, each slot's from its own; of equals the older slot scores lower. For a budget of bursts: only the rows
    count that are the last ones when the budget is full.
    """

    window: int
    queries = -1
    columns = 1

    def __call__(self, step: Step, table: Table) -> Tensor:
        n, m, budget = table.n, step.length - step.first, step.budget
        if budget is None:
            return torch.zeros(step.heads, n, device=table.device)
        full = n > budget
        late = min(m, self.window if full else n - budget - 1 + self.window)
        if late > 0:
            low = torch.zeros(step.heads, n, device=table.device)
            shift = (
                step.length - n - 1
            )  # a row sees the slots that were there, its own included: its place less so many
            if m == 1:
                for place, p in step.rows(table):
                    low += (p.mean(1) < 1 / (place - shift)[:, None]).sum(1)
            else:
                # weights as shares of the average; what a row does not see is no rare choice of it
                sees = torch.arange(step.first, step.length, device=table.device).sub_(shift).clamp_min_(1)
                rows, share = torch.arange(m - late, m, device=table.device), sees / step.q.shape[1]
                scaled = replace(step, lse=step.lse - share.log())
                for _, start, p in scaled.blocks(table, rows, ahead=torch.inf):
                    rare = p.sum(1) < 1 - EVEN
                    low[:, start : start + p.shape[-1]] += rare.view(torch.uint8).sum(1, dtype=torch.int32)
            if m < self.window:
                low += table.column("low", step.heads)
            table.store("low", torch.zeros_like(low) if full else low)
            return table.index / (step.length + 1) - low
        return torch.zeros(step.heads, n, device=table.device)


@dataclass(frozen=True)
class Noisy:
    """The sum of softmax((x + z) / t) over all rows that a slot has seen, x a row's logits, z Gumbel noise (arXiv 2403.09054).

    Summed over a KV head's queries. t rises from `start` to `end` over `tokens` decoded tokens. The noise is a function of
    `seed`, layer and place in the text alone; `noise` scales it. Within one forward it comes from a pool of draws.
    """

    start: float
    end: float
    tokens: int
    noise: float
    seed: int
    queries = -1
    columns = 1

    def __call__(self, step: Step, table: Table) -> Tensor:
        mark = ((self.seed * 1009 + step.site.layer) * 1_000_003 + step.length) % 2**32
        draw = torch.Generator(table.device).manual_seed(mark)
        done = step.length - step.prompt if step.phase == "decode" else 0
        t = self.start + (self.end - self.start) * min(1.0, done / self.tokens)
        total = torch.zeros(step.heads, table.n, device=table.device)
        pool = None
        for _, p in step.rows(table):
            if self.noise:
                if pool is None or pool.numel() < 2 * p.numel():
                    pool = self._factors(p.numel() if step.seen else max(POOL, 2 * p.numel()), t, draw, table)
                last = pool.numel() - p.numel()
                at = int(torch.randint(last + 1, (), generator=draw, device=table.device)) if last else 0
            p = p if t == 1 else p ** (1 / t)  # e ** (x / t), but for a factor of the row
            p = p * pool[at : at + p.numel()].view(p.shape) if pool is not None else p
            p = p.flatten(1, 2)
            total[:, : p.shape[-1]] += (p.sum(-1).reciprocal()[:, None] @ p)[:, 0]
        return table.add("mass", total)

    def _factors(self, count: int, t: float, draw: torch.Generator, table: Table) -> Tensor:
        """e ** (z / t)."""
        u = torch.rand(count, generator=draw, device=table.device).clamp_(1e-7, 1 - 1e-7)
        return u.log_().neg_() ** (-self.noise / t)
