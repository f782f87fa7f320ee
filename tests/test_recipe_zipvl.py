"""ZipVL (arXiv 2410.08584): as many important tokens as a layer's attention asks for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom import KVCache, RecipeError, parse
from kvloom.policies.placements import ByMass
from kvloom.policies.scorers import Probes
from tests.families import build, prompt
from tests.reference import Full, Slots, held, kept, layers_of, run, run_cache


def counts(model: Any, recipe: str, ids: Tensor) -> list[int]:
    cache = KVCache(model, recipe)
    run_cache(model, cache, ids, [ids.shape[1]])
    found = [[len(head.get("high", [])) for head in layer] for layer in held(cache)]
    assert all(len(set(layer)) == 1 for layer in found)
    return [layer[0] for layer in found]


def test_2_more_mass_more_tokens() -> None:
    model, ids = build("llama"), prompt(300)
    found = [counts(model, f"zipvl(mass={mass})", ids) for mass in (0.1, 0.5, 0.9, 0.99)]
    for fewer, more in pairwise(found):
        assert all(a <= b for a, b in zip(fewer, more, strict=True))
    assert sum(found[0]) < sum(found[-1])


def test_2_peaked_needs_few_and_flat_many() -> None:
    place = ByMass(0.9, Probes(), ("high", "low"), 32)
    peaked = torch.full((100,), 0.01)
    peaked[[3, 50]] = 40
    assert place.count(peaked) == 2
    assert place.count(torch.ones(100)) == 90
    assert ByMass(1.0, Probes(), ("high", "low"), 32).count(torch.tensor([1.0, 0.0, 2.0])) == 2


def test_1_all_mass_is_one_class() -> None:
    model, ids = build("llama"), prompt(160)
    assert counts(model, "zipvl(mass=1.0)", ids) == [160] * 3
    many = run_cache(model, KVCache(model, "zipvl(mass=1.0, bits=8)"), ids, [150] + [1] * 10)
    full = run_cache(model, KVCache(model), ids, [150] + [1] * 10)
    assert float((many - full).square().mean()) < 0.02**2 * float(full.var())


def test_3_the_count_is_that_of_the_attention_itself() -> None:
    """With all rows as probes: the tokens of highest mean, as many as hold the mass by their sums."""
    model, ids, n = build("llama"), prompt(200), 200
    cache = KVCache(model, "zipvl(mass=0.8, recent=1.0, random=0.0, window=0)")
    run_cache(model, cache, ids, [n])
    found = held(cache)

    class Mean(Full):
        sums: Tensor

        def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
            self.sums = p.sum((0, 1)) + (self.sums if head else 0)
            if head + 1 == self.config.num_key_value_heads:
                held_ = self.sums.sort(descending=True).values.cumsum(0)
                count = int((held_ < 0.8 * self.sums.sum()).sum()) + 1
                many = min(-(-count // 32), n // 32) * 32
                left = many + (n - many) // 32 * 32
                mean = (self.sums / torch.arange(n, 0, -1))[:left]
                assert found[layer][0]["high"] == sorted(mean.topk(many).indices.tolist())

    run(Mean(model), ids, [n])


def test_4_equal_bits_are_plain_codes() -> None:
    """Which class a token is in changes only the scales that it shares."""
    model, ids, sizes = build("llama"), prompt(210), [200] + [1] * 10
    full = run_cache(model, KVCache(model), ids, sizes)
    errors = [
        float(
            (run_cache(model, KVCache(model, f"zipvl(mass={mass}, bits=8, low_bits=8)"), ids, sizes) - full)
            .square()
            .mean()
        )
        for mass in (0.3, 1.0)
    ]
    assert max(errors) < 0.02**2 * float(full.var())


def test_decoding_and_turns() -> None:
    model, ids = build("llama"), prompt(330)
    cache = KVCache(model, "zipvl(gap=64)")
    got = run_cache(model, cache, ids, [150] + [1] * 80 + [60] + [1] * 40)
    assert bool(torch.isfinite(got).all())
    assert all(head == list(range(330)) for layer in kept(cache) for head in layer)
    assert all(len(head["main"]) < 64 for layer in held(cache) for head in layer)


DROPS = "zipvl(bits=None, low_bits=None"


def test_1_all_mass_drops_nothing() -> None:
    """To the logits of the full cache, while decoding and at a later turn, too."""
    model, ids, sizes = build("llama"), prompt(330), [150] + [1] * 80 + [60] + [1] * 40
    cache, full = KVCache(model, f"{DROPS}, mass=1.0, gap=64)"), run_cache(model, KVCache(model), ids, sizes)
    torch.testing.assert_close(run_cache(model, cache, ids, sizes), full, atol=3e-4, rtol=1e-4)
    assert all(head == list(range(330)) for layer in kept(cache) for head in layer)


@pytest.mark.parametrize("mass", [0.5, 0.8])
def test_dropped_tokens_are_gone(mass: float) -> None:
    """With all rows as probes: the slots and logits of a plain re-implementation, which drops by the attention itself."""
    model, ids, n, window = build("llama"), prompt(212), 200, 16

    class Drops(Full):
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
            self.sums = torch.zeros(n)
            out = super().attend(layer, q, k, v, start)
            if start == 0:
                ranked = self.sums.sort(descending=True).values.cumsum(0)
                count = max(int((ranked < mass * self.sums.sum()).sum()) + 1, window)
                mean = self.sums / torch.arange(n, 0, -1)
                mean[-window:] = torch.inf
                for head in range(len(k)):
                    self.slots[layer, head].keep(mean.topk(count).indices.sort().values)
            return out

        def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
            if p.shape[1] > 1:
                self.sums = self.sums + p.sum((0, 1))

    cache, reference = KVCache(model, f"{DROPS}, mass={mass}, recent=1.0, random=0.0, window={window})"), Drops(model)
    got = run_cache(model, cache, ids, [n] + [1] * 12)
    want = run(reference, ids, [n] + [1] * 12)
    found = kept(cache)
    for (layer, head), s in reference.slots.items():
        assert found[layer][head] == s.index.tolist()
    torch.testing.assert_close(got, want, atol=4e-4, rtol=1e-3)
    sizes = [len(layer[0]) for layer in found]
    assert len(set(sizes)) > 1 and max(sizes) < 212  # layers differ
    site = layers_of(cache)[0].site
    used = sum(
        site.kv_heads * (size * 2 * site.key_dim * 4 + 4 * (size - 12)) for size in sizes
    )  # new ones are in order
    assert cache.report().used - 3 * site.q_heads * site.key_dim * 4 == used  # and the newest query of each layer


def test_dropping_again_while_decoding() -> None:
    """After every `gap` tokens, of those; what stayed before stays. Important tokens may be in few bits."""
    model, ids = build("llama"), prompt(300)
    cache, seen = KVCache(model, f"{DROPS}, gap=64, window=8, mass=0.5)"), {}
    run_cache(model, cache, ids, [100] + [1] * 200, lambda n: seen.update({n: held(cache)}))
    for n in (163, 164, 227, 228):
        for layer, before in zip(seen[n], seen[100], strict=True):
            for head, old in zip(layer, before, strict=True):
                assert set(old["high"]) <= set(head["high"]) and len(head["main"]) == (n - 100) % 64
    assert all(set(range(156, 164)) <= set(head["high"]) for layer in seen[164] for head in layer)
    cache = KVCache(model, "zipvl(low_bits=None, mass=0.6)")
    assert bool(run_cache(model, cache, ids, [200] + [1] * 20).isfinite().all())
    assert all(len(head["high"]) % 32 == 0 and len(head["high"]) < 200 for layer in held(cache) for head in layer)


def test_options() -> None:
    for wrong in ("mass=0.0", "gap=10", "window=-1", "bits=5", "recent=2.0"):
        with pytest.raises(RecipeError):
            parse(f"zipvl({wrong})")
