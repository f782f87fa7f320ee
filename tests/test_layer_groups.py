"""Layers that settle together: what they hold in common is held once, however a cache is run, copied, cut and carried."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvloom import KVCache, RecipeError
from kvloom.core import portable
from kvloom.core.stack import neighbours
from tests.families import prompt, subject
from tests.modes import MODES
from tests.reference import layers_of, run_cache
from tests.test_portable import carried, go_on

RECIPES = (
    "minicache(interval=8)",
    "minicache(interval=None, retain=0.2)",
    "minicache(bits=4, interval=16)",
    "xkv(layers=2)",
    "xkv(layers=3, keys='post-rope', key_rank=20)",
    "xquant(bits=2, group=16, first=1, across=True)",
)


def common(cache: KVCache, row: int = 0) -> list[tuple[Any, ...]]:
    """The buffers of every field that a group of layers shares, by group, one entry for each of its layers."""
    found = []
    layers = {layer.site.layer: layer for layer in layers_of(cache, row)}
    for group in cache.recipe.groups:
        for segments in zip(*(layers[i].groups[0].segments.values() for i in group), strict=True):
            for which in ("key", "value"):
                for runs in zip(*(getattr(segment, which).runs for segment in segments), strict=True):
                    assert len({run.n for run in runs}) == 1
                    names = runs[0].codec.shared
                    found += [tuple(run.fields[x] for run in runs if x in run.fields) for x in sorted(names)]
    return found


def assert_shared(cache: KVCache, row: int = 0) -> None:
    found = common(cache, row)
    assert found
    for buffers in found:
        assert len({id(buffer) for buffer in buffers}) == 1
    for layer in layers_of(cache, row):
        for group in layer.groups:
            for segment in group:
                assert segment.n == segment.key.n == segment.value.n


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mode", ["padded", "beams", "assisted", "lookup", "chunkedpadded", "turns", "repeated"])
def test_ways_of_running(recipe: str, mode: str) -> None:
    """Finite, as long as asked for, and the same when done again."""
    model, found = subject("llama"), []
    for _ in range(2):
        caches: list[KVCache] = []

        def make(m: Any, caches: list[KVCache] = caches) -> KVCache:
            caches.append(KVCache(m, recipe))
            return caches[-1]

        found.append(MODES[mode](model, model, make))
        for cache in caches:
            for row in range(len(next(cache.managed()).rows)):
                assert_shared(cache, row)
                assert {layer.length for layer in layers_of(cache, row)} == {layers_of(cache, row)[0].length}
    for x in found[0].logits:
        assert bool(torch.isfinite(x).all())
    for a, b in zip(found[0].tokens, found[1].tokens, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_of_a_batch_are_those_of_single_texts(recipe: str) -> None:
    model = subject("llama")
    ids = torch.cat([prompt(40, seed=1), prompt(40, seed=2)])
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache, more, got = KVCache(model, recipe), prompt(12, seed=5).expand(2, -1), []
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=position, past_key_values=cache)
        for i in range(12):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            at = position[:, -1:] + 1 + i
            out = model(more[:, i : i + 1], attention_mask=mask, position_ids=at, past_key_values=cache).logits
            got.append(out[1, 0])
    alone = run_cache(model, KVCache(model, recipe), torch.cat([ids[1:, 11:], more[:1]], 1), [29] + [1] * 12)[29:]
    torch.testing.assert_close(torch.stack(got), alone, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_copy_goes_on_as_the_original(recipe: str) -> None:
    """Both grow from what they share, and each holds the group's part once."""
    model, ids = subject("llama"), prompt(140)
    cache = KVCache(model, recipe)
    run_cache(model, cache, ids, [50, 1, 1, 1])
    twin, other = copy.deepcopy(cache), prompt(140, seed=3)
    run_cache(model, twin, other, [20])  # writes behind what both share
    want = run_cache(model, copy.deepcopy(cache), ids, [1] * 30)
    run_cache(model, twin, other, [1] * 30)
    assert torch.equal(run_cache(model, cache, ids, [1] * 30), want)
    assert_shared(cache)
    assert_shared(twin)


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_are_counted_once_after_a_crop_and_a_journey(recipe: str) -> None:
    model, ids = subject("llama"), prompt(140)
    cache, fresh = KVCache(model, recipe), KVCache(model, recipe)
    run_cache(model, cache, ids, [70] + [1] * 20)
    cache.crop(-30)
    assert cache.get_seq_length() == 60
    assert_shared(cache)
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for a in layers_of(cache)
        for *_, x, _ in a.tensors()
    }
    assert cache.nbytes == sum(storages.values())
    state = carried(portable.dump(cache))
    assert state.nbytes <= cache.nbytes
    portable.load(fresh, state)
    assert_shared(fresh)
    assert fresh.report().used == cache.report().used
    assert torch.equal(go_on(fresh, model), go_on(cache, model))
    assert_shared(fresh)


def test_drafts_wait_for_the_whole_group() -> None:
    """While drafts are pending nothing is merged, in no layer; after the crop it is, in all."""
    model, ids = subject("llama"), prompt(80)
    cache, plain = KVCache(model, "minicache(interval=1)"), KVCache(model, "minicache(interval=1)")
    for each in (cache, plain):
        run_cache(model, each, ids, [40])
    for layer in cache.managed():
        layer.record_past = True
    run_cache(model, cache, ids, [6])
    assert [layer.groups[0].segments["main"].n for layer in layers_of(cache)] == [46, 8, 8]
    cache.crop(-4)
    run_cache(model, plain, ids[:, :42], [1, 1])
    got = [layer.groups[0].segments["main"].n for layer in layers_of(cache)]
    assert got == [layer.groups[0].segments["main"].n for layer in layers_of(plain)]
    assert_shared(cache)


@pytest.mark.parametrize("family", ["mistral-sliding", "gemma3", "gemma2"])
def test_layers_that_cannot_be_grouped_are_refused(family: str) -> None:
    with pytest.raises(RecipeError, match="together"):
        KVCache(subject(family), "minicache(start=0.0)" if family != "gemma3" else "minicache(start=0.5)")


def test_a_layer_left_alone_inside_a_group_is_refused() -> None:
    sites = [layer.site for layer in KVCache(subject("llama")).managed()]
    assert neighbours(sites, 0, 2, "x") == ((0, 1),) and neighbours(sites, 0, 4, "x") == ((0, 1, 2),)
    with pytest.raises(RecipeError, match="no neighbours"):
        neighbours([sites[0], sites[2]], 0, 2, "x")
    with pytest.raises(RecipeError, match="differ in shape"):
        neighbours([sites[0], replace(sites[1], kv_heads=1)], 0, 2, "x")


@pytest.mark.parametrize("other", ["snapkv(budget=40)", "h2o(budget=40)", "streamingllm(window=40)", "kivi(bits=4)"])
def test_what_does_not_go_together_is_refused(other: str) -> None:
    model = subject("llama")
    with pytest.raises(RecipeError):
        KVCache(model, f"{other} | minicache")
