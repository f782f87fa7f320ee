"""TOVA (arXiv 2401.06104), KeyDiff (2504.15364), PyramidKV (2406.02069), AdaKV (2407.11550), Expected Attention (2510.00636).

Each beside a plain re-implementation from its paper's definitions: the same slots kept, the same logits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvloom import KVCache, ModelError, RecipeError, parse
from tests.families import build, prompt
from tests.reference import Full, Slots, Snap, kept, rope, run, run_cache

SIZES = {
    "decode": [60] + [1] * 25,
    "single tokens": [1] * 60,
    "chunks and turns": [40, 25, 1, 1, 1, 20, 1, 1],
    "just over": [33] + [1] * 25,
}
NAMES = ["tova", "keydiff", "pyramidkv", "adakv", "expected-attention"]
SMALL = {
    "pyramidkv": ", window=8",
    "adakv": ", window=8",
    "expected-attention": ", window=8",
}  # queries that are kept count as bytes


def compare(recipe: str, reference: Full, sizes: Sequence[int]) -> None:
    """The same logits, and the same slots in every layer and head."""
    model, ids = reference.model, prompt(sum(sizes))
    cache = KVCache(model, recipe)
    want = run(reference, ids, sizes)
    got = run_cache(model, cache, ids, sizes)
    for i, layer in enumerate(kept(cache)):
        for h, index in enumerate(layer):
            assert index == reference.slots[i, h].index.tolist(), f"layer {i}, head {h}"
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)


class Tova(Full):
    """Keeps the `budget` slots of largest mean attention from the newest query, over all query heads of the layer."""

    def __init__(self, model: Any, budget: int) -> None:
        super().__init__(model)
        self.budget = budget
        self.seen: list[Tensor] = []

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        self.seen.append(p[:, -1])
        if len(self.seen) == self.config.num_key_value_heads:
            mean, self.seen = torch.cat(self.seen).mean(0), []
            if len(mean) > self.budget:
                best = mean.topk(self.budget).indices.sort().values
                for h in range(self.config.num_key_value_heads):
                    self.slots[layer, h].keep(best)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("budget", [32, 9])
def test_tova_keeps_what_the_newest_token_attends_to(sizes: list[int], budget: int) -> None:
    compare(f"tova(budget={budget})", Tova(build("llama"), budget), sizes)


def test_tova_heads_of_a_layer_hold_the_same_slots_and_layers_differ() -> None:
    model = build("llama")
    cache = KVCache(model, "tova(budget=24)")
    run_cache(model, cache, prompt(80), [70] + [1] * 10)
    layers = kept(cache)
    assert all(head == layer[0] for layer in layers for head in layer)
    assert layers[0] != layers[1]
    assert any(layer[0][0] != 0 or layer[0][-2] != 78 for layer in layers)  # neither sinks nor a window are protected


class KeyDiff(Full):
    """Drops keys of largest cosine to the mean of the normalized keys."""

    def __init__(self, model: Any, budget: int, interval: int) -> None:
        super().__init__(model)
        self.budget, self.interval = budget, interval

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        over = len(s.k) - self.budget
        if over >= (1 if p.shape[1] > 1 else self.interval):
            anchor = (s.k / s.k.norm(dim=-1, keepdim=True)).mean(0)
            cosine = s.k @ anchor / (s.k.norm(dim=-1) * anchor.norm())
            s.keep((-cosine).topk(self.budget).indices.sort().values)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("interval", [1, 6])
def test_keydiff_keeps_keys_unlike_the_mean(sizes: list[int], interval: int) -> None:
    compare(f"keydiff(budget=32, interval={interval})", KeyDiff(build("llama"), 32, interval), sizes)


def pyramid(budget: int, window: int, beta: int, prompt: int, layers: int) -> list[int]:
    """Slots by layer as the official code gives them out (whole steps), without what decoding adds."""
    mean = budget - window
    if prompt < 2 * mean:
        return [budget] * layers
    least = mean // beta
    most = 2 * mean - least
    if most >= prompt - window:
        most = prompt - window
        least = 2 * mean - most
    step = (most - least) // (layers - 1)
    return [most - i * step + window for i in range(layers)]


class PyramidSnap(Snap):
    """SnapKV with another capacity in each layer."""

    def __init__(self, model: Any, budget: int, window: int, beta: int) -> None:
        super().__init__(model, budget, window, 5, "avg")
        self.budget, self.beta = budget, beta

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        layers = self.config.num_hidden_layers
        self.capacity = pyramid(self.budget, self.window, self.beta, self.prompt, layers)[layer]
        super().after(layer, head, s, q, p)


@pytest.mark.parametrize("length", [90, 58, 40, 30])
@pytest.mark.parametrize("beta", [1, 2, 20])
def test_pyramidkv_keeps_snapkv_choices_in_a_pyramid(length: int, beta: int) -> None:
    recipe = f"pyramidkv(budget=32, window=8, kernel=5, pool='avg', beta={beta}, interval=None)"
    compare(recipe, PyramidSnap(build("llama"), 32, 8, beta), [length] + [1] * 8)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_pyramidkv_stays_within_each_layers_share(sizes: list[int]) -> None:
    model, interval = build("llama"), 4
    cache = KVCache(model, f"pyramidkv(budget=32, window=8, interval={interval})")
    asked = [0]

    def check(length: int) -> None:
        asked[0] += 1
        seen = sizes[: asked[0]]
        text = seen[0] + sum(size for size in seen[1:] if size > 1)
        shares = pyramid(32, 8, 20, text, model.config.num_hidden_layers)
        for share, layer in zip(shares, kept(cache), strict=True):
            assert all(len(head) <= max(share, 0) + interval - 1 for head in layer)
            assert all(head[-8:] == list(range(max(0, length - 8), length)) for head in layer)

    run_cache(model, cache, prompt(sum(sizes)), sizes, check)


def test_pyramidkv_lower_layers_keep_more_and_the_mean_is_the_budget() -> None:
    model = build("llama")
    cache = KVCache(model, "pyramidkv(budget=40, window=8)")
    run_cache(model, cache, prompt(100), [100])
    counts = [len(layer[0]) for layer in kept(cache)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    assert 40 <= sum(counts) / len(counts) <= 40 + len(counts) / 2
    even = KVCache(model, "pyramidkv(budget=40, window=8, beta=1)")
    run_cache(model, even, prompt(100), [100])
    assert {len(head) for layer in kept(even) for head in layer} == {40}


class Ada(Snap):
    """The best-scored slots of all heads of a layer together; counts by head, drawn towards the floor."""

    def __init__(self, model: Any, budget: int, window: int, floor: float) -> None:
        super().__init__(model, budget, window, 5, "avg")
        self.floor = floor
        self.pooled: list[Tensor] = []

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        """Scores every head as SnapKV does, and chooses when the last head of the layer is there."""
        n, w, free = len(s.k), self.window, self.capacity - self.window
        if p.shape[1] == 1:
            return
        score = torch.nn.functional.pad(p[:, -w:, : n - w].sum(1), (2, 2)).unfold(-1, 5, 1).sum(-1) / 5
        self.pooled.append(score.mean(0))
        if head < self.config.num_key_value_heads - 1:
            return
        pooled, self.pooled = self.pooled, []
        ranked = sorted(((float(x), h) for h, row in enumerate(pooled) for x in row), reverse=True)
        counts = [sum(owner == h for _, owner in ranked[: free * len(pooled)]) for h in range(len(pooled))]
        wanted = [Fraction(count) * (1 - Fraction(str(self.floor))) + int(free * self.floor) for count in counts]
        shares = [int(x) for x in wanted]
        while sum(shares) < free * len(pooled):  # what rounding left over, to the largest remainders first
            shares[max(range(len(pooled)), key=lambda h: wanted[h] - shares[h])] += 1
        for h, row in enumerate(pooled):
            share, slots = shares[h], self.slots[layer, h]
            if share < len(row):
                slots.keep(torch.cat([row.topk(share).indices.sort().values, torch.arange(len(row), len(slots.k))]))


@pytest.mark.parametrize("length", [90, 40, 33, 30])
@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
def test_adakv_divides_a_layers_slots_by_score(length: int, floor: float) -> None:
    recipe = f"adakv(budget=32, window=8, kernel=5, pool='avg', floor={floor}, interval=None)"
    compare(recipe, Ada(build("llama", num_key_value_heads=4), 32, 8, floor), [length] + [1] * 8)


def test_adakv_heads_are_unequal_and_bytes_are_freed() -> None:
    model = build("llama", num_key_value_heads=4)
    ada, snap = (KVCache(model, f"{name}(budget=64, window=8)") for name in ("adakv", "snapkv"))
    for cache in (ada, snap):
        run_cache(model, cache, prompt(300), [300])
    counts = [[len(head) for head in layer] for layer in kept(ada)]
    assert all(len(set(layer)) > 1 and sum(layer) == 256 for layer in counts)
    assert ada.report().used <= 1.02 * snap.report().used


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("interval", [1, 6])
def test_adakv_layers_stay_within_their_budget_on_average(sizes: list[int], interval: int) -> None:
    model = build("llama", num_key_value_heads=4)
    cache = KVCache(model, f"adakv(budget=32, window=8, interval={interval})")

    def check(length: int) -> None:
        for layer in kept(cache):
            assert sum(len(head) for head in layer) <= 4 * (32 + interval - 1)
            assert all(head[-8:] == list(range(max(0, length - 8), length)) for head in layer)
            assert length < 40 or all(len(head) >= 8 + int(24 * 0.2) for head in layer)

    run_cache(model, cache, prompt(sum(sizes)), sizes, check)


class Expecting(Full):
    """Moments of the queries before RoPE, rotated by the mean of explicit rotation matrices; sinks left out."""

    def __init__(self, model: Any, budget: int, sinks: int, ahead: int, window: int, interval: int) -> None:
        super().__init__(model)
        self.budget, self.sinks, self.ahead, self.window, self.interval = budget, sinks, ahead, window, interval
        self.raw: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        self.raw[layer] = torch.cat([self.raw[layer], q], 1) if layer in self.raw else q
        return super().attend(layer, q, k, v, start)

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        g, m, dim = q.shape
        n, length, prefill = len(s.k), int(s.index[-1]) + 1, m > 1 or int(s.index[-1]) == 0
        if n - self.budget < (1 if prefill else self.interval):
            return
        raw = self.raw[layer][head * g : (head + 1) * g, -(m if prefill else self.window) :]
        raw = raw[:, max(0, self.sinks - (length - raw.shape[1])) :].double()
        mean = raw.mean(1)
        cov = torch.stack([(x - x.mean(0)).T @ (x - x.mean(0)) / len(x) for x in raw])
        turn = rope(self.model, torch.eye(dim)[:, None].expand(-1, self.ahead, -1), length + torch.arange(self.ahead))
        turn = turn.mean(1).T.double()  # columns are the turned basis
        mean, cov = mean @ turn.T, turn @ cov @ turn.T
        free = s.index >= self.sinks
        k = s.k[free].double()
        logit = mean @ k.T / math.sqrt(dim) + torch.einsum("ni,gij,nj->gn", k, cov, k) / (2 * dim)
        score = torch.full((n,), torch.inf, dtype=torch.double)
        score[free] = logit.softmax(-1).mean(0) * s.v[free].norm(dim=-1)
        s.keep(score.topk(self.budget).indices.sort().values)


@pytest.mark.parametrize("sizes", [SIZES[name] for name in ("decode", "chunks and turns", "just over")])
@pytest.mark.parametrize(("sinks", "interval"), [(4, 1), (0, 5)])
def test_expected_attention_keeps_the_closed_form_choice(sizes: list[int], sinks: int, interval: int) -> None:
    recipe = f"expected-attention(budget=32, sinks={sinks}, ahead=40, window=12, interval={interval})"
    compare(recipe, Expecting(build("llama"), 32, sinks, 40, 12, interval), sizes)


def test_expected_attention_serves_query_norms_and_refuses_changing_frequencies() -> None:
    model = build("qwen3")
    cache = KVCache(model, "expected-attention(budget=32)")
    run_cache(model, cache, prompt(80), [80])
    assert all(len(head) == 32 and head[:4] == [0, 1, 2, 3] for layer in kept(cache) for head in layer)
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ModelError, match="dynamic"):
        KVCache(build("llama", rope_parameters=scaling), "expected-attention(budget=32)")


@pytest.mark.parametrize("name", NAMES)
def test_exact_while_everything_fits(name: str) -> None:
    model, ids, sizes = build("llama"), prompt(90), [80] + [1] * 10
    want = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    got = run_cache(model, KVCache(model, f"{name}(budget=90)"), ids, sizes)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_freed_and_within_a_budget_in_bytes(name: str) -> None:
    model = build("llama")
    full, small = KVCache(model, "full"), KVCache(model, f"{name}(budget='40KiB'{SMALL.get(name, '')})")
    for cache in (full, small):
        run_cache(model, cache, prompt(400), [400])
    assert 30 * 1024 < small.report().used <= 40 * 1024 < full.report().used


@pytest.mark.parametrize("name", NAMES)
def test_composes_with_a_codec(name: str) -> None:
    model, sizes = build("llama"), [150] + [1] * 40
    cache = KVCache(model, f"{name}(budget=96) | kivi(bits=4, group=16, residual=16)")
    plain = KVCache(model, f"{name}(budget=96)")
    for each in (cache, plain):
        out = run_cache(model, each, prompt(190), sizes)
        assert bool(out.isfinite().all())
    assert cache.report().used < 0.75 * plain.report().used


def test_options() -> None:
    wrong = (
        "tova(budget=0)",
        "keydiff(interval=0)",
        "pyramidkv(beta=0)",
        "pyramidkv(budget=16)",
        "pyramidkv(kernel=2)",
    )
    for text in (
        *wrong,
        "expected_attention(sinks=-1)",
        "adakv(floor=1.5)",
        "expected_attention(window=1)",
        "expected_attention(budget=4)",
    ):
        with pytest.raises(RecipeError):
            parse(text)


def test_methods_keep_different_slots() -> None:
    """The comparison above could tell one method from another."""
    model, ids, found = build("llama"), prompt(60), defaultdict(list)
    for name in NAMES:
        cache = KVCache(
            model, f"{name}(budget=32)" if name != "pyramidkv" else "pyramidkv(budget=32, window=8, beta=1)"
        )
        run_cache(model, cache, ids, [60])
        found[str(kept(cache))].append(name)
    assert len(found) == len(NAMES)
