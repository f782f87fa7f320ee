"""PyramidKV: SnapKV's choice, with more slots in lower layers and fewer in higher ones."""

from typing import Literal

from kvloom.core.card import Card
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.errors import RecipeError
from kvloom.policies.budgets import Pyramid
from kvloom.policies.phases import phases
from kvloom.policies.placements import Keep
from kvloom.policies.scorers import Window

CARD = Card(
    name="pyramidkv",
    title="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    year=2024,
    arxiv="2406.02069",
    code="Zefan-Cai/KVCache-Factory",
    idea="Attention is spread widely in low layers and gathers on few tokens in high ones, so slots are given out in an "
    "arithmetic sequence over the layers; which ones stay is decided as in SnapKV.",
    claims="Matches the full cache on LongBench with 12 % of it; with 0.7 % up to 20.5 points better than others (TREC).",
    differs="GQA: scores are averaged over the query heads of a KV head. While decoding the paper never evicts; here the same "
    "rule runs again after every `interval` tokens over budget; interval=None is the paper.",
    open="Steps between layers are whole slots, rounded down, as in the official code. Layers that stay with the model (sliding "
    "windows) take no part in the sequence. Prompts in chunks: each settles when it ends, by the length so far.",
    measured="The document of `kvloom demo`, bundled model, 3,899 tokens, pyramidkv(budget=512): cache 7.1x smaller, 0 of 4 "
    "answers right, KL to the full cache 0.773 nats per token, same top token 52%. Prefill of 8,192 tokens 1.04x stock.",
    bytes="budget * ((D_k + D_v) * itemsize + 4) per KV head on average over the layers, and window queries per query head",
)


@recipe(CARD)
def pyramidkv(
    budget: int | float | str = 1024,
    window: int = 32,
    kernel: int = 7,
    pool: Literal["max", "avg"] = "max",
    beta: int = 20,
    interval: int | None = 128,
) -> Recipe:
    """Keeps what the newest queries attend to, more in lower layers.

    Args:
        budget: slots kept on average over the layers, the window included: tokens, a ratio of the prompt, or bytes ("64MiB").
        window: newest tokens whose attention scores the others; always kept.
        kernel: neighbours that scores are pooled over; odd.
        pool: "max" or "avg".
        beta: the last layer keeps one beta-th of the mean, besides the window; 1: all layers alike.
        interval: while decoding, settle again when this many slots are over budget; None: never.
    """
    score = Window(window, kernel, pool)
    if not isinstance(beta, int) or beta < 1:
        raise RecipeError(f"beta={beta!r} must be a whole number, at least 1.")
    size = Pyramid(budget, least=window, window=window, beta=beta)
    return Recipe("pyramidkv", phases(size, Keep(newest=window), score, interval))
