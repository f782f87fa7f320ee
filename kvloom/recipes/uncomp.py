"""UNComp: heads whose queries vary more keep twice as much as the others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core import profile as profiles
from kvloom.core.card import Card
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.core.view import kv_heads_of, text_config
from kvloom.errors import RecipeError
from kvloom.policies.budgets import Tokens
from kvloom.policies.entropy import votes
from kvloom.policies.phases import phases
from kvloom.policies.placements import Keep
from kvloom.policies.roles import Heads, Uneven
from kvloom.policies.scorers import Window

CARD = Card(
    name="uncomp",
    title="UNComp: Can Matrix Entropy Uncover Sparsity? A Compressor Design from an Uncertainty-Aware Perspective",
    year=2024,
    arxiv="2410.03090",
    code="menik1126/UNComp",
    idea="The entropy of a head's queries, as a matrix, says how much it deals with. Beforehand each layer's heads are halved by "
    "it; the half of higher entropy gets twice the slots of the other. Which slots stay is decided as in SnapKV, at every step.",
    claims="4.74 % of the cache, prefill 6 % faster, 6.4 times the throughput.",
    differs="The budget is the true mean over heads; the authors' C gives 0.75 C and 1.5 C, so 1.125 C on average. KV heads are halved, by the "
    "mean entropy of their queries; the authors store a set for each query head. While decoding, rows of the window are "
    "taken over what is stored now, not as they were. Hidden states are not pruned in stages during prefill: kvloom changes no "
    "hidden states. One of an odd number of heads is low.",
    open="Prompts in chunks, later turns: each settles when it ends, with its own last tokens as the window.",
    measured="The document of `kvloom demo`, bundled model, 3,899 tokens, uncomp(budget=512): cache 7.4x smaller, 0 of 4 answers right, KL to the full cache 0.688 nats per token, same top token 56%; snapkv(budget=512) beside it: 7.1x, 0 of 4, 0.275, 62%: with two KV heads, halves are one head each, and the window of 8 sees little. A decoded token "
    "took 3.5 times as long as SnapKV's, since the window is scored at every step (interval=1). Profile from the bundled book: half a minute. Prefill of 8,192 tokens 1.06x the full cache.",
    bytes="budget * ((D_k + D_v) * itemsize + 4) per KV head on average over a layer, 8 per KV head, and window queries per "
    "query head",
)


@recipe(CARD)
def uncomp(
    budget: int | float | str = 576,
    high: float = 4 / 3,
    window: int = 8,
    kernel: int = 7,
    pool: Literal["max", "avg"] = "max",
    interval: int | None = 1,
    profile: str | None = None,
) -> Recipe:
    """Keeps what the newest queries attend to, more in heads of high entropy.

    Args:
        budget: slots kept on average over a layer's heads, the window included: tokens, a ratio of the prompt, or bytes ("64MiB").
        high: what heads of high entropy keep, as a multiple of the budget; 1.0: all heads alike.
        window: newest tokens whose attention scores the others; always kept.
        kernel: neighbours that scores are pooled over; odd.
        pool: "max" or "avg".
        interval: while decoding, settle again when heads are this many slots over budget on average; None: never.
        profile: file made by `kvloom calibrate`; None: the model's own folder, or the user's cache.
    """
    if isinstance(high, bool) or not isinstance(high, int | float) or not 1 <= high < 2:
        raise RecipeError(f"high={high!r} must be a multiple of the budget, from 1.0 to below 2.0.")

    def built(flagged: Heads) -> Recipe:
        size = Tokens(budget, least=int(window / (2 - high)) + 1, uneven=True)
        score = Window(window, kernel, pool)
        return Recipe("uncomp", phases(size, Keep(newest=window), score, interval, Uneven(flagged, high)))

    def prepare(model: PreTrainedModel) -> Recipe:
        config = text_config(model)
        shape = (config.num_hidden_layers, kv_heads_of(config))
        found = profiles.find(profile, model, "uncomp", {"votes": shape, "entropy": shape})
        rank = found["votes"] + found["entropy"] / 100  # of equal votes the higher entropy
        flags = torch.zeros(shape, dtype=torch.bool).scatter_(1, rank.topk(shape[1] // 2, -1).indices, True)
        return built(tuple(map(tuple, flags.tolist())))

    def sketch(config: Any) -> Recipe:
        n = kv_heads_of(config)
        return built((tuple(i < n // 2 for i in range(n)),) * config.num_hidden_layers)

    def calibrate(model: PreTrainedModel, ids: Tensor, path: Path, tell: Callable[[str], None]) -> dict[str, Tensor]:
        found = votes(model, ids, tell)
        profiles.save(path, model, "uncomp", found, tokens=len(ids))
        return found

    return Recipe("uncomp", built(()).policy, prepare=prepare, sketch=sketch, calibrate=calibrate)
