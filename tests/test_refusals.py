"""Bad input is refused before any work, by a ValueError that names the argument, the value and a remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from kvloom import KVCache, parse, recipes
from kvloom.errors import KvloomError
from tests.families import build
from tests.refusal import check, refusal

NAMES = ("full", "streamingllm", "h2o", "snapkv", "razorattention", "kivi", "mikv")

# Recipe -> what the message must name: the argument and its value.
VALUES: dict[str, tuple[str, ...]] = {
    # bits
    "kivi(bits=0)": ("bits", "0"),
    "kivi(bits=3.5)": ("bits", "3.5"),
    "kivi(bits=-2)": ("bits", "-2"),
    "kivi(bits=17)": ("bits", "17"),
    "kivi(bits='two')": ("bits", "two"),
    "kivi(bits=None)": ("bits", "None"),
    "mikv(bits=0)": ("bits", "0"),
    # ratios and shares
    "razorattention(echo=1.5)": ("echo", "1.5"),
    "razorattention(induction=-0.1)": ("induction", "-0.1"),
    "razorattention(share=0)": ("share", "0"),
    "razorattention(budget='1MiB')": ("budget", "1MiB"),
    "mikv(window=1.5)": ("window", "1.5"),
    "h2o(window=1.5)": ("window", "1.5"),
    "h2o(window=-1)": ("window", "-1"),
    # groups and residuals
    "kivi(group=0)": ("group", "0"),
    "kivi(group=-8)": ("group", "-8"),
    "kivi(group=7.5)": ("group", "7.5"),
    "kivi(residual=-1)": ("residual", "-1"),
    "kivi(group=32, residual=40)": ("residual", "40", "32"),  # not a multiple of the group
    # budgets
    "snapkv(budget=-1)": ("budget", "-1"),
    "snapkv(budget=0)": ("budget", "0"),
    "snapkv(budget=0.0)": ("budget", "0.0"),
    "snapkv(budget=1.5)": ("budget", "1.5"),
    "snapkv(budget=-0.5)": ("budget", "-0.5"),
    "snapkv(budget='12 parsecs')": ("budget", "12 parsecs"),
    "snapkv(budget='0MiB')": ("budget", "0MiB"),
    "snapkv(budget='-4MiB')": ("budget", "-4MiB"),
    "snapkv(budget=None)": ("budget", "None"),
    "snapkv(budget=True)": ("budget", "True"),
    "h2o(budget=0)": ("budget", "0"),
    "h2o(budget=2.0)": ("budget", "2.0"),
    "mikv(budget=-0.1)": ("budget", "-0.1"),
    "mikv(budget=1.1)": ("budget", "1.1"),
    # smaller than what is always kept
    "snapkv(budget=16, window=32)": ("budget", "16", "window", "32"),
    "streamingllm(sinks=-1)": ("sinks", "-1"),
    "streamingllm(window=0)": ("window", "0"),
    "streamingllm(window=-5)": ("window", "-5"),
    "streamingllm(window=2.5)": ("window", "2.5"),
    "snapkv(window=0)": ("window", "0"),
    "snapkv(window=-3)": ("window", "-3"),
    "snapkv(kernel=4)": ("kernel", "4"),
    "snapkv(interval=0)": ("interval", "0"),
    "snapkv(pool='median')": ("pool", "median"),
    "streamingllm(sinks=4, budget=3)": ("budget", "3", "sinks"),
    "h2o(budget=8, window=16)": ("budget", "8", "window", "16"),
}

# Recipe -> what the message must name, and what it must propose.
SPELLING: dict[str, tuple[tuple[str, ...], str]] = {
    "snapvk(budget=100)": (("snapvk", *NAMES), "snapkv"),
    "kivvi": (("kivvi", *NAMES), "kivi"),
    "streaming_llm(window=10)": (("streaming_llm", *NAMES), "streamingllm"),
    "snapkv(buget=100)": (("buget", "snapkv", "budget", "window"), "budget"),
    "kivi(bit=4)": (("bit", "kivi", "bits", "group", "residual"), "bits"),
    "streamingllm(sink=4)": (("sink", "streamingllm", "sinks", "window"), "sinks"),
    "snapkv(budget=1000) | kivi(bitz=4)": (("bitz", "kivi", "bits"), "bits"),
}

SYNTAX = (
    "",
    "   ",
    "|",
    "snapkv(",
    "snapkv)",
    "snapkv(budget=)",
    "snapkv(budget=100",
    "snapkv(budget=100) |",
    "| kivi(bits=4)",
    "snapkv(budget=100) kivi(bits=4)",
    "snapkv(budget=100) || kivi(bits=4)",
    "snapkv(budget=1000, budget=200)",
    "snapkv(budget=__import__('os').getpid())",
    "snapkv.budget",
    "snapkv(budget=100)(window=8)",
    "kivi(**{'bits': 4})",
    "lambda: 1",
    "kivi(bits=4); import os",
)

COMPOSITIONS: dict[str, tuple[str, ...]] = {
    "snapkv(budget=32, window=8) | h2o(budget=32)": ("snapkv", "h2o"),
    "h2o(budget=0.5) | streamingllm(window=32)": ("h2o", "streamingllm"),
    "streamingllm(window=32) | snapkv(budget=32, window=8)": ("streamingllm", "snapkv"),
    "kivi(bits=2) | kivi(bits=4)": ("kivi",),
    "mikv(budget=0.5) | kivi(bits=4)": ("mikv", "kivi"),
    "snapkv(budget=32, window=8) | mikv(budget=0.5)": ("snapkv", "mikv"),
}


def untouched(act: Callable[[Any], Any], family: str = "llama", *named: str) -> str:
    """Like `refusal`, for `act(model)`, which must not have run or changed the model."""
    model = build(family)
    calls: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    before = model.config._attn_implementation
    message = refusal(lambda: act(model), *named)
    assert not calls, "the model ran before the refusal"
    assert model.config._attn_implementation == before, "the refusal left the model attached"
    return message


def test_names() -> None:
    assert set(NAMES) <= set(recipes())


@pytest.mark.parametrize("recipe", VALUES)
def test_values(recipe: str) -> None:
    untouched(lambda model: KVCache(model, recipe), "llama", *VALUES[recipe])


@pytest.mark.parametrize("recipe", SPELLING)
def test_spelling(recipe: str) -> None:
    named, proposal = SPELLING[recipe]
    message = refusal(lambda: parse(recipe), *named)
    assert re.search(rf"did you mean '?{proposal}\b", message, re.IGNORECASE), message


@pytest.mark.parametrize("recipe", SYNTAX)
def test_syntax(recipe: str) -> None:
    refusal(lambda: parse(recipe), *([recipe.strip()] if recipe.strip() else []))


@pytest.mark.parametrize("recipe", COMPOSITIONS)
def test_compositions(recipe: str) -> None:
    refusal(lambda: parse(recipe), *COMPOSITIONS[recipe])
    first, second = recipe.split(" | ")
    refusal(lambda: parse(first) | parse(second), *COMPOSITIONS[recipe])


@pytest.mark.parametrize("value", [None, 3, ["full"], object()], ids=lambda value: type(value).__name__)
def test_recipe_of_another_type(value: Any) -> None:
    with pytest.raises((KvloomError, TypeError)) as caught:
        KVCache(build("llama"), value)
    check(str(caught.value), "recipe")


def test_group_does_not_divide_the_head() -> None:
    # llama's heads have 16 channels here, and values are grouped along them
    recipe = "kivi(bits=4, group=24, residual=24)"
    untouched(lambda model: KVCache(model, recipe), "llama", "group", "24", "16")


def test_budget_in_bytes_too_small_for_the_model() -> None:
    untouched(lambda model: KVCache(model, "snapkv(budget='1KiB', window=32)"), "llama", "budget", "1KiB")
