"""WindowKV: whole windows of the text stay, chosen once for a group of layers."""

from typing import Literal

from kvloom.core.card import Card
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.errors import RecipeError, unknown
from kvloom.policies.phases import phases
from kvloom.policies.spans import Negative, Spans, Stairs

CARD = Card(
    name="windowkv",
    title="WindowKV: Task-Adaptive Group-Wise KV Cache Window Selection for Efficient LLM Inference",
    year=2025,
    arxiv="2503.17922",
    code="optim996/WindowKV",
    idea="Neighbouring tokens mean something together, so windows of eight are kept or dropped whole, by what the end of the prompt "
    "looks at: by their best slots where the task is to find, by all of them where it is to sum up. Layers near one another look at "
    "the same, so the first of a group chooses for all; lower groups keep more.",
    claims="Comparable to the full cache on LongBench with 12 % of it; best of those compared at needle in a haystack.",
    differs="The task is an option; the paper trains a classifier of prompts. The budget includes the suffix, which the paper adds on "
    "top. KV heads are kept un-repeated. A last group of fewer layers is allowed; with a single group the budget is even. While decoding "
    "the paper never evicts; here the same rule runs again after every `interval` tokens over budget; interval=None is the paper.",
    open="Prompts in chunks, later turns: each settles when it ends, with its own last tokens as the suffix; windows are then cut "
    "anew from the slots held, in text order.",
    measured="The document of `kvloom demo`, bundled model, 3,899 tokens, windowkv(budget=512): cache 7.1x smaller, 0 of 4 answers right, KL to the full cache 0.393 nats per token, same top token 69%: the first layer chooses for all six. With shared=3 0.603 and 48%: upper layers keep too few. snapkv(budget=512) beside it: 7.1x, 0 of 4, 0.275, 62%.",
    bytes="budget * ((D_k + D_v) * itemsize + 4) per KV head on average over the layers, up to width - 1 slots more, and suffix "
    "queries per query head",
)


@recipe(CARD)
def windowkv(
    budget: int | float | str = 1024,
    task: Literal["find", "sum up"] = "find",
    width: int = 8,
    shared: int = 8,
    beta: int = 14,
    suffix: int | None = None,
    interval: int | None = 128,
) -> Recipe:
    """Keeps whole windows that the newest queries attend to, the same in a group of layers.

    Args:
        budget: slots kept on average over the layers, the suffix included: tokens, a ratio of the prompt, or bytes ("64MiB").
        task: "find": a window counts by its best slots; "sum up": by all.
        width: slots of a window.
        shared: layers that share one choice.
        beta: the last group keeps shared / beta of the mean, besides the suffix.
        suffix: newest tokens whose attention scores the others; always kept. None: 32 to find, 16 to sum up.
        interval: while decoding, settle again when this many slots are over budget; None: never.
    """
    if task not in ("find", "sum up"):
        raise RecipeError("task: " + unknown("value", str(task), ("find", "sum up")))
    queries = (32 if task == "find" else 16) if suffix is None else suffix
    for name, value in (("width", width), ("shared", shared), ("beta", beta), ("suffix", queries)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError(f"{name}={value!r} must be a whole number, at least 1.")
    size = Stairs(
        budget, least=queries, window=queries, beta=beta, shared=shared, held=lambda n: {"main": n + width - 1}
    )
    score = Spans(queries, width, "max" if task == "find" else "average", shared)
    return Recipe("windowkv", phases(size, Negative(newest=queries, scope="layer"), score, interval))
