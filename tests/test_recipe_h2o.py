"""H2O (arXiv 2306.14048) against full attention probabilities, accumulated token by token."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvloom import KVCache, RecipeError, parse
from tests.families import build, prompt
from tests.reference import H2O, kept, layers_of, run, run_cache

SIZES = {
    "decode": [50] + [1] * 25,
    "single tokens": [1] * 60,
    "chunks": [30, 25, 1, 1, 20, 1, 1],
    "just over": [22] + [1] * 25,
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("budget", "window"), [(20, 10), (20, 0), (9, 8)])
def test_logits_and_kept_indices(sizes: list[int], budget: int, window: int) -> None:
    model, ids = build("llama"), prompt(sum(sizes))
    cache, reference = KVCache(model, f"h2o(budget={budget}, window={window})"), H2O(model, budget - window, window)
    want = run(reference, ids, sizes)
    got = run_cache(model, cache, ids, sizes)
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)
    for i, layer in enumerate(kept(cache)):
        for h, index in enumerate(layer):
            assert index == reference.slots[i, h].index.tolist()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_scores_are_the_sums_of_the_reference(sizes: list[int]) -> None:
    model, ids = build("llama"), prompt(sum(sizes))
    cache, reference = KVCache(model, "h2o(budget=20, window=10)"), H2O(model, 10, 10)
    run(reference, ids, sizes)
    run_cache(model, cache, ids, sizes)
    for i, layer in enumerate(layers_of(cache)):
        segment = layer.groups[0].segments["main"]
        for h in range(2):
            order = segment.index.expand(2, -1)[h].argsort()
            want = reference.slots[i, h].score
            torch.testing.assert_close(segment.column("mass")[h][order], want, atol=1e-3, rtol=1e-3)


def test_1_full_cache_while_it_fits() -> None:
    model, ids = build("llama"), prompt(60)
    sizes = [50] + [1] * 10
    want = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    got = run_cache(model, KVCache(model, "h2o(budget=60)"), ids, sizes)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_2_length_and_newest_tokens(sizes: list[int]) -> None:
    model = build("llama")
    cache = KVCache(model, "h2o(budget=20, window=8)")

    def check(length: int) -> None:
        for index in (head for layer in kept(cache) for head in layer):
            assert len(index) == min(length, 20)
            assert index[-8:] == list(range(max(0, length - 8), length))

    run_cache(model, cache, prompt(sum(sizes)), sizes, check)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_3_scores_sum_to_the_queries_seen(sizes: list[int]) -> None:
    """Without eviction; each of the two query heads of a KV head counts."""
    model = build("llama")
    cache = KVCache(model, "h2o(budget=1000)")

    def check(length: int) -> None:
        for layer in layers_of(cache):
            mass = layer.groups[0].segments["main"].column("mass")
            torch.testing.assert_close(mass.sum(-1), torch.full((2,), 2.0 * length), atol=1e-2, rtol=1e-4)

    run_cache(model, cache, prompt(sum(sizes)), sizes, check)


def test_4_without_heavy_hitters_a_sliding_window() -> None:
    """hh = 0: original positions, the newest tokens only."""
    model, sizes = build("llama"), [40] + [1] * 20
    ids = prompt(60)
    cache = KVCache(model, "h2o(budget=12, window=12)")
    got = run_cache(model, cache, ids, sizes)
    assert all(head == list(range(48, 60)) for layer in kept(cache) for head in layer)
    with torch.no_grad():
        for at in (40, 50):  # layer by layer a window of 12 and the token itself; the prompt itself was exact
            want = run(H2O(model, 0, 12), ids, [40] + [1] * (at - 39))
            torch.testing.assert_close(got[at], want[at], atol=3e-4, rtol=1e-4)


def test_4_prompt_logits_are_exact() -> None:
    model, ids = build("llama"), prompt(60)
    want = run_cache(model, DynamicCache(config=model.config), ids, [60])
    got = run_cache(model, KVCache(model, "h2o(budget=0.1)"), ids, [60])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_ratio_is_of_the_prompt_for_good() -> None:
    model = build("llama")
    cache = KVCache(model, "h2o(budget=0.3)")
    run_cache(model, cache, prompt(90), [60] + [1] * 30)
    assert all(len(head) == 18 for layer in kept(cache) for head in layer)


def test_rows_of_a_batch_have_scores_of_their_own() -> None:
    """Two texts side by side keep what each keeps alone."""
    model, sizes = build("llama"), [40] + [1] * 10
    texts = [prompt(50, seed=i) for i in range(2)]
    together = KVCache(model, "h2o(budget=16)")
    both, start = torch.cat(texts), 0
    with torch.no_grad():
        for size in sizes:
            model(both[:, start : start + size], past_key_values=together)
            start += size
    for row, ids in enumerate(texts):
        alone = KVCache(model, "h2o(budget=16)")
        run_cache(model, alone, ids, sizes)
        for a, b in zip(layers_of(together, row), layers_of(alone), strict=True):
            mine, its = a.groups[0].segments["main"].index, b.groups[0].segments["main"].index
            assert torch.equal(mine.sort(-1).values, its.sort(-1).values)


def test_options() -> None:
    for wrong in ("budget=0", "budget=4, window=5", "window=-1", "window=1.5"):
        with pytest.raises(RecipeError):
            parse(f"h2o({wrong})")
