"""CompressKV (arXiv 2508.02401) and UNComp (2410.03090) beside plain re-implementations from the papers' definitions.

And what they, WindowKV, KVCrush and Task-KV have in common.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvloom import KVCache, RecipeError, parse
from kvloom.core import profile as profiles
from kvloom.policies.budgets import Shares
from kvloom.policies.entropy import entropy
from tests.families import build, prompt
from tests.profiles import profiled
from tests.reference import Slots, Snap, kept, run_cache
from tests.test_recipe_choices import AllHeads
from tests.test_recipe_selection import compare

NAMES = ["windowkv", "kvcrush", "task-kv", "compresskv", "uncomp"]
SMALL = {
    "windowkv": ", suffix=8, shared=1",
    "kvcrush": ", window=8",
    "task-kv": ", window=8, sinks=4, recent=12",
    "compresskv": ", heads=2, base=8",
    "uncomp": "",
}


def found_in(model: Any, name: str) -> dict[str, Tensor]:
    path = profiled(model, name).split("'")[1]
    return profiles.load(path, model, name, {})


class Chooser(AllHeads):
    """A few query heads choose for the layer."""

    def __init__(self, model: Any, sizes: list[int], finders: list[list[int]], window: int) -> None:
        super().__init__(model)
        self.sizes, self.finders, self.window = sizes, finders, window

    def choose(self, layer: int, slots: list[Slots], q: Tensor, p: Tensor) -> None:
        n, w = p.shape[-1], self.window
        if n <= self.sizes[layer]:
            return
        a = p[self.finders[layer], -w:, : n - w].sum(1)
        score = (torch.nn.functional.pad(a, (2, 2)).unfold(-1, 5, 1).sum(-1) / 5).mean(0)
        best = score.topk(self.sizes[layer] - w).indices.sort().values
        for s in slots:
            s.keep(torch.cat([best, torch.arange(n - w, n)]))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_compresskv_few_heads_choose_for_a_layer(heads: int) -> None:
    model = build("llama")
    found = found_in(model, "compresskv")
    finders = found["heads"].topk(heads).indices.tolist()
    sizes = Shares(40, base=12, weights=tuple(found["layers"].tolist()), order=(0, 1, 2)).split(40)
    recipe = profiled(model, "compresskv").replace("(", f"(budget=40, heads={heads}, base=12, interval=None, ")
    compare(recipe, Chooser(model, sizes, finders, 8), [110] + [1] * 8)
    cache = KVCache(model, recipe)
    run_cache(model, cache, prompt(110), [110])
    assert all(head == layer[0] for layer in kept(cache) for head in layer)
    assert sum(len(layer[0]) for layer in kept(cache)) == 3 * 40


@pytest.mark.parametrize("size", [8, 33, 64, 1000, 10**7])
@pytest.mark.parametrize("weights", [(0.2, 0.3, 0.5), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.9, 0.05, 0.05)])
def test_compresskv_budgets_add_up(size: int, weights: tuple[float, ...]) -> None:
    found = Shares(size, weights=weights, order=(0, 1, 2)).split(size)
    assert sum(found) == 3 * size and min(found) >= min(32, size) and max(found) <= 3 * size
    ranked = sorted(range(3), key=lambda i: -weights[i])
    assert [found[i] for i in ranked] == sorted(found, reverse=True)


def test_compresskv_one_head_with_mha_is_snapkv() -> None:
    model = build("llama", num_attention_heads=1, num_key_value_heads=1, head_dim=16)
    recipe = profiled(model, "compresskv")
    path = recipe.split("'")[1]
    even = {**profiles.load(path, model, "compresskv", {}), "layers": torch.ones(3) / 3}
    profiles.save(Path(path).with_suffix(".even"), model, "compresskv", even)
    recipe = f"compresskv(budget=40, heads=1, interval=4, profile={str(Path(path).with_suffix('.even'))!r})"
    found = []
    for text in (recipe, "snapkv(budget=40, window=8, kernel=5, pool='avg', interval=4)"):
        cache = KVCache(model, text)
        run_cache(model, cache, prompt(120), [100] + [1] * 20)
        found.append(kept(cache))
    assert found[0] == found[1]


def test_compresskv_other_heads_have_no_say() -> None:
    model = build("llama")
    recipe = profiled(model, "compresskv").replace("(", "(budget=40, heads=1, ")
    best = found_in(model, "compresskv")["heads"][0].argmax()
    cache = KVCache(model, recipe)
    run_cache(model, cache, prompt(100), [100])
    other = build("llama")
    at = other.model.layers[0].self_attn
    for h in range(4):
        if h != int(best):
            at.q_proj.weight.data[h * 16 : (h + 1) * 16].neg_()
    changed = KVCache(other, KVCache(model, recipe).recipe)
    run_cache(other, changed, prompt(100), [100])
    assert kept(changed)[0] == kept(cache)[0]


class Halves(Snap):
    """Another capacity for heads of high entropy."""

    def __init__(self, model: Any, flags: Tensor, high: int, low: int, window: int) -> None:
        super().__init__(model, 0, window, 5, "avg")
        self.flags, self.sizes = flags, (low, high)

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        self.capacity = self.sizes[int(self.flags[layer, head])]
        super().after(layer, head, s, q, p)


@pytest.mark.parametrize("heads", [2, 4])
def test_uncomp_half_of_the_heads_keep_twice_as_much(heads: int) -> None:
    model = build("llama", num_key_value_heads=heads)
    found = found_in(model, "uncomp")
    rank = found["votes"] + found["entropy"] / 100
    flags = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, rank.topk(heads // 2).indices, True)
    recipe = profiled(model, "uncomp").replace("(", "(budget=36, kernel=5, pool='avg', interval=None, ")
    compare(recipe, Halves(model, flags, 48, 24, 8), [100] + [1] * 8)


def test_uncomp_returns_to_its_budget_at_every_step() -> None:
    model = build("llama")

    def check(length: int) -> None:
        for layer in kept(cache):
            assert sorted(map(len, layer)) == [24, 48] and all(h[-8:] == list(range(length - 8, length)) for h in layer)

    cache = KVCache(model, profiled(model, "uncomp").replace("(", "(budget=36, "))
    run_cache(model, cache, prompt(140), [100] + [1] * 20 + [20], check)


def test_uncomp_with_equal_halves_is_snapkv() -> None:
    model, found = build("llama"), []
    for recipe in (profiled(model, "uncomp").replace("(", "(budget=36, high=1.0, "), "snapkv(budget=36, window=8)"):
        cache = KVCache(model, recipe)
        run_cache(model, cache, prompt(100), [100])
        found.append(kept(cache))
    assert found[0] == found[1]


def test_entropy() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=draw)
    assert abs(float(entropy(x, 16)) - 1) < 0.01
    assert abs(float(entropy(torch.randn(4000, 1, generator=draw) * torch.randn(16, generator=draw)))) < 1e-3
    turned = x @ torch.linalg.qr(torch.randn(16, 16, generator=draw)).Q
    uneven = x * torch.arange(1, 17)
    assert float(entropy(uneven)) < float(entropy(x)) and abs(float(entropy(3 * turned) - entropy(x))) < 1e-4
    assert entropy(torch.randn(3, 2, 50, 16, generator=draw)).shape == (3, 2)


def small(model: Any, name: str, budget: object) -> str:
    text = profiled(model, name)
    return (
        text.replace("(", f"(budget={budget!r}{SMALL[name]}, ")
        if "(" in text
        else f"{name}(budget={budget!r}{SMALL[name]})"
    )


@pytest.mark.parametrize("name", NAMES)
def test_exact_while_everything_fits(name: str) -> None:
    model, ids, sizes = build("llama"), prompt(90), [80] + [1] * 10
    want = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    budget = 4000 if name in ("windowkv", "compresskv") else 90  # layers below the mean have room too
    got = run_cache(model, KVCache(model, small(model, name, budget)), ids, sizes)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_freed_and_within_a_budget_in_bytes(name: str) -> None:
    model = build("llama")
    full, few = KVCache(model, "full"), KVCache(model, small(model, name, "40KiB"))
    for cache in (full, few):
        run_cache(model, cache, prompt(400), [400])
    assert 25 * 1024 < few.report().used <= 40 * 1024 < full.report().used


@pytest.mark.parametrize("name", NAMES)
def test_composes_with_a_codec_in_turns(name: str) -> None:
    model, sizes = build("llama"), [150] + [1] * 20 + [20]
    recipe = parse(small(model, name, 96)) | parse("kivi(bits=4, group=16, residual=16)")
    cache, plain = KVCache(model, recipe), KVCache(model, small(model, name, 96))
    for each in (cache, plain):
        assert bool(run_cache(model, each, prompt(190), sizes).isfinite().all())
    assert cache.report().used < 0.8 * plain.report().used


@pytest.mark.parametrize("name", NAMES)
def test_later_turns_and_chunks_are_brought_to_the_budget(name: str) -> None:
    model = build("llama")
    cache = KVCache(model, small(model, name, 64))

    def check(length: int) -> None:
        layers = kept(cache)
        mean = sum(len(head) for layer in layers for head in layer) / sum(map(len, layers))
        assert mean <= min(length, 64) + 8

    run_cache(model, cache, prompt(220), [100, 60, 40, 20], check)


@pytest.mark.parametrize(
    "text",
    [
        "windowkv(task='guess')", "windowkv(shared=0)", "windowkv(budget=16)", "kvcrush(base='tova')", "kvcrush(share=1.0)",
        "kvcrush(anchor='mode')", "kvcrush(block=0)", "task-kv(beta=2.0)", "task-kv(least=0)", "task-kv(budget=100)",
        "compresskv(heads=0)", "compresskv(base=4)", "uncomp(high=2.0)", "uncomp(budget=8)",
    ],
)  # fmt: skip
def test_options(text: str) -> None:
    with pytest.raises(RecipeError):
        parse(text)
