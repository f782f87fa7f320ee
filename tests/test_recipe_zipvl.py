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
from tests.reference import Full, Slots, held, kept, run, run_cache


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


def test_options() -> None:
    for wrong in ("mass=0.0", "gap=10", "window=-1", "bits=5", "recent=2.0"):
        with pytest.raises(RecipeError):
            parse(f"zipvl({wrong})")
