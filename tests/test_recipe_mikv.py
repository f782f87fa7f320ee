"""MiKV (arXiv 2402.18096) against a dense re-implementation, and what it claims over eviction."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvloom import KVCache, RecipeError, parse
from kvloom.core.codec import Exact
from kvloom.segments.balance import Balance
from kvloom.segments.minmax import MinMax
from tests.families import build, prompt
from tests.reference import Mikv, held, kept, layers_of, run, run_cache

SIZES = {
    "decode": [60] + [1] * 25,
    "chunks": [40, 20, 1, 1, 12, 1, 1],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    ("budget", "bits", "group", "interval"), [(0.5, 4, None, 1), (0.25, 2, 8, 7), (0.3, 8, None, 16)]
)
def test_logits_and_classes(sizes: list[int], budget: float, bits: int, group: int | None, interval: int) -> None:
    model, ids = build("llama"), prompt(sum(sizes))
    cache, reference = (
        KVCache(model, f"mikv(budget={budget}, bits={bits}, group={group}, interval={interval})"),
        Mikv(model, budget, bits, group, interval=interval),
    )
    want = run(reference, ids, sizes)
    got = run_cache(model, cache, ids, sizes)
    for i, layer in enumerate(held(cache)):
        for h, classes in enumerate(layer):
            assert classes["low"] == sorted(reference.low[i, h]), f"layer {i}, head {h}"
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)


def test_1_whole_budget_is_the_full_cache() -> None:
    model, ids, sizes = build("llama"), prompt(70), [60] + [1] * 10
    want = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    for recipe in ("mikv(budget=1.0)", "mikv(budget=70)"):
        got = run_cache(model, KVCache(model, recipe), ids, sizes)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_2_balance_leaves_products_alone() -> None:
    """q/b . k*b equals q.k where the inner codec is exact, and read back keys are the keys."""
    codec, const = Balance(Exact()), {"balance": torch.rand(2, 16) * 3 + 0.1}
    q, k = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    block = codec.encode(k, const)
    torch.testing.assert_close(codec.dot(q, block, const, 0.25), 0.25 * q @ k.transpose(1, 2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codec.decode(block, const), k, atol=1e-5, rtol=1e-5)


def test_2_balance_is_the_formula_and_stays() -> None:
    """b = sqrt(max |q| / max |k|) over the first prompt, by KV head and channel; later tokens do not change it."""
    model, ids = build("llama"), prompt(70)
    cache, reference = KVCache(model, "mikv(budget=0.3)"), Mikv(model, 0.3, 2, None)
    run(reference, ids, [50])
    found = []
    run_cache(
        model, cache, ids, [50] + [1] * 20,
        lambda n: found.append([x.groups[0].segments["low"].key.const["balance"].clone() for x in layers_of(cache)]),
    )  # fmt: skip
    for i in range(3):
        want = torch.stack([reference.balance[i, h] for h in range(2)])
        torch.testing.assert_close(found[0][i], want, atol=1e-4, rtol=1e-4)
        assert torch.equal(found[0][i], found[-1][i])


def test_2_zero_channels_are_not_scaled() -> None:
    class Step:
        q = torch.randn(2, 2, 6, 16)

    Step.q[..., 3] = 0
    keys = torch.randn(2, 6, 16)
    keys[..., 5] = 0
    balance = Balance(MinMax(2, None, "channels")).fit(Step, keys)["balance"]  # type: ignore[arg-type]
    assert torch.isfinite(balance).all() and (balance > 0).all()
    assert (balance[:, [3, 5]] == 1).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_3_closer_than_eviction(bits: int) -> None:
    """At equal importance budget and policy, on average over texts."""
    model, sizes = build("llama"), [60] + [1] * 10
    errors = torch.zeros(2)
    for seed in range(4):
        ids = prompt(70, seed=seed)
        want = run_cache(model, DynamicCache(config=model.config), ids, sizes)
        for i, recipe in enumerate((f"mikv(budget=0.3, bits={bits}, group=8)", "h2o(budget=0.3)")):
            errors[i] += (run_cache(model, KVCache(model, recipe), ids, sizes) - want)[60:].square().mean()
    assert errors[0] < 0.7 * errors[1]


def test_4_balance_helps_with_outlier_channels() -> None:
    """2 bits per token: keys with planted outlier channels, queries without; error of the logits."""
    keys, q = torch.randn(2, 80, 32), torch.randn(2, 3, 40, 32)
    keys[..., [4, 20]] *= 25

    class Step:
        pass

    Step.q = q  # type: ignore[attr-defined]
    plain, balanced = MinMax(2, None, "channels"), Balance(MinMax(2, None, "channels"))
    const = balanced.fit(Step, keys)  # type: ignore[arg-type]
    want = q.flatten(1, 2) @ keys.transpose(1, 2)
    errors = [
        (codec.dot(q.flatten(1, 2), codec.encode(keys, const), const, 1.0) - want).square().mean()
        for codec in (plain, balanced)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("sizes", [*SIZES.values(), [1] * 50], ids=[*SIZES, "single tokens"])
def test_5_every_token_is_held(sizes: list[int]) -> None:
    model = build("llama")
    cache = KVCache(model, "mikv(budget=20, interval=5)")

    def check(length: int) -> None:
        assert all(head == list(range(length)) for layer in kept(cache) for head in layer)
        assert all(len(head) <= 24 for layer in kept(cache, ["main"]) for head in layer)

    run_cache(model, cache, prompt(sum(sizes)), sizes, check)


def test_demotion_is_final() -> None:
    model = build("llama")
    cache, before = KVCache(model, "mikv(budget=20, interval=4)"), [[set[int]() for _ in range(2)] for _ in range(3)]

    def check(length: int) -> None:
        for i, layer in enumerate(kept(cache, ["low"])):
            for h, index in enumerate(layer):
                assert before[i][h] <= set(index)
                before[i][h] = set(index)

    run_cache(model, cache, prompt(70), [40] + [1] * 30, check)


def test_options() -> None:
    for wrong in ("budget='1MiB'", "window=2", "window=1.5", "bits=7", "group=9", "interval=0"):
        with pytest.raises(RecipeError):
            parse(f"mikv({wrong})")


@pytest.mark.parametrize("tokens", [1, 25])
def test_a_crop_leaves_heads_with_unequal_classes(tokens: int) -> None:
    """Heads demote different tokens, so after a crop they hold unequally many of a class; none is lost or doubled."""
    model, ids = build("llama"), prompt(80)
    cache = KVCache(model, "mikv(budget=0.3, window=0.0, bits=8)")
    run_cache(model, cache, ids, [60, 1, 1])
    cache.crop(-tokens)
    left = 62 - tokens
    assert all(head == list(range(left)) for layer in kept(cache) for head in layer)
    got = run_cache(model, cache, ids, [1] * 18)
    assert all(head == list(range(left + 18)) for layer in kept(cache) for head in layer)
    assert bool(torch.isfinite(got).all())
