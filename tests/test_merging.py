"""Merging: a placement names who absorbs whom, a merger makes one slot of them, the core writes and frees."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom import CacheError, KVCache, RecipeError, parse
from kvloom.core import portable
from kvloom.core.group import Table
from kvloom.core.recipe import DROP, Away, Policy, Recipe
from kvloom.core.rows import Rows
from kvloom.core.step import Step
from kvloom.policies.budgets import Tokens
from kvloom.policies.mergers import Blend
from tests.families import build, prompt
from tests.reference import run_cache

WEIGHTS = ("mean", "cosine", "softmax", "pivot", "gauss", "mass")


@dataclass(frozen=True)
class Neighbours:
    """The oldest slots leave, into the oldest that stays, or, in odd heads, into the next; with `lose`, every second is lost."""

    lose: bool = False

    moves: tuple[str, ...] = ()
    least: int = 1
    scope: Any = "head"

    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Away:
        order = table.index.argsort(-1).expand(step.heads, -1)
        over = table.n - budget
        slots = order[:, :over].sort(-1).values
        into = order[:, over : over + 2].gather(1, torch.arange(step.heads)[:, None] % 2).expand(-1, over).clone()
        if self.lose:
            into[:, 1::2] = -1
        return Away(slots, DROP, into)


def recipe(budget: int | float = 24, decode: int | None = 4, lose: bool = False) -> Recipe:
    policy = Policy(Tokens(budget), Neighbours(lose=lose), merge=Blend("mean", count="logits"))
    return Recipe("neighbours", {"prompt": policy} | ({"decode": replace(policy, every=decode)} if decode else {}))


def plain(weight: str, sigma: float, x: Tensor, y: Tensor, kx: Tensor, ky: Tensor, mass: list[float]) -> Tensor:
    """One slot x [D] that absorbs y [c, D]; kx, ky: the keys; mass: of x, then of y. Slot by slot."""
    cosine = [float(torch.dot(kx, k) / kx.norm() / k.norm()) for k in ky]
    c = len(y)
    if weight == "mean":
        return (x + sum(y)) / (1 + c)
    if weight == "cosine":
        return (x + sum(u * e for u, e in zip(cosine, y, strict=True))) / (1 + c)
    if weight == "pivot":
        return (x + sum((e + x) / 2 for e in y)) / (1 + c)
    if weight == "softmax":
        w = torch.tensor([1.0, *cosine]).softmax(0)
    elif weight == "gauss":
        w = torch.tensor([1.0, *(float((-((k - kx).norm() ** 2) / 2 / sigma**2).exp()) for k in ky)])
    else:
        w = torch.tensor(mass)
    w = w / w.sum()
    return w[0] * x + sum(a * e for a, e in zip(w[1:], y, strict=True))


@pytest.mark.parametrize("weight", WEIGHTS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), kept=st.integers(1, 5), gone=st.integers(0, 7))
def test_mergers_slot_by_slot(weight: Any, seed: int, kept: int, gone: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    h, d = 2, 4

    def rows(n: int) -> Rows:
        cols = {"mass": torch.rand(h, n, generator=rng) + 0.1}
        return Rows(torch.randn(h, n, d, generator=rng), torch.randn(h, n, d, generator=rng), 0, cols)

    a, b = rows(kept), rows(gone)
    into = torch.randint(-1, kept, (h, gone), generator=rng)
    got = Blend(weight, sigma=2.0)(a, b, into)
    for head in range(h):
        for j in range(kept):
            who = (into[head] == j).nonzero()[:, 0]
            mass = [float(a.cols["mass"][head, j]), *b.cols["mass"][head, who].tolist()]
            for x, y, z in ((a.k, b.k, got.k), (a.v, b.v, got.v)):
                want = plain(weight, 2.0, x[head, j], y[head, who], a.k[head, j], b.k[head, who], mass)
                torch.testing.assert_close(z[head, j], want if len(who) else x[head, j], atol=1e-5, rtol=1e-4)
                assert len(who) or torch.equal(z[head, j], x[head, j])


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("norm", [False, True])
def test_an_exact_double_changes_nothing(weight: Any, norm: bool) -> None:
    x = torch.randn(1, 1, 8)
    one = Rows(x, x + 1, 0, {"mass": torch.ones(1, 1)})
    two = Rows(x.expand(-1, 3, -1), (x + 1).expand(-1, 3, -1), 0, {"mass": torch.ones(1, 3)})
    got = Blend(weight, norm=norm)(one, two, torch.zeros(1, 3, dtype=torch.long))
    torch.testing.assert_close(got.k, one.k)
    torch.testing.assert_close(got.v, one.v)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), rounds=st.integers(1, 3))
def test_counts_add_up_and_means_stay_means(seed: int, rounds: int) -> None:
    """Merging in several rounds gives the mean of all tokens, and the log of how many they are."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2**rounds, 4, generator=rng)
    held, merge = Rows(x, x * 2, 0), Blend("mean", count="logits")
    for _ in range(rounds):
        n = held.n // 2
        a, b = (
            Rows(held.k[:, s], held.v[:, s], 0, {c: y[:, s] for c, y in held.cols.items()})
            for s in (slice(0, n), slice(n, None))
        )
        held = merge(a, b, torch.arange(n)[None])
    torch.testing.assert_close(held.k[:, 0], x.mean(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(held.cols["logw"], torch.full((1, 1), float(rounds)) * torch.tensor(2.0).log())


def test_keys_keep_their_length() -> None:
    a, b = Rows(torch.randn(2, 3, 8), torch.randn(2, 3, 8), 0), Rows(torch.randn(2, 5, 8), torch.randn(2, 5, 8), 0)
    got = Blend("mean", norm=True)(a, b, torch.randint(0, 3, (2, 5)))
    torch.testing.assert_close(got.k.norm(dim=-1), a.k.norm(dim=-1))


def first(cache: KVCache) -> Any:
    return cache.layers[0].rows[0].layer.groups[0].segments["main"]


@pytest.mark.parametrize("sizes", [[60], [40, 20], [30] + [1] * 30, [60] + [1] * 9], ids=str)
def test_every_token_is_counted_for_good(sizes: Sequence[int]) -> None:
    model = build("llama")
    cache, loses = KVCache(model, recipe()), KVCache(model, recipe(lose=True))
    for each in (cache, loses):
        run_cache(model, each, prompt(sum(sizes)), sizes)
        assert first(each).n < 24 + 4
    tokens, fewer = (first(x).column("logw").exp().sum(-1) for x in (cache, loses))
    torch.testing.assert_close(tokens, torch.full((2,), float(sum(sizes))))
    assert bool((fewer < tokens - 8).all())


def test_attention_counts_a_slot_as_its_tokens() -> None:
    """Doubles of one token, merged: what is attended to is what it was."""
    model = build("llama")
    ids = torch.full((1, 40), 7)

    @dataclass(frozen=True)
    class Last(Neighbours):
        def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Away:
            slots = torch.arange(table.n - budget).expand(step.heads, -1)
            return Away(slots, DROP, torch.full_like(slots, table.n - 1))

    x = torch.randn(2, 1, 8).expand(-1, 40, -1)
    policy = Policy(Tokens(1), Last(), merge=Blend("mean", count="logits"))
    from kvloom.core.attention import Logits
    from kvloom.core.layer import Layer
    from kvloom.core.together import together

    site = replace(KVCache(model).layers[0].site, kv_heads=2, q_heads=4, key_dim=8, value_dim=8)
    q = torch.randn(4, 1, 8)
    outs = []
    for one in (Recipe("full"), Recipe("one", {"prompt": policy})):
        layer = Layer(site, one)
        together([layer.forward(torch.randn(4, 40, 8), x, x * 2, Logits(1.0), None, None)])
        outs.append(together([layer.forward(q, x[:, :1] + 1, x[:, :1], Logits(1.0), None, None)])[0])
        n = layer.groups[0].segments["main"].n
    assert n == 2 and ids.shape[1] == 40
    torch.testing.assert_close(outs[1], outs[0], atol=1e-4, rtol=1e-4)


def test_forks_do_not_see_what_the_other_merges() -> None:
    model = build("llama")
    cache = KVCache(model, recipe())
    run_cache(model, cache, prompt(60), [60])
    one, two = (torch.cat([prompt(60), prompt(20, seed=seed)], 1) for seed in (3, 5))
    twin, want = copy.deepcopy(cache), run_cache(model, copy.deepcopy(cache), one, [1] * 20)
    run_cache(model, twin, two, [1] * 20)
    torch.testing.assert_close(run_cache(model, cache, one, [1] * 20), want, atol=1e-5, rtol=1e-5)


def test_state_travels_and_bytes_are_counted() -> None:
    model = build("llama")
    cache, other, full = (KVCache(model, r) for r in (recipe(), recipe(), "full"))
    for each in (cache, full):
        run_cache(model, each, prompt(412), [390] + [1] * 10)
    portable.load(other, portable.dump(cache))
    a, b = (run_cache(model, x, prompt(412), [1] * 12) for x in (cache, other))
    assert torch.equal(a, b)
    site = cache.layers[0].site
    n = first(cache).n
    places = 4 * n * site.kv_heads  # not written down here: what stays is consecutive
    assert cache.report().used == len(cache.layers) * (cache.recipe.nbytes(site, {"main": n}) - places)
    assert cache.nbytes < full.nbytes / 5


def test_crop_is_refused_behind_a_merge() -> None:
    model = build("llama")
    cache = KVCache(model, recipe())
    run_cache(model, cache, prompt(60), [60])
    with pytest.raises(CacheError, match="dropped tokens at length 60"):
        cache.crop(-5)


def test_with_a_codec() -> None:
    """Merged before it freezes; what is encoded is never written to again."""
    model = build("llama")
    with pytest.raises(RecipeError, match="nothing is encoded twice"):
        recipe() | parse("kivi(bits=4, group=8, residual=16)")
    both = recipe(decode=None) | parse("kivi(bits=4, group=8, residual=16)")
    cache = KVCache(model, both)
    out = run_cache(model, cache, prompt(70), [60] + [1] * 10)
    assert first(cache).frozen and bool(out.isfinite().all())
    with pytest.raises(CacheError, match="encoded already"):
        run_cache(model, cache, prompt(90), [20])
