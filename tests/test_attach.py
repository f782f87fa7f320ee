"""Attaching a kvloom cache changes nothing for a model's other uses, and can be undone."""

from __future__ import annotations

import copy
import gc
import json
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvloom import KVCache, detach
from kvloom.errors import KvloomError
from tests.families import build, pristine, prompt
from tests.modes import LENGTHS, Result, batch, difference, generate, make_cache

pytestmark = pytest.mark.exactness

# The default of gemma2 and gpt-oss is eager, that of the others sdpa; falcon has its own attention.
ATTACHED = ("llama", "mistral-sliding", "gemma2", "gemma3", "gpt_neox", "gpt-oss", "falcon-gqa")
CHANGEABLE = ATTACHED[:-1]  # falcon's implementation can't be changed once it is loaded
RECIPES = ("full", "snapkv(budget=24, window=8) | kivi(bits=4, group=8, residual=16)")
TOLERANCE = 3e-4


def implementation(model: PreTrainedModel) -> str:
    name: str = model.config._attn_implementation
    return name


def attached(family: str, recipe: str = RECIPES[1], **overrides: Any) -> PreTrainedModel:
    """A new model that has just generated with a kvloom cache."""
    model = build(family, **overrides)
    generate(model, KVCache(model, recipe), prompt(LENGTHS[0]))
    return model


def gradients(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of a training step; leaves the model in evaluation mode and without gradients."""
    model.train()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.eval()
    return found


@pytest.fixture(params=ATTACHED)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    """A model that kvloom never touched and one with the same weights that it did."""
    yield pristine(request.param), attached(request.param)


Pair = tuple[PreTrainedModel, PreTrainedModel]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-4, atol=1e-5))


def test_without_a_cache(pair: Pair) -> None:
    plain, ours = pair
    inputs = batch()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert close(ours(prompt(40)).logits, plain(prompt(40)).logits)
        want, got = (model(**inputs, use_cache=False).logits[real] for model in (plain, ours))
    assert close(got, want)


def test_with_a_stock_cache(pair: Pair) -> None:
    results = []
    for model in pair:
        result = Result()
        result.add(generate(model, make_cache(model, None), batch()))
        result.add(generate(model, make_cache(model, None), prompt(LENGTHS[1])))
        result.tokens.append(model.generate(prompt(30), do_sample=False, max_new_tokens=8))
        results.append(result)
    assert difference(results[1], results[0]) < 1e-4


def test_gradients(pair: Pair) -> None:
    want, got = (gradients(model, batch()) for model in pair)
    assert got.keys() == want.keys() and got
    for name in want:
        scale = float(want[name].abs().max())
        assert torch.allclose(got[name], want[name], rtol=1e-3, atol=1e-5 * max(scale, 1)), name


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", CHANGEABLE)
def test_output_attentions(family: str, when: str) -> None:
    """Attention weights come out of an eager model, whether made eager before or after attaching."""
    eager: dict[str, Any] = {"attn_implementation": "eager"}
    plain = build(family, **eager)
    ours = build(family, **(eager if when == "before" else {}))
    generate(ours, KVCache(ours, "full"), prompt(20))
    if when == "after":
        ours.set_attn_implementation("eager")
    with torch.no_grad():
        want, got = (model(prompt(40), output_attentions=True) for model in (plain, ours))
    assert close(got.logits, want.logits)
    assert len(got.attentions) == len(want.attentions) == plain.config.num_hidden_layers
    for a, b in zip(got.attentions, want.attentions, strict=True):
        assert a is not None and close(a, b)


@pytest.mark.parametrize("recipe", RECIPES, ids=["full", "snapkv-kivi"])
@pytest.mark.parametrize("original", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_detach(family: str, original: str, recipe: str) -> None:
    model = build(family, attn_implementation=original)
    for _ in range(2):  # attaching again after a detach works
        caches = [KVCache(model, recipe), KVCache(model, "full")]
        for cache in caches:
            generate(model, cache, prompt(LENGTHS[0]))
        detach(model)
        assert implementation(model) == original
        detach(model)  # nothing left to undo
        assert implementation(model) == original
    plain = build(family, attn_implementation=original)
    with torch.no_grad():
        assert torch.equal(model(prompt(40)).logits, plain(prompt(40)).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon-gqa"])
@pytest.mark.parametrize("change", ["detach", "sdpa", "eager"])
def test_a_cache_whose_registration_was_undone(family: str, change: str) -> None:
    """It goes on exactly, or it says what is wrong; it never attends wrongly."""
    plain, ours = pristine(family), build(family)
    cache = KVCache(ours, "full")
    if change == "detach":
        detach(ours)
    else:
        ours.set_attn_implementation(change)
    want, got = Result(), Result()
    want.add(generate(plain, make_cache(plain, None), batch()))
    try:
        got.add(generate(ours, cache, batch()))
    except KvloomError as error:
        assert "KVCache" in str(error)
    else:
        assert difference(got, want) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma3", "llama-dynamic", "llama-longrope"])
def test_a_recipe_that_measures_the_model(family: str) -> None:
    """RazorAttention runs the model to find its retrieval heads: a text longer than any that it saw."""
    ours, plain = build(family), build(family)
    ours.train()
    KVCache(ours, "razorattention(window=12)")
    assert ours.training and all(p.grad is None for p in ours.parameters())
    ours.eval()
    detach(ours)
    for length in (20, 40):
        with torch.no_grad():
            assert torch.equal(ours(prompt(length)).logits, plain(prompt(length)).logits)
    assert {name for name, _ in ours.named_buffers()} == {name for name, _ in plain.named_buffers()}


def test_models_are_independent() -> None:
    one, other, plain = build("llama"), build("qwen3"), pristine("qwen3")
    KVCache(one, "full")
    cache = KVCache(other, "full")
    detach(one)
    got, want = Result(), Result()
    got.add(generate(other, cache, batch()))
    want.add(generate(plain, make_cache(plain, None), batch()))
    assert difference(got, want) < TOLERANCE
    assert implementation(one) == implementation(plain) == "sdpa"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_two_threads(family: str) -> None:
    """Two caches with different recipes at work on one model at the same time do not see each other."""
    model = build(family)
    texts: list[Any] = [batch(), prompt(LENGTHS[0], seed=3)]

    def work(which: int) -> Result:
        result = Result()
        for _ in range(3):
            result.add(generate(model, KVCache(model, RECIPES[which]), texts[which]))
        return result

    want = [work(0), work(1)]
    detach(model)  # both threads attach
    got: list[Result | BaseException | None] = [None, None]

    def target(which: int) -> None:
        try:
            got[which] = work(which)
        except BaseException as error:
            got[which] = error

    threads = [threading.Thread(target=target, args=(which,)) for which in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    for mine, alone in zip(got, want, strict=True):
        if isinstance(mine, BaseException):
            raise mine
        assert mine is not None, "the thread hangs"
        assert difference(mine, alone) == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_saving(family: str, tmp_path: Path) -> None:
    plain, ours = pristine(family), attached(family)
    ours.save_pretrained(tmp_path)
    assert "kvloom" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert implementation(again) in ("sdpa", "eager")
    again.set_attn_implementation(implementation(plain))
    with torch.no_grad():
        assert close(again(prompt(40)).logits, plain(prompt(40)).logits)
    # the attached model goes on working
    got, want = Result(), Result()
    got.add(generate(ours, KVCache(ours, "full"), batch()))
    want.add(generate(plain, make_cache(plain, None), batch()))
    assert difference(got, want) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_copy_of_an_attached_model(family: str) -> None:
    plain, ours = pristine(family), copy.deepcopy(attached(family))
    for recipe in (None, "full"):
        got, want = Result(), Result()
        got.add(generate(ours, make_cache(ours, recipe), batch()))
        want.add(generate(plain, make_cache(plain, None), batch()))
        assert difference(got, want) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_interrupted_generation(family: str) -> None:
    """What stops in the middle of a layer leaves nothing behind that a later run could see."""
    plain, ours = pristine(family), build(family)

    def stop(module: torch.nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    for layer in range(ours.config.num_hidden_layers):
        hook = ours.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            generate(ours, KVCache(ours, RECIPES[1]), batch())
        hook.remove()
    for recipe in (None, "full"):
        got, want = Result(), Result()
        got.add(generate(ours, make_cache(ours, recipe), batch()))
        want.add(generate(plain, make_cache(plain, None), batch()))
        assert difference(got, want) < TOLERANCE


def test_no_reference_is_kept() -> None:
    """Neither a model nor a cache is kept alive by the registration."""
    model = build("llama")
    cache = KVCache(model, RECIPES[1])
    generate(model, cache, prompt(LENGTHS[0]))
    watched = [weakref.ref(cache), weakref.ref(model)]
    del cache
    gc.collect()
    assert watched[0]() is None, "the cache outlives its last user"
    del model
    gc.collect()
    assert watched[1]() is None, "the model outlives its last user"
