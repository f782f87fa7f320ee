"""The state of a cache as tensors and facts, and back: what goes on from it is the same to the last bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvloom
from kvloom import CacheError, KVCache, ModelError
from kvloom.core import blocks, portable
from kvloom.core.portable import Part, State
from tests.families import prompt, subject
from tests.profiles import profiled

RECIPES = (
    "full",
    "kivi(bits=2, group=8, residual=16)",
    "kivi(bits=4, group=16, residual=32)",
    "h2o(budget=24)",
    "snapkv(budget=24, window=4, interval=8)",
    "snapkv(budget=40, window=4) | kivi(bits=4, group=8, residual=16)",
    "mikv(budget=0.3, bits=4, group=8)",
    "razorattention(budget=20, echo=0.2, induction=0.2)",
    "streamingllm(sinks=2, window=20)",
    "gear(bits=4, group=8, residual=16)",
    "zipcache(gap=16)",
    "task_kv(budget=40, sinks=4, recent=10, window=8)",
    "kvtuner(bits=4, group=8, residual=16, trials=12)",
    "duoattention(sinks=2, window=20)",
    "attention_gate(threshold=0.5)",
)


NAMED = {part.split("(")[0].strip() for recipe in RECIPES for part in recipe.split("|")}
FILES = {path.stem for path in (Path(kvloom.__file__).parent / "recipes").glob("[a-z]*.py")}
ALL = (*RECIPES, *sorted(FILES - NAMED))


def recipe_of(text: str) -> str:
    """The recipe with a small budget, if it takes one."""
    if text in RECIPES:
        return text
    options = {option.name for option in kvloom.card(text).options}
    return f"{text}(budget=40)" if "budget" in options else text


def feed(cache: KVCache, model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def carried(state: State) -> State:
    """Through JSON and bytes of its own, as any store would keep it."""
    return State(json.loads(json.dumps(state.facts)), {part: x.clone() for part, x in state.tensors.items()})


def go_on(cache: KVCache, model: Any, seed: int = 9) -> Tensor:
    """A turn of several tokens, then single ones."""
    ids = prompt(18, seed=seed)
    parts = [ids[:, :7], *ids[:, 7:].split(1, 1)]
    return torch.cat([feed(cache, model, part) for part in parts], 1)


@pytest.mark.parametrize("recipe", ALL)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(1, 70), decoded=st.integers(0, 12), twice=st.booleans())
def test_what_comes_back_goes_on_the_same(recipe: str, first: int, decoded: int, twice: bool) -> None:
    model = subject("llama")
    recipe = profiled(model, recipe_of(recipe))
    cache = KVCache(model, recipe)
    feed(cache, model, prompt(first))
    for i in range(decoded):
        feed(cache, model, prompt(13, seed=3)[:, i : i + 1])
    if twice:
        copy.deepcopy(cache)  # seals its runs
        feed(cache, model, prompt(5, seed=4))
    state = carried(portable.dump(cache))
    other = KVCache(model, recipe)
    portable.load(other, state)
    assert other.get_seq_length() == cache.get_seq_length()
    assert other.report().used == cache.report().used and state.nbytes <= cache.nbytes + 8 * len(state.tensors)
    again = portable.dump(other)
    assert again.facts == state.facts and again.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(again.tensors[part], x) for part, x in state.tensors.items())
    assert torch.equal(go_on(other, model), go_on(cache, model))
    assert other.report().used == cache.report().used


def test_encoded_blocks_travel_as_they_are() -> None:
    model, recipe = subject("llama"), "kivi(bits=2, group=8, residual=16)"
    cache, full = KVCache(model, recipe), KVCache(model)
    feed(cache, model, prompt(128))
    feed(full, model, prompt(128))
    assert portable.dump(cache).nbytes < 0.4 * portable.dump(full).nbytes


def test_padding_is_remembered() -> None:
    model = subject("llama")
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt(30)], 1)
    mask = (torch.arange(ids.shape[1]) >= 5).long()[None]
    cache = KVCache(model, "kivi(bits=4, group=8, residual=16)")
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        other = KVCache(model, "kivi(bits=4, group=8, residual=16)")
        portable.load(other, carried(portable.dump(cache)))
        more, longer = prompt(6, seed=2), torch.cat([mask, torch.ones(1, 6, dtype=torch.long)], 1)
        got, want = (model(more, attention_mask=longer, past_key_values=x).logits for x in (other, cache))
    assert torch.equal(got, want)


def test_what_cannot_be_taken_out_is_refused() -> None:
    model = subject("llama")
    cache = KVCache(model)
    with pytest.raises(CacheError, match="0 sequences"):
        portable.dump(cache)
    feed(cache, model, prompt(9).expand(2, -1))
    with pytest.raises(CacheError, match="2 sequences"):
        portable.dump(cache)
    cache = KVCache(model)
    feed(cache, model, prompt(9))
    cache.activate_past_recording()
    with pytest.raises(CacheError, match="pending"):
        portable.dump(cache)
    sliding = subject("mistral-sliding")
    cache = KVCache(sliding)
    feed(cache, sliding, prompt(9))
    with pytest.raises(ModelError, match="whole text"):
        portable.dump(cache)


def _damaged(state: State, how: str) -> State:
    facts, tensors = copy.deepcopy(state.facts), dict(state.tensors)
    codes = next(part for part in tensors if part.field.endswith("codes"))
    layer = facts["layers"][0]
    segment = layer["groups"][0]["classes"]["main"]
    if how == "format":
        facts["format"] = 99
    elif how == "recipe":
        facts["recipe"] = "full"
    elif how == "missing":
        del tensors[codes]
    elif how == "more":
        tensors[Part(0, "key", "else")] = torch.zeros(1)
    elif how == "dtype":
        tensors[codes] = tensors[codes].to(torch.int8)
    elif how == "shape":
        tensors[codes] = tensors[codes][:, :-1]
    elif how == "layers":
        facts["layers"].pop()
    elif how == "heads":
        layer["shape"][0] = 3
    elif how == "width":
        layer["shape"][1] = 24
    elif how == "length":
        layer["length"] = -1
    elif how == "slots":
        segment["n"] += 1
    elif how == "order":
        segment["key"]["runs"] = segment["key"]["runs"][::-1]
    elif how == "unit":
        segment["key"]["runs"][0][1] -= 1
    elif how == "class":
        layer["groups"][0]["classes"] = {"other": segment}
    elif how == "type":
        facts["layers"][0] = "a layer"
    elif how == "gone":
        del layer["gaps"]
    return State(facts, tensors)


@pytest.mark.parametrize(
    "how",
    ["format", "recipe", "missing", "more", "dtype", "shape", "layers", "heads", "width", "length", "slots", "order"]
    + ["unit", "class", "type", "gone"],
)
def test_a_state_from_elsewhere_is_checked(how: str) -> None:
    model, recipe = subject("llama"), "kivi(bits=2, group=8, residual=16)"
    cache, other = KVCache(model, recipe), KVCache(model, recipe)
    feed(cache, model, prompt(50))
    with pytest.raises(CacheError):
        portable.load(other, _damaged(portable.dump(cache), how))
    assert other.get_seq_length() == 0
    portable.load(other, portable.dump(cache))  # and is none the worse for it
    assert torch.equal(go_on(other, model), go_on(cache, model))


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if (made := kvloom.parse(r)).prepare is None and blocks.blockwise(made)]
)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(block=st.sampled_from([5, 8, 16, 24]), count=st.integers(1, 6))
def test_a_cache_put_together_from_blocks(recipe: str, block: int, count: int) -> None:
    model = subject("llama")
    cache, parts = KVCache(model, recipe), []
    ids = prompt(block * count)
    for start in range(0, block * count, block):
        feed(cache, model, ids[:, start : start + block])
        part = blocks.block_of(cache, start, start + block)
        parts.append({name: x.clone() for name, x in part.items()})
    other = KVCache(model, recipe)
    shapes = [portable.shape_of(layer.site) for layer in other.managed()]
    assembly = blocks.Assembly(other, shapes, block * count + 3)
    for i, part in enumerate(parts):
        assembly.add((i + 1) * block, part)
    assembly.finish()
    assert other.get_seq_length() == cache.get_seq_length()
    assert other.report().used == cache.report().used
    assert torch.equal(go_on(other, model), go_on(cache, model))


def test_rows_of_half_a_block() -> None:
    model = subject("llama")
    cache, other = KVCache(model), KVCache(model)
    ids = prompt(40)
    feed(cache, model, ids)
    assembly = blocks.Assembly(other, [portable.shape_of(layer.site) for layer in cache.managed()], 40)
    assembly.add(16, blocks.block_of(cache, 0, 16))
    assembly.add(32, blocks.block_of(cache, 16, 32), rows=5)
    assembly.finish()
    assert other.get_seq_length() == 21
    cache.crop(21 - 40)
    assert torch.equal(go_on(other, model), go_on(cache, model))
    coded = KVCache(model, RECIPES[1])
    assembly = blocks.Assembly(coded, [portable.shape_of(layer.site) for layer in coded.managed()], 40)
    with pytest.raises(CacheError, match="half a block"):
        assembly.add(16, {}, rows=3)
    with pytest.raises(CacheError, match="missing"):
        assembly.add(16, {})
