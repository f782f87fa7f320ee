"""Bad input is refused before any work, by a ValueError that names the argument, the value and a remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers

from kvloom import KVCache, parse, recipes
from kvloom.errors import KvloomError
from tests.families import build, prompt, subject
from tests.modes import Result, batch, difference, generate

NAMES = ("full", "streamingllm", "h2o", "snapkv", "razorattention", "kivi", "mikv")

# What a remedy sounds like.
REMEDY = re.compile(
    r"\b(use|pass|choose|give|must|need|needs|set|try|available|did you mean|between|at least|at most|one of|"
    r"raise|lower|keep|make|create|build|write|remove|detach|new|from .* to|for example|instead)\b",
    re.IGNORECASE,
)

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
}

# Recipe -> what the message must name, and what it must propose.
SPELLING: dict[str, tuple[tuple[str, ...], str]] = {
    "snapvk(budget=10)": (("snapvk", *NAMES), "snapkv"),
    "kivvi": (("kivvi", *NAMES), "kivi"),
    "SnapKV(budget=10)": (("SnapKV",), "snapkv"),
    "streaming_llm(window=10)": (("streaming_llm", *NAMES), "streamingllm"),
    "snapkv(buget=10)": (("buget", "snapkv", "budget", "window"), "budget"),
    "kivi(bit=4)": (("bit", "kivi", "bits", "group", "residual"), "bits"),
    "streamingllm(sink=4)": (("sink", "streamingllm", "sinks", "window"), "sinks"),
    "snapkv(budget=10) | kivi(bitz=4)": (("bitz", "kivi", "bits"), "bits"),
}

SYNTAX = (
    "",
    "   ",
    "|",
    "snapkv(",
    "snapkv)",
    "snapkv(budget=)",
    "snapkv(budget=10",
    "snapkv(budget=10) |",
    "| kivi(bits=4)",
    "snapkv(budget=10) kivi(bits=4)",
    "snapkv(budget=10) || kivi(bits=4)",
    "snapkv(budget=10, budget=20)",
    "snapkv(budget=__import__('os').getpid())",
    "snapkv.budget",
    "snapkv(budget=10)(window=8)",
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


def check(message: str, *named: str) -> None:
    for word in named:
        assert word in message, f"the message does not name {word!r}: {message}"
    assert REMEDY.search(message), f"the message names no remedy: {message}"
    assert "Traceback" not in message and len(message) < 700


def refusal(act: Callable[[], Any], *named: str) -> str:
    """Do `act`, which must be refused; check and return the message."""
    with pytest.raises(ValueError) as caught:
        act()
    assert isinstance(caught.value, KvloomError), f"{type(caught.value).__name__}: {caught.value}"
    check(str(caught.value), *named)
    return str(caught.value)


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


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder(kind: str) -> None:
    model: Any
    if kind == "t5":
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        )
    else:
        size = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        model = transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=64, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, **size
            )
        )
    for recipe in ("full", "kivi(bits=4, group=8)"):
        message = refusal(partial(KVCache, model, recipe), type(model).__name__)
        assert "encoder" in message


@pytest.mark.parametrize("thing", [None, "llama", torch.nn.Linear(2, 2)], ids=["None", "str", "Linear"])
def test_not_a_model(thing: Any) -> None:
    with pytest.raises((KvloomError, TypeError)) as caught:
        KVCache(thing, "full")
    check(str(caught.value), "model", type(thing).__name__)


@pytest.mark.parametrize("used_with", ["llama", "phi3"])
@pytest.mark.parametrize("made_for", ["llama", "qwen3", "gemma3"])
def test_cache_of_another_model(made_for: str, used_with: str) -> None:
    cache = KVCache(subject(made_for), "full")
    other = build(used_with)
    KVCache(other, "full")  # attached too: the mistake is using the wrong cache
    message = refusal(lambda: generate(other, cache, prompt(20)))
    assert "model" in message


def test_cache_of_a_model_of_another_size() -> None:
    cache = KVCache(build("llama"), "full")
    other = build("llama", num_hidden_layers=2)
    refusal(lambda: generate(other, cache, prompt(20)))


@pytest.mark.parametrize("recipe", ["full", "snapkv(budget=24, window=8)", "kivi(group=8, residual=16)"])
def test_cache_with_another_batch_size(recipe: str) -> None:
    model = subject("llama")
    cache = KVCache(model, recipe)
    generate(model, cache, batch(2))
    more = torch.cat([prompt(80, seed=seed) for seed in range(3)])
    message = refusal(lambda: generate(model, cache, more), "2", "3")
    assert re.search(r"batch|rows", message)
    # the refused call left the cache as it was
    assert cache.get_seq_length() == 63


def test_cache_given_a_shorter_text_than_it_holds() -> None:
    """Reusing a cache for a new, shorter text must not go unnoticed (transformers may refuse it first)."""
    model = subject("llama")
    cache = KVCache(model, "full")
    generate(model, cache, prompt(40))
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        generate(model, cache, prompt(12, seed=4))


def test_crop() -> None:
    """transformers wants the number of tokens to remove, negative; removing all empties the cache."""
    model, results = build("llama"), []
    cache = KVCache(model, "full")
    generate(model, cache, prompt(40))
    refusal(lambda: cache.crop(5), "5")
    assert cache.get_seq_length() == 49
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    for each in (cache, KVCache(model, "full")):
        results.append(Result())
        results[-1].add(generate(model, each, prompt(30)))
    assert difference(*results) == 0


def test_a_refused_cache_spoils_nothing() -> None:
    """After refusals the model gives the same as before them."""
    model, results = build("llama"), []
    for _ in range(2):
        result = Result()
        result.add(generate(model, KVCache(model, "full"), batch()))
        results.append(result)
        for recipe in ("kivi(bits=0)", "nothing", "kivi(bits=4, group=24, residual=24)"):
            refusal(partial(KVCache, model, recipe))
    assert difference(*results) == 0
