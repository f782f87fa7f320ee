"""D2O: layers that look widely keep more, and what leaves is merged into what it resembles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.card import Card
from kvloom.core.group import Table
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.registry import recipe
from kvloom.core.site import Site
from kvloom.core.step import Step
from kvloom.errors import RecipeError
from kvloom.policies.absorbing import Nearest
from kvloom.policies.budgets import Tokens
from kvloom.policies.mergers import Blend
from kvloom.policies.placements import Keep
from kvloom.policies.scorers import Accumulated

CARD = Card(
    name="d2o",
    title="D2O: Dynamic Discriminative Operations for Efficient Generative Inference of Large Language Models",
    year=2024,
    arxiv="2406.13035",
    code="AIoT-MLSys-Lab/D2O",
    idea="Layers whose attention is spread evenly get more slots. As in H2O heavy hitters and the newest tokens stay; what leaves is "
    "merged into the kept slot with the most similar key if it is similar enough, by a threshold that follows the text.",
    claims="More than 3x less memory and higher throughput at the quality of long texts.",
    differs="GQA: KV heads are kept un-repeated, attention is summed over the query heads of a KV head, and similarity is per KV head. "
    "State is per sequence. As in the official code the weights of merged slots are not normalized, so merged vectors are shorter; "
    "weight='softmax' is the normalized form, closer to the paper's text.",
    open="The prompt stays whole until the first decoded token has seen it; the cache then shrinks at every step. Layers 0, 1 and the last "
    "stay whole, so their bytes grow with the text, and a budget in bytes is refused. Later turns and chunks of a prompt stay whole "
    "until the next single token; a ratio is one of all prompt tokens so far, and the variance of chunks is averaged by their length.",
    measured="Bundled model (six layers, three of them whole), two pieces of 1,920 tokens of the bundled book and 80 more read one by "
    "one, budget=0.1: KL to the full cache 0.0051 nats per token, same top token 94%, 43 % smaller; weight='softmax' 0.0050; without "
    "merging (weight='none') 0.0011 and 97%. budget=0.03: 0.017, 0.016 and 0.008. Merging does not pay here: the nearest kept key of "
    "what leaves has a cosine of 0.68 on average, what leaves was hardly looked at, and mixing it in moves the keys and values of "
    "heavy hitters. Counting merged tokens by a log-weight helps little (0.0042)."
    " Prefill of 8,192 tokens 1.5x that of the full cache (H2O 1.4x): a second pass sums the attention of all queries.",
    bytes="layers 0, 1 and the last: T * ((D_k + D_v) * itemsize + 8) per KV head; others: budget of the same on average; and 4 numbers "
    "per head",
)


class _Spread(Accumulated):
    """As H2O, and how unevenly a prompt's attention falls on its slots: `variance` [h, g], by query head."""

    def __call__(self, step: Step, table: Table) -> Tensor:
        mass = step.mass(table)
        if step.phase == "prompt":
            new, rows, state = mass.var(-1, correction=0), step.q.shape[2], step.group.state
            held = state.get("variance", new)
            state["variance"] = held + (new - held) * (rows / step.prompt)
        return table.add("mass", mass.sum(1))


class _Layers:
    """Shares of layers: a softmax over them of minus the mean of their heads' variances, each from 0 to 1 within its layer."""

    early = False

    def __call__(self, steps: list[list[Step]], budget: int, layers: int) -> list[int]:
        means = []
        for each in steps:
            x = torch.cat([step.group.state["variance"].flatten() for step in each])
            means.append(((x - x.min()) / (x.max() - x.min()).clamp_min(torch.finfo(x.dtype).tiny)).mean())
        for each, share in zip(steps, (-torch.stack(means)).softmax(0) * layers, strict=True):
            for step in each:
                step.group.state["share"] = share.expand(step.heads).clone()
        return [each[0].length for each in steps]  # prompts stay whole


@dataclass(frozen=True)
class _Always(Tokens):
    """Every prompt is scored, whatever the budget."""

    def __call__(self, step: Step) -> int | None:
        return 0


@dataclass(frozen=True)
class _Share(Tokens):
    """The layer's share of the budget, settled at the first decoded token behind a prompt; None for the layers that stay whole."""

    window: float = 0.5
    order: tuple[int, ...] = ()  # the layers that the recipe manages

    def bind(self, recipe: Recipe, sites: list[Site]) -> _Share:
        return type(self)(self.size, window=self.window, order=tuple(site.layer for site in sites))

    def __call__(self, step: Step) -> int | None:
        at, share = self.order.index(step.site.layer), step.group.state.get("share")
        if at < 2 or at == len(self.order) - 1 or share is None or self.size == 1.0:
            return None
        n = step.prompt + 1
        rho = float(share[0]) * (self.size if isinstance(self.size, float) else int(self.size) / n)
        ratio = max(
            0.01, min(1.0, rho) if isinstance(self.size, float) else rho
        )  # tokens may be more than the prompt's
        return max(1, int(n * ratio * (1 - self.window) + 1e-6) + int(n * ratio * self.window + 1e-6))


@recipe(CARD)
def d2o(
    budget: int | float | str = 0.2,
    window: float = 0.5,
    sinks: int = 4,
    decay: float = 0.5,
    weight: str = "cosine",
    interval: int = 1,
) -> Recipe:
    """Keeps heavy hitters and the newest tokens, more in layers that look widely, and merges what is similar into them.

    Args:
        budget: slots kept on average over the layers that are not kept whole: tokens, or a ratio of the prompt.
        window: newest tokens among them, as a share.
        sinks: first tokens that always stay.
        decay: how much of the threshold on similarity stays at each step; the rest is the mean of what leaves.
        weight: "cosine", as the official code; "softmax": weights that sum to one; "none": nothing is merged.
        interval: while decoding, settle when this many slots are over budget.
    """
    if isinstance(budget, str):
        raise RecipeError(
            f"budget={budget!r}: three layers keep every token, so bytes grow with the text. Give tokens or a ratio."
        )
    for name, value in (("window", window), ("decay", decay)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise RecipeError(f"{name}={value!r} must be a share, 0.0 to 1.0.")
    for name, count, least in (("sinks", sinks, 0), ("interval", interval, 1)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise RecipeError(f"{name}={count!r} must be a whole number, at least {least}.")
    if weight not in ("cosine", "softmax", "none"):
        raise RecipeError(f"weight={weight!r} must be 'cosine', 'softmax' or 'none'.")
    score, size = _Spread(), _Share(budget, least=sinks + 1, window=float(window))
    prompt = Policy(_Always(1), Keep(), score, spread=_Layers())
    place = (
        Nearest(newest=float(window), sinks=sinks, keep=float(decay))
        if weight != "none"
        else Keep(float(window), sinks)
    )
    merge = Blend("softmax" if weight == "softmax" else "cosine") if weight != "none" else None
    return Recipe("d2o", {"prompt": prompt, "decode": Policy(size, place, score, every=interval, merge=merge)})
