"""Which heads look far back: scores of every head on random tokens that repeat (RazorAttention, arXiv 2407.15891)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.cache import KVCache
from kvloom.core.group import Table
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.step import Step
from kvloom.errors import ModelError
from kvloom.policies.budgets import Tokens
from kvloom.policies.placements import Keep

__all__ = ["REPEATS", "measure"]

REPEATS = 4


@dataclass
class _Echoes:
    """A scorer that only looks: attention to earlier occurrences of the same token and to what followed them."""

    period: int
    queries: int = -1
    columns: int = 0
    found: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, step: Step, table: Table) -> Tensor:
        keys = torch.cat([run.decode() for run in step.group.segments["main"].key.runs], 1)
        m = step.q.shape[2]
        sums = [step.lse.new_zeros(step.q.shape[:2]) for _ in range(2)]
        for back in range(1, REPEATS):
            for i, ahead in enumerate((0, 1)):  # the same token; the one after it
                lag, key = back * self.period - ahead, 1 + ahead  # token 0 is no part of the repeated text
                s = (step.q[:, :, key + lag :] * keys[:, None, key : m - lag]).float().sum(-1) * step.logits.scale
                sums[i] += (step.logits.cap(s) - step.lse[:, :, key + lag :]).exp().sum(-1)
        count = m - 1 - self.period
        self.found[step.site.layer] = (sums[0].flatten() / count, sums[1].flatten() / count)
        return step.lse.new_zeros((step.heads, table.n))


@torch.no_grad()
def measure(model: PreTrainedModel, tokens: int = 2500, seed: int = 0) -> dict[str, Tensor]:
    """Echo and induction score of every query head of every managed layer: {"echo", "induction"}, [layers, Hq] fp32.

    `tokens` random tokens (fewer if the model's positions end before) are read four times in one forward. Layers that no
    recipe manages score 0.
    """
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or 4 * tokens + 1
    period = min(tokens, (longest - 1) // REPEATS)
    if period < 2:
        raise ModelError(f"the model has only {longest} positions, too few to look for retrieval heads.")
    special = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    banned = {i for x in special for i in (x if isinstance(x, list) else [x]) if i is not None}
    allowed = torch.tensor([i for i in range(config.vocab_size) if i not in banned])
    draw = torch.Generator().manual_seed(seed)
    text = allowed[torch.randint(len(allowed), (period,), generator=draw)]
    bos = getattr(config, "bos_token_id", None)
    first = bos[0] if isinstance(bos, list) else bos
    ids = torch.cat([torch.tensor([int(allowed[0]) if first is None else first]), text.repeat(REPEATS)])
    echoes = _Echoes(period)
    watching = Recipe("retrieval head search", {"prompt": Policy(Tokens(1), _All(), echoes)})
    training = model.training
    model.eval()
    try:
        model.base_model(ids[None].to(model.device), past_key_values=KVCache(model, watching), use_cache=True)
    finally:
        model.train(training)
    shape = (config.num_hidden_layers, config.num_attention_heads)
    scores = {name: torch.zeros(shape) for name in ("echo", "induction")}
    for layer, (echo, induction) in echoes.found.items():
        scores["echo"][layer], scores["induction"][layer] = echo.cpu(), induction.cpu()
    return scores


class _All(Keep):
    """Keeps everything."""

    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Tensor:
        return torch.full((step.heads, table.n), step.classes.index("main"))
