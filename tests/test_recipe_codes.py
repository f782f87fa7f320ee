"""Recipes that store every token in codes: what all of them must hold, whatever the code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from kvloom import KVCache
from kvloom.core.run import Run
from tests.families import prompt, subject
from tests.modes import MODES
from tests.profiles import profiled
from tests.reference import kept, layers_of, run_cache

RECIPES = (
    "gear(group=8, residual=16)",
    "gear(group=8, residual=8, outliers=0.1, spread='head')",
    "turboquant(bits=3)",
    "turboquant(bits=4, keys='product', residual=12)",
    "kvquant(bits=2)",
    "kvquant(bits=4, outliers=0.1, spread='head')",
    "cskv(window=8)",
    "cskv(keys=0.5, values=0.5, window=8, bits=4)",
    "effectively-compress-kv-heads",
    "matryoshkakv(keep=0.5, steps=2)",
    "rotatekv",
    "rotatekv(bits=4, sinks=0)",
    "million(residual=16)",
    "accurate-block-quantization(block=8)",
    "olive",
    "fireq",
    "kvtuner(bits=4, group=8, residual=16, trials=12)",
    "shadowkv(rank=8, local=1)",
    "key-driven-gqa",
    "think(recent=6)",
    "think(recent=6) | kivi(bits=4, group=8, residual=16)",
    "vidkv(protect=0.0, group=8)",
)
PLACED = ("streamingllm(window=30)", "h2o(budget=40)", "snapkv(budget=40, window=8)")


def made(model: Any, recipe: str) -> KVCache:
    return KVCache(model, profiled(model, recipe))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mode", ["padded", "beams", "assisted", "turns"])
def test_ways_of_running(recipe: str, mode: str) -> None:
    """Finite, as long as asked for, and the same when done again."""
    model = subject("llama")
    found = [MODES[mode](model, model, lambda m: made(m, recipe)) for _ in range(2)]
    for x in found[0].logits:
        assert bool(torch.isfinite(x).all())
    for a, b in zip(found[0].tokens, found[1].tokens, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_of_a_batch_are_those_of_single_texts(recipe: str) -> None:
    """Left padding changes nothing: also places in the text, by which keys are turned."""
    model = subject("llama")
    ids = torch.cat([prompt(40, seed=1), prompt(40, seed=2)])
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache, more = made(model, recipe), prompt(4, seed=5).expand(2, -1)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=position, past_key_values=cache)
        got = []
        for i in range(4):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            at = position[:, -1:] + 1 + i
            got.append(
                model(more[:, i : i + 1], attention_mask=mask, position_ids=at, past_key_values=cache).logits[1, 0]
            )
    alone = run_cache(model, made(model, recipe), torch.cat([ids[1:, 11:], more[:1]], 1), [29, 1, 1, 1, 1])[29:]
    torch.testing.assert_close(torch.stack(got), alone, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_copy_goes_on_as_the_original(recipe: str) -> None:
    model, ids = subject("llama"), prompt(90)
    cache = made(model, recipe)
    run_cache(model, cache, ids, [50, 1, 1, 1])
    twin, other = copy.deepcopy(cache), prompt(90, seed=3)
    run_cache(model, twin, other, [20])  # writes behind what both share
    want = run_cache(model, copy.deepcopy(cache), ids, [1] * 30)
    run_cache(model, twin, other, [1] * 10)
    assert torch.equal(run_cache(model, cache, ids, [1] * 30), want)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_crop_takes_back_whole_tokens(recipe: str) -> None:
    """After a crop the slots of the shorter text are left, as they were stored, and the text can go on."""
    model, ids = subject("llama"), prompt(90)
    cache = made(model, recipe)
    run_cache(model, cache, ids, [60])
    segment = layers_of(cache)[1].groups[0].segments["main"]
    slots = torch.arange(40).expand(segment.heads, -1)
    before = segment.read(slots)
    cache.crop(-20)
    after = segment.read(slots)
    assert cache.get_seq_length() == 40
    torch.testing.assert_close(after.k, before.k)
    torch.testing.assert_close(after.v, before.v)
    assert bool(torch.isfinite(run_cache(model, cache, ids, [1] * 30)).all())


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_is_encoded_twice(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slot of every head is encoded once in each plane, and slots in the order of the text."""
    model, ids, seen = subject("llama"), prompt(120), [0]
    made_runs, append = Run.__init__, Run.append

    def build(self: Run, codec: Any, block: Any, *rest: Any) -> None:
        made_runs(self, codec, block, *rest)
        seen[0] += 0 if codec.exact else self.n

    def grow(self: Run, block: Any, *rest: Any) -> None:
        append(self, block, *rest)
        seen[0] += 0 if self.codec.exact else self.codec.slots(block)

    monkeypatch.setattr(Run, "__init__", build)
    monkeypatch.setattr(Run, "append", grow)
    cache = made(model, recipe)
    run_cache(model, cache, ids, [40] + [1] * 40 + [25] + [1] * 15)
    frozen = 0
    for layer in layers_of(cache):
        for group in layer.groups:
            segment = group.segments["main"]
            assert segment.key.n == segment.value.n == segment.n == 120
            frozen += segment.key.frozen + segment.value.frozen
    assert seen[0] == frozen


@pytest.mark.parametrize("placement", PLACED)
@pytest.mark.parametrize(
    "recipe",
    [
        r
        for r in RECIPES
        if not any(x in r for x in ("layer", "effectively", "cskv", "shadow", "driven", "rotatekv"))
        and r not in ("kvquant(bits=2)", "gear(group=8, residual=16)")
    ],
)
def test_with_placements(recipe: str, placement: str) -> None:
    """No slot is lost or doubled over 42 steps and a second turn; logits stay finite."""
    model, ids = subject("llama"), prompt(122)
    composed = parse_both(model, placement, recipe)
    cache, alone = KVCache(model, composed), KVCache(model, placement)

    def watch(length: int) -> None:
        for layer in kept(cache):
            for head in layer:
                assert len(set(head)) == len(head) and max(head) == length - 1

    sizes = [60] + [1] * 30 + [20] + [1] * 12
    logits = run_cache(model, cache, ids, sizes, watch)
    run_cache(model, alone, ids, sizes)
    assert bool(torch.isfinite(logits).all())
    unit = cache.recipe.kinds["main"].unit
    for mine, its in zip(kept(cache), kept(alone), strict=True):
        for a, b in zip(mine, its, strict=True):
            assert len(b) <= len(a) + unit and len(a) <= len(b) + unit + 64


def parse_both(model: Any, placement: str, recipe: str) -> Any:
    from kvloom import parse

    return parse(placement) | parse(profiled(model, recipe))
