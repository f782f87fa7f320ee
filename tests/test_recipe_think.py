"""ThinK (arXiv 2407.21018) against zero-filled keys with dense masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom import KVCache, RecipeError, parse
from kvloom.core.codec import Exact
from kvloom.core.site import Site
from kvloom.segments.minmax import MinMax
from kvloom.segments.prune import Prune
from tests.families import build, prompt
from tests.reference import Full, Slots, layers_of, run, run_cache

SIZES = {"decode": [60] + [1] * 30, "chunks": [40, 9, 1, 33, 1, 1], "short": [8] + [1] * 60}


class Think(Full):
    """One head at a time: after the first forward a mask; keys older than `recent` are multiplied by it."""

    def __init__(self, model: Any, ratio: float, recent: int, window: int) -> None:
        super().__init__(model)
        self.ratio, self.recent, self.window = ratio, recent, window
        self.mask: dict[tuple[int, int], Tensor] = {}

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        dim = q.shape[-1]
        if (layer, head) not in self.mask:
            score = (q[:, -self.window :] ** 2).mean((0, 1)) * (s.k**2).mean(0)
            mask = torch.ones(dim)
            mask[score.argsort()[: int(self.ratio * dim + 1e-9)]] = 0
            self.mask[layer, head] = mask
        old = max(0, len(s.k) - self.recent)
        s.k = torch.cat([s.k[:old] * self.mask[layer, head], s.k[old:]])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("ratio", "recent", "window"), [(0.4, 32, 32), (0.5, 0, 8), (0.0, 0, 1)])
def test_2_logits_equal_zero_filled_keys(sizes: list[int], ratio: float, recent: int, window: int) -> None:
    model, ids = build("llama"), prompt(sum(sizes))
    want = run(Think(model, ratio, recent, window), ids, sizes)
    got = run_cache(model, KVCache(model, f"think(ratio={ratio}, recent={recent}, window={window})"), ids, sizes)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_1_nothing_pruned_is_the_base(sizes: list[int]) -> None:
    model, ids = build("llama"), prompt(sum(sizes))
    want = run_cache(model, KVCache(model), ids, sizes)
    torch.testing.assert_close(
        run_cache(model, KVCache(model, "think(ratio=0.0)"), ids, sizes), want, atol=3e-4, rtol=0
    )
    assert torch.equal(run_cache(model, KVCache(model, "think(ratio=0.9, recent=200)"), ids, sizes), want)


def planted(n: int, dim: int, quiet: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries whose last channels are small where keys are large."""
    draw = torch.Generator().manual_seed(seed)
    q, k = torch.randn(1, 2, 40, dim, generator=draw), torch.randn(1, n, dim, generator=draw)
    q[..., dim - quiet :] *= 0.05
    k[..., dim - quiet :] *= 3
    return q, k


@pytest.mark.parametrize("seed", range(5))
def test_3_less_error_than_random_or_key_norms(seed: int) -> None:
    q, k = planted(100, 32, 12, seed)

    class Asked:
        pass

    step: Any = Asked()
    step.q = q
    codec = Prune(Exact(), 0.375)

    def error(order: Tensor) -> float:
        const = {"order": order}
        dots = codec.dot(q[:, :, -32:].flatten(1, 2), codec.encode(k, const), const, 1.0)
        return float((dots - q[:, :, -32:].flatten(1, 2) @ k.transpose(1, 2)).norm())

    own = error(codec.fit(step, k)["order"])
    draw = torch.Generator().manual_seed(seed)
    assert own < error(torch.randperm(32, generator=draw)[None])
    assert own < error(k.norm(dim=1).argsort(-1, descending=True))


def test_4_and_5_newest_keys_whole_and_bytes() -> None:
    model, ids = build("llama"), prompt(90)
    cache, full = KVCache(model, "think(ratio=0.4, recent=20)"), KVCache(model)
    for each in (cache, full):
        run_cache(model, each, ids, [70] + [1] * 20)
    dim = model.config.hidden_size // model.config.num_attention_heads
    for layer, other in zip(layers_of(cache), layers_of(full), strict=True):
        mine, its = (x.groups[0].segments["main"] for x in (layer, other))
        assert mine.key.frozen == 70
        if layer.site.layer == 0:  # further up, keys are those of other hidden states
            assert torch.equal(mine.key.dense(70, 90), its.key.dense(70, 90))
        width = dim - int(0.4 * dim)
        assert mine.key.runs[0].fields["x"].view.shape == (2, 70, width)
    entries = cache.report().by("segment", "plane", "field")
    layers = model.config.num_hidden_layers
    assert entries["main", "key", "x"] == layers * 2 * 70 * (dim - int(0.4 * dim)) * 4
    assert entries["main", "key", "exact"] == layers * 2 * 20 * dim * 4
    assert entries["main", "constant", "order"] == layers * 2 * dim * 2
    assert cache.report().used < full.report().used


@pytest.mark.parametrize("uneven", [False, True])
def test_after_a_placement_the_keys_that_stay_decide(uneven: bool) -> None:
    """Reduced over what survives: as computed by hand from what a cache of the placement alone holds."""
    model, ids = build("llama"), prompt(80)
    place = "adakv(budget=24, window=8)" if uneven else "snapkv(budget=24, window=8)"
    both, alone = KVCache(model, f"{place} | think(ratio=0.5, recent=4, window=8)"), KVCache(model, place)
    for each in (both, alone):
        run_cache(model, each, ids, [80])
    layer, other = layers_of(both)[0], layers_of(alone)[0]
    q = other.recent.view[:, -8:].unflatten(0, (2, -1))
    for group, its in zip(layer.groups, other.groups, strict=True):
        keys, asked = its.segments["main"].key.dense(0, its.n), its.pick(q)
        score = (asked**2).mean((1, 2)) * (keys**2).mean(1)
        order = group.segments["main"].key.const["order"].long()
        assert torch.equal(order[:, :8].sort(-1).values, score.topk(8, -1).indices.sort(-1).values)
    logits = run_cache(model, both, prompt(120, seed=4), [1] * 30 + [10])
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize(
    "text", ["think | kivi(bits=8, group=8, residual=16)", "kivi(bits=8, group=8, residual=16) | think"]
)
def test_channels_that_stay_in_few_bits(text: str) -> None:
    model, ids, sizes = build("llama"), prompt(100), [70] + [1] * 30
    cache, wide = KVCache(model, text), KVCache(model, "think(recent=32)")
    for each in (cache, wide):
        run_cache(model, each, ids, sizes)
    assert isinstance(cache.recipe.kinds["main"].key, Prune)
    got, want = (layers_of(each)[0].groups[0].segments["main"].key.dense(0, 64) for each in (cache, wide))
    torch.testing.assert_close(got, want, atol=0.02 * float(want.abs().max()), rtol=0)
    assert cache.report().used < 0.7 * wide.report().used
    assert layers_of(cache)[0].groups[0].segments["main"].key.frozen == 64


def test_computes_on_the_channels_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding never makes keys of full width."""
    model, ids = build("llama"), prompt(90)
    cache = KVCache(model, "think(recent=8)")
    run_cache(model, cache, ids, [70])
    monkeypatch.setattr(Prune, "_wide", lambda *_: pytest.fail("keys were widened"))
    run_cache(model, cache, ids, [1] * 5)


def test_options() -> None:
    for wrong in ("ratio=1.0", "ratio=-0.1", "recent=-1", "window=0", "ratio=True"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            parse(f"think({wrong})")
    with pytest.raises(RecipeError, match="both think and think"):
        parse("think | think")
    site = Site(0, 1, 2, 2, 64, 64, torch.float32, lambda: None)
    assert parse("think(recent=0)").nbytes(site, {"main": 100}) == 2 * 100 * (64 - 25 + 64) * 4
    assert Prune(MinMax(2, 32, "tokens"), 0.4).width(128) == 77
