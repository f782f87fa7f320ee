"""MPCache: what leaves after the prompt, and what a decoded token reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom import KVCache, RecipeError
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.segment import Kind
from kvloom.core.select import narrowed
from kvloom.core.site import Site
from kvloom.policies.budgets import Tokens
from kvloom.policies.placements import Keep
from kvloom.policies.scorers import Accumulated
from kvloom.policies.selectors import Bounds
from tests.families import build

SITE = Site(4, 8, 4, 2, 16, 16, torch.float32, lambda: None)


def text(n: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (1, n), generator=torch.Generator().manual_seed(seed))


def feed(model: Any, cache: KVCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def plain(q: Tensor, keys: Tensor, coarse: float, fine: float, mix: float, unit: int) -> list[set[int]]:
    """Units that each head reads, cluster by cluster."""
    out = []
    for head in range(len(keys)):
        asked = q[head].sum(0)

        def rank(rows: Tensor, asked: Tensor = asked) -> float:
            bound = mix * rows.max(0).values + (1 - mix) * rows.min(0).values
            return float(asked @ bound)

        n = keys.shape[1] // unit
        wide = [range(2 * i, min(2 * i + 2, n)) for i in range(-(-n // 2))]
        scores = [rank(keys[head, c[0] * unit : (c[-1] + 1) * unit]) for c in wide]
        ends = {0, len(wide) - 1}
        others = sorted(set(range(len(wide))) - ends, key=lambda i: -scores[i])
        most = min(int(coarse * len(wide)) + 2, len(wide))
        opened = [u for i in [*ends, *others[: most - len(ends)]] for u in wide[i]]
        ranked = sorted(set(opened) - {0}, key=lambda u: -rank(keys[head, u * unit : (u + 1) * unit]))
        out.append({0, *ranked[: int(fine * n)]})
    return out


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40), unit=st.sampled_from([1, 2, 4]), coarse=st.floats(0, 1), fine=st.floats(0, 0.99),
    mix=st.floats(0, 1), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_picks_as_plain_code_does(n: int, unit: int, coarse: float, fine: float, mix: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    keys, q = torch.randn(2, n * unit, 16, generator=draw), torch.randn(2, 2, 16, generator=draw)
    bounds = Bounds(coarse, fine, mix, 0, unit)
    picked = bounds.pick(q, bounds.digest(keys.unflatten(1, (n, unit))), SITE)
    assert picked is not None and picked.equal(picked.sort(-1).values)
    assert [set(row) for row in picked.tolist()] == plain(q, keys, coarse, fine, mix, unit)


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_units_of_one_slot_are_exact_top_k(mix: float) -> None:
    """With one key in a cluster both bounds are the key, so the rank is q . k whatever the mix."""
    draw = torch.Generator().manual_seed(1)
    keys, q = torch.randn(2, 50, 16, generator=draw), torch.randn(2, 3, 16, generator=draw)
    bounds = Bounds(1.0, 0.2, mix, 0, 1)
    picked = bounds.pick(q, bounds.digest(keys[:, :, None]), SITE)
    assert picked is not None
    scores = torch.einsum("hgd,hnd->hn", q, keys)
    scores[:, 0] = torch.inf
    assert picked.equal(scores.topk(11).indices.sort(-1).values)


def test_a_decoded_token_attends_to_what_was_picked() -> None:
    model = build("llama")
    cache = KVCache(model, "mpcache(budget=1.0, coarse=0.5, fine=0.2, skip=0, unit=4)")
    feed(model, cache, text(90))
    group = next(cache.managed()).rows[0].layer.groups[0]
    draw = torch.Generator().manual_seed(3)
    sets = []
    for _ in range(2):
        q = torch.randn(2, 2, 16, generator=draw) * 3
        seen = narrowed(group, q, SITE).segments["main"]
        whole = group.segments["main"]
        assert whole.n == 90 and 20 < seen.n < 40  # a fifth of 22 units, the first, and the last two slots
        for head in range(2):
            at = seen.index.expand(2, -1)[head].long()
            assert torch.equal(seen.key.dense(0, seen.n)[head], whole.key.dense(0, 90)[head, at])
            assert torch.equal(seen.value.dense(0, seen.n)[head], whole.value.dense(0, 90)[head, at])
            assert 89 in at
        sets.append(seen.index)
    assert not sets[0].equal(sets[1])


def test_lossless_equals_the_full_cache() -> None:
    model, ids = build("llama"), text(70)
    with torch.no_grad():
        want = model.generate(ids, max_new_tokens=30, do_sample=False)
        cache = KVCache(model, "mpcache(budget=1.0, coarse=1.0, fine=1.0)")
        assert model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False).equal(want)


def test_the_prompt_loses_its_share_and_decoding_nothing() -> None:
    """The kept set is that of the last fifth's attention, the same in all heads; later turns are cut the same way."""
    model, ids = build("llama"), text(100)
    full = KVCache(model, "full")
    cache = KVCache(model, "mpcache(budget=0.4, unit=4)")
    seen: dict[int, Tensor] = {}
    from kvloom.core.update import watched

    with watched(lambda layer, q, *_: seen.setdefault(layer, q)):
        feed(model, full, ids)
    feed(model, cache, ids)
    for layer, held in zip(full.managed(), cache.managed(), strict=True):
        keys = layer.rows[0].layer.groups[0].segments["main"].key.dense(0, 100)
        s = torch.einsum("hgqd,hnd->hgqn", seen[layer.site.layer][0].unflatten(0, (2, 2)), keys) * 16**-0.5
        s = s.masked_fill(torch.ones(100, 100).triu(1).bool(), -torch.inf).softmax(-1)
        want = s[:, :, -20:].sum(2).mean((0, 1)).topk(40).indices.sort().values
        for group in held.rows[0].layer.groups:
            assert all(row.long().equal(want) for row in group.segments["main"].index)
    for i in range(30):
        feed(model, cache, text(1, 100 + i))
    assert all(g.n == 70 for layer in cache.managed() for g in layer.rows[0].layer.groups)
    feed(model, cache, text(50, 7))
    assert all(g.n == int(0.4 * 150) for layer in cache.managed() for g in layer.rows[0].layer.groups)


def test_what_is_remembered_follows_forks_and_crops() -> None:
    """A cache that was forked, cropped or put together anew goes on as one that was not."""
    model = build("llama")
    cache = KVCache(model, "mpcache(budget=1.0, coarse=0.3, fine=0.1, skip=0, unit=4)")
    feed(model, cache, text(80))
    steps = [text(1, 50 + i) for i in range(12)]
    twin = copy.deepcopy(cache)
    want = [feed(model, cache, step) for step in steps]
    assert all(torch.equal(a, feed(model, twin, step)) for a, step in zip(want, steps, strict=True))
    cache.crop(-6)
    assert all(torch.allclose(a, feed(model, cache, s), atol=1e-5) for a, s in zip(want[6:], steps[6:], strict=True))


def test_bytes_count_the_bounds() -> None:
    model = build("llama")
    cache = KVCache(model, "mpcache(budget=1.0, unit=8) | kivi(bits=4, group=8, residual=16)")
    feed(model, cache, text(81))
    digests = [e for e in cache.report().entries if e.segment == "digest" or e.plane == "digest"]
    assert sum(e.nbytes for e in digests) == 3 * 2 * 10 * 2 * 16 * 4  # layers, heads, units, bounds, channels, fp32


@pytest.mark.parametrize("wrong", ["coarse=1.5", "fine=-0.1", "mix='a'", "skip=-1", "unit=0", "budget=0"])
def test_bad_options(wrong: str) -> None:
    with pytest.raises(RecipeError, match=wrong.split("=")[0]):
        KVCache(build("llama"), f"mpcache({wrong})")


def test_counting_all_attention_is_refused() -> None:
    policy = Policy(Tokens(32), Keep(), Accumulated())
    recipe = Recipe("both", {"decode": policy}, {"main": Kind(select=Bounds())})
    with pytest.raises(RecipeError, match="only a selection"):
        KVCache(build("llama"), recipe)
