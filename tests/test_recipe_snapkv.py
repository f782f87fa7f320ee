"""SnapKV (arXiv 2404.14469) against the observation window computed directly."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvloom import KVCache, RecipeError, parse
from tests.families import build, prompt
from tests.reference import Full, Slots, Snap, kept, run, run_cache

LENGTH, STEPS = 70, 15


def spec(capacity: int, window: int, kernel: int, pool: str, interval: object = None) -> str:
    return f"snapkv(budget={capacity}, window={window}, kernel={kernel}, pool={pool!r}, interval={interval})"


class Checked(Snap):
    """Takes over what a cache was seen to keep, if it is a best choice: neighbours under one maximum tie exactly."""

    seen: dict[int, list[list[list[int]]]]

    def choose(self, layer: int, head: int, s: Slots, pooled: torch.Tensor) -> torch.Tensor:
        index = torch.tensor(self.seen[int(s.index[-1]) + 1][layer][head])
        stays = torch.isin(s.index[: len(pooled)], index)
        assert int(stays.sum()) == self.capacity - self.window
        assert pooled[stays].min() >= pooled[~stays].max() - 1e-4, f"layer {layer}, head {head}: not the best"
        return stays.nonzero()[:, 0]


@pytest.mark.parametrize("length", [LENGTH, 34])
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize(("capacity", "window", "kernel"), [(32, 8, 5), (24, 6, 1), (33, 1, 7), (20, 19, 3)])
def test_logits_and_kept_indices(length: int, pool: str, capacity: int, window: int, kernel: int) -> None:
    model, ids, sizes = build("llama"), prompt(length + STEPS), [length] + [1] * STEPS
    cache = KVCache(model, spec(capacity, window, kernel, pool))
    reference = Checked(model, capacity, window, kernel, pool)
    reference.seen = {}
    got = run_cache(model, cache, ids, sizes, lambda n: reference.seen.update({n: kept(cache)}))
    want = run(reference, ids, sizes)
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)
    for i, layer in enumerate(kept(cache)):
        for h, index in enumerate(layer):
            assert index == reference.slots[i, h].index.tolist()
            assert len(index) == capacity + STEPS  # the paper's form never drops while decoding


@pytest.mark.parametrize("length", [32, 20])
def test_1_full_cache_while_it_fits(length: int) -> None:
    """C >= T, with equality too."""
    model, ids, sizes = build("llama"), prompt(length + 10), [length] + [1] * 10
    want = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    got = run_cache(model, KVCache(model, spec(32, 8, 5, "avg")), ids, sizes)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [33, 40, LENGTH])
def test_2_capacity_and_window_after_the_prompt(length: int) -> None:
    model = build("llama")
    cache = KVCache(model, spec(32, 8, 5, "max"))
    run_cache(model, cache, prompt(length), [length])
    for index in (head for layer in kept(cache) for head in layer):
        assert len(index) == 32
        assert index[-8:] == list(range(length - 8, length))


class _Sums(Full):
    """Attention of the last 8 queries, nothing smoothed, nothing dropped."""

    def after(self, layer: int, head: int, s: Slots, q: torch.Tensor, p: torch.Tensor) -> None:
        s.score = p[:, -8:].sum(1).mean(0)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_3_kernel_1_is_plain_top_k(pool: str) -> None:
    model, ids = build("llama"), prompt(LENGTH)
    cache, plain = KVCache(model, spec(32, 8, 1, pool)), _Sums(model)
    run_cache(model, cache, ids, [LENGTH])
    run(plain, ids, [LENGTH])
    for i, layer in enumerate(kept(cache)):
        for h, index in enumerate(layer):
            best = plain.slots[i, h].score[: LENGTH - 8].topk(24).indices.tolist()
            assert index == sorted(best) + list(range(LENGTH - 8, LENGTH))


def test_4_prompt_logits_are_exact() -> None:
    """So the first generated token is the full cache's."""
    model, ids = build("llama"), prompt(LENGTH)
    want = run_cache(model, DynamicCache(config=model.config), ids, [LENGTH])
    got = run_cache(model, KVCache(model, spec(16, 8, 5, "avg")), ids, [LENGTH])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


class _Repeated(Snap):
    """The official form: keys and values repeated to all query heads, one set for each."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
        g = len(q) // len(k)
        return super().attend(layer, q, k.repeat_interleave(g, 0), v.repeat_interleave(g, 0), start)


@pytest.mark.parametrize(("kv_heads", "same"), [(4, True), (2, False)])
def test_4_variant_and_original_agree_without_gqa(kv_heads: int, same: bool) -> None:
    model, ids, sizes = build("llama", num_key_value_heads=kv_heads), prompt(80), [LENGTH] + [1] * 10
    got = run_cache(model, KVCache(model, spec(24, 8, 5, "avg")), ids, sizes)
    want = run(_Repeated(model, 24, 8, 5, "avg"), ids, sizes)
    assert bool((got - want).abs().max() < 3e-4) is same


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize(("length", "interval"), [(LENGTH, 4), (LENGTH, 16), (34, 4)])
def test_decode_settles_by_the_same_rule(length: int, interval: int, pool: str) -> None:
    """While decoding the rule runs again on what is held, neighbours being neighbours in the text order of the slots."""
    capacity, window, kernel = 32, 8, 5

    class Again(Checked):
        def __init__(self) -> None:
            super().__init__(model, capacity, window, kernel, pool)
            self.seen = {}
            self.queries: dict[tuple[int, int], list[torch.Tensor]] = {}

        def after(self, layer: int, head: int, s: Slots, q: torch.Tensor, p: torch.Tensor) -> None:
            newest = (self.queries.setdefault((layer, head), []) + list(q.unbind(1)))[-window:]
            self.queries[layer, head] = newest
            if p.shape[1] > 1:
                return super().after(layer, head, s, q, p)
            if len(s.k) - capacity >= interval:
                rows = torch.stack(newest, 1) @ s.k.T * q.shape[-1] ** -0.5
                place = torch.arange(int(s.index[-1]) + 1 - window, int(s.index[-1]) + 1)
                rows = rows.masked_fill(s.index > place[:, None], -torch.inf).softmax(-1)
                super().after(layer, head, s, q, rows)

    model, ids, sizes = build("llama"), prompt(length + 40), [length] + [1] * 40
    cache, reference = KVCache(model, spec(capacity, window, kernel, pool, interval)), Again()
    got = run_cache(model, cache, ids, sizes, lambda n: reference.seen.update({n: kept(cache)}))
    want = run(reference, ids, sizes)
    for i, layer in enumerate(kept(cache)):
        for h, index in enumerate(layer):
            assert index == reference.slots[i, h].index.tolist(), f"layer {i} head {h}"
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)


def test_options() -> None:
    for wrong in ("window=0", "kernel=4", "kernel=0", "pool='mean'", "interval=0", "budget=10, window=32"):
        with pytest.raises(RecipeError):
            parse(f"snapkv({wrong})")
