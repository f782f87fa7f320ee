"""RazorAttention: retrieval heads keep everything; the others keep both ends and one slot that stands for the rest."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core import profile as profiles
from kvloom.core.card import Card
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.registry import recipe
from kvloom.core.segment import Kind
from kvloom.core.step import Step
from kvloom.core.view import kv_heads_of, text_config
from kvloom.errors import ProfileError, RecipeError
from kvloom.policies.budgets import Tokens
from kvloom.policies.placements import Keep
from kvloom.policies.retrieval_heads import measure
from kvloom.policies.roles import Heads, Local, of_group

CARD = Card(
    name="razorattention",
    title="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
    year=2024,
    arxiv="2407.15891",
    code="",
    idea="Few heads look at the whole context and keep all of it; the others keep sinks, recent tokens and one compensation "
    "slot: the mean of everything dropped, weighted by its number.",
    claims="Over 70 % less cache without noticeable loss; training-free.",
    differs="A reconstruction from the paper's formulas: there is no official code, and the shares of heads and the sizes of "
    "the local heads are not confirmed. ALiBi models are not searched by slope.",
    open="While decoding, tokens that leave the window are folded into the compensation slot, 16 at a time. A KV head's score "
    "is the largest of its query heads.",
    measured="`kvloom demo`, bundled model, 3,899 tokens, razorattention(window=508): cache 3.0x smaller, 4 of 4 "
    "answers right, KL to the full cache 0.018 nats per token, same top token 92%. Prefill of 8,192 "
    "tokens 0.91x stock.",
    bytes="retrieval heads: T * (D_k + D_v) * itemsize; others: (sinks + max(window, T / share) + 1) of the same and 4 to 8 "
    "per slot",
)
EVERY = 16
_measured: WeakKeyDictionary[PreTrainedModel, dict[str, Tensor]] = WeakKeyDictionary()


@recipe(CARD)
def razorattention(
    echo: float = 0.01,
    induction: float = 0.14,
    sinks: int = 4,
    window: int = 4000,
    share: int = 5,
    budget: int | float | None = None,
    profile: str | None = None,
) -> Recipe:
    """Keeps all tokens in retrieval heads, both ends and a mean in the others.

    Args:
        echo: share of KV heads that are retrieval heads for their echo score.
        induction: share for their induction score; 1.0 makes all heads retrieval heads.
        sinks: first tokens that local heads keep.
        window: newest tokens that local heads keep, at least.
        share: local heads keep one in so many of the prompt's tokens, if that is more than `window`.
        budget: slots of a local head in all, instead of `window` and `share`: tokens, or a ratio of the prompt.
        profile: file made by `kvloom calibrate`; None: the model is measured when the cache is made.
    """
    for name, value in (("echo", echo), ("induction", induction)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise RecipeError(f"{name}={value!r} must be a share of the heads, 0.0 to 1.0.")
    for name, value, least in (("sinks", sinks, 0), ("window", window, 1), ("share", share, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RecipeError(f"{name}={value!r} must be a whole number, at least {least}.")
    if isinstance(budget, str):
        raise RecipeError(
            f"budget={budget!r}: retrieval heads keep every token, so bytes grow with the text. Give tokens or a ratio."
        )
    if budget is not None:
        Tokens(budget, least=sinks + 2)  # refuses one that is too small

    def prepare(model: PreTrainedModel) -> Recipe:
        return split(_retrieval_heads(_scores(model, profile), echo, induction, model))

    def sketch(config: Any) -> Recipe:
        """As if no head had both scores: the most retrieval heads that there can be, spread over the layers."""
        layers = config.num_hidden_layers
        flags = torch.zeros(layers * kv_heads_of(config), dtype=torch.bool)
        most = min(len(flags), ceil(echo * len(flags)) + ceil(induction * len(flags)))
        flags[torch.linspace(0, len(flags) - 1, most).long()] = True
        return split(tuple(tuple(row) for row in flags.unflatten(0, (layers, -1)).tolist()))

    def split(heads: Heads) -> Recipe:
        place = Local(sinks=sinks, to="mean", whole=heads)
        size = _LocalSize(
            budget or 1.0, sinks=sinks, window=window, share=share, retrieval=heads, given=budget is not None
        )
        policy = {"prompt": Policy(size, place), "decode": Policy(size, place, every=EVERY)}
        return Recipe("razorattention", policy, kinds)

    kinds = {"main": Kind(), "mean": Kind(fold=True)}
    outline = Policy(Tokens(1.0), Keep(to="mean"))  # what composition needs to know before there is a model

    def profiled(model: PreTrainedModel, ids: Tensor, path: Path, tell: Callable[[str], None]) -> dict[str, Tensor]:
        tell("random tokens that repeat")  # in place of a text
        return calibrate(model, path)

    policy = {"prompt": outline, "decode": outline}
    return Recipe("razorattention", policy, kinds, prepare=prepare, sketch=sketch, calibrate=profiled)


def calibrate(model: PreTrainedModel, path: str | Path, tokens: int = 2500, seed: int = 0) -> dict[str, Tensor]:
    """Measures every head of a model and writes the profile that `razorattention(profile=path)` reads."""
    scores = measure(model, tokens, seed)
    profiles.save(path, model, "razorattention", scores, tokens=tokens, seed=seed)
    return scores


def _scores(model: PreTrainedModel, profile: str | None) -> dict[str, Tensor]:
    if profile is not None:
        config = text_config(model)
        shape = (config.num_hidden_layers, config.num_attention_heads)
        scores = profiles.load(profile, model, "razorattention", {"echo": shape, "induction": shape})
        for name, x in scores.items():
            if not bool((x.isfinite() & (x >= 0)).all()):
                raise ProfileError(f"profile={profile!r}: {name} must be finite numbers from 0 on. Make it again.")
        return scores
    if model not in _measured:
        _measured[model] = measure(model)
    return _measured[model]


def _retrieval_heads(scores: dict[str, Tensor], echo: float, induction: float, model: PreTrainedModel) -> Heads:
    """The best share of KV heads over all layers by each score; both sets together."""
    config = text_config(model)
    kv_heads = kv_heads_of(config)
    chosen = torch.zeros(config.num_hidden_layers * kv_heads, dtype=torch.bool)
    for name, part in (("echo", echo), ("induction", induction)):
        best = scores[name].unflatten(1, (kv_heads, -1)).amax(-1).flatten()
        chosen[best.topk(ceil(part * len(best))).indices] = True
    return tuple(tuple(row) for row in chosen.unflatten(0, (-1, kv_heads)).tolist())


@dataclass(frozen=True)
class _LocalSize(Tokens):
    """Slots of a local head without the compensation slot; None where all heads of the group are retrieval heads."""

    sinks: int = 0
    window: int = 1
    share: int = 1
    retrieval: Heads = ()
    given: bool = False

    def __call__(self, step: Step) -> int | None:
        if bool(of_group(self.retrieval, step.site.layer, step.group).all()):
            return None
        if self.given:
            total = super().__call__(step)
            return None if total is None else total - 1
        return self.sinks + max(self.window, step.prompt // self.share)
