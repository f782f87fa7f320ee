"""StreamingLLM (arXiv 2309.17453) against keys cached before RoPE and rotated by their slot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvloom import KVCache, ModelError, RecipeError, parse
from tests.families import build, prompt
from tests.reference import Slots, Streaming, kept, run, run_cache

FIRST, STEPS = 40, 30
# prompt and decode; a second and third prompt of several tokens; one token at a time from the start
SIZES = {
    "decode": [FIRST] + [1] * STEPS,
    "chunks": [FIRST, 15, 1, 1, 30, 1, 1, 1],
    "short chunks": [2, 3, 30, 7, 1, 1, 20, 1],
    "single tokens": [1] * 60,
}


@pytest.mark.parametrize("family", ["llama", "llama-linear", "llama-llama3"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("sinks", "window"), [(4, 12), (0, 16)])
def test_logits_equal_slot_numbers(family: str, sizes: list[int], sinks: int, window: int) -> None:
    model, ids = build(family), prompt(sum(sizes))
    want = run(Streaming(model, sinks, window), ids, sizes)
    got = run_cache(model, KVCache(model, f"streamingllm(sinks={sinks}, window={window})"), ids, sizes)
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)


def test_1_full_cache_while_it_fits() -> None:
    model, ids = build("llama"), prompt(60)
    sizes = [50] + [1] * 10
    want = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    got = run_cache(model, KVCache(model, "streamingllm(sinks=4, window=56)"), ids, sizes)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("sinks", "window"), [(4, 12), (0, 16), (3, 1)])
def test_2_kept_indices(sizes: list[int], sinks: int, window: int) -> None:
    """After every forward {0..S-1} and {T-R..T-1}, the same in all layers and heads."""
    model = build("llama")
    cache = KVCache(model, f"streamingllm(sinks={sinks}, window={window})")

    def check(length: int) -> None:
        want = [i for i in range(length) if i < sinks or i >= length - window]
        assert all(head == want for layer in kept(cache) for head in layer), length

    run_cache(model, cache, prompt(sum(sizes)), sizes, check)


def test_3_positions_stay_inside_the_cache() -> None:
    """Shifting all text positions changes nothing: only slot distances count, though the text is far past the cache."""
    model, ids = build("llama"), prompt(300)
    cache = KVCache(model, "streamingllm(sinks=4, window=12)")
    got = run_cache(model, cache, ids, [40] + [1] * 260)
    want = run(Streaming(model, 4, 12), ids, [40] + [1] * 260)
    assert all(len(head) == 16 for layer in kept(cache) for head in layer)
    torch.testing.assert_close(got[-50:], want[-50:], atol=5e-4, rtol=1e-4)


def test_control_original_positions_differ() -> None:
    """Sinks at their true distance give other logits, so the tests above do see the rotation."""
    model, ids = build("llama"), prompt(70)
    got = run_cache(model, KVCache(model, "streamingllm(sinks=4, window=12)"), ids, [FIRST] + [1] * STEPS)

    class Unturned(Streaming):
        store = Streaming.__mro__[1].store  # type: ignore[assignment]
        logits = Streaming.__mro__[1].logits  # type: ignore[assignment]

    other = run(Unturned(model, 4, 12), ids, [FIRST] + [1] * STEPS)
    assert (got - other)[FIRST:].abs().max() > 0.05


@pytest.mark.parametrize("family", ["llama-dynamic", "llama-longrope"])
def test_refused_where_frequencies_follow_the_length(family: str) -> None:
    with pytest.raises(ModelError, match=family.removeprefix("llama-")):
        KVCache(build(family), "streamingllm()")


class Followed(Streaming):
    """Slot numbers over the tokens that a cache was seen to hold, where it drops whole units only."""

    def __init__(self, model: Any, seen: dict[int, list[list[list[int]]]]) -> None:
        super().__init__(model, 0, 0)
        self.seen = seen

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        want = self.seen[int(s.index[-1]) + 1][layer][head]
        s.keep(torch.isin(s.index, torch.tensor(want)))


@pytest.mark.parametrize("first", [60, 30, 2])
def test_sinks_turn_under_kivi(first: int) -> None:
    """With 8-bit storage of everything old, positions are still slot numbers, however short the first forward is."""
    sizes = [first, 30, 1, 1, 20] + [1] * 30
    model, ids = build("llama"), prompt(sum(sizes))
    cache = KVCache(model, "streamingllm(sinks=4, window=44) | kivi(bits=8, group=8, residual=8)")
    seen: dict[int, list[list[list[int]]]] = {}
    got = run_cache(model, cache, ids, sizes, lambda n: seen.update({n: kept(cache)}))
    for length, layers in seen.items():
        for index in (head for layer in layers for head in layer):
            assert index[:4] == list(range(min(4, length)))
            assert len(index) <= 48 + 7 and set(range(length - min(44, length), length)) <= set(index)
    want = run(Followed(model, seen), ids, sizes)
    assert (got - want).abs().mean() < 0.02  # what 8 bits cost alone is 0.008


def test_options() -> None:
    assert parse("streamingllm(sinks=2, window=6)").name
    for wrong in ("sinks=-1", "window=0", "sinks=4, budget=4", "budget=0", "budget=1.5"):
        with pytest.raises(RecipeError):
            parse(f"streamingllm({wrong})")


def test_budget_counts_the_sinks() -> None:
    model = build("llama")
    cache = KVCache(model, "streamingllm(sinks=4, budget=20)")
    run_cache(model, cache, prompt(50), [45] + [1] * 5)
    assert all(len(head) == 20 for layer in kept(cache) for head in layer)
