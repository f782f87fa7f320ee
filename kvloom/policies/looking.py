"""Looks at what every layer computes on a text, and changes nothing: how recipes get to know a model beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.cache import KVCache
from kvloom.core.group import Table
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.step import Step
from kvloom.policies.budgets import Tokens
from kvloom.policies.placements import Keep

__all__ = ["look"]


@dataclass
class _Look:
    see: Callable[[Step], Any]
    queries: int = -1
    columns: int = 0
    found: dict[int, Any] = field(default_factory=dict)

    def __call__(self, step: Step, table: Table) -> Tensor:
        self.found[step.site.layer] = self.see(step)
        return step.lse.new_zeros((step.heads, table.n))


class _All(Keep):
    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Tensor:
        return torch.full((step.heads, table.n), step.classes.index("main"))


@torch.no_grad()
def look(
    model: PreTrainedModel, ids: Tensor, see: Callable[[Step], Any], logits: bool = False
) -> tuple[dict[int, Any], Tensor | None]:
    """`see(step)` of every managed layer, by layer, after one forward of ids [1, T]; with `logits` also those, [T, V]."""
    looking = _Look(see)
    cache = KVCache(model, Recipe("a look", {"prompt": Policy(Tokens(1), _All(), looking)}))
    training = model.training
    model.eval()
    try:
        run = model if logits else model.base_model
        out = run(ids.to(model.device), past_key_values=cache, use_cache=True)
    finally:
        model.train(training)
    return looking.found, out.logits[0] if logits else None
