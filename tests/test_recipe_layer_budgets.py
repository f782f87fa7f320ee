"""CAKE and PrefixKV: one budget divided among layers, against plain re-implementations."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom import KVCache, RecipeError
from kvloom.core.update import watched
from kvloom.lab.measure import NANO, load_model
from tests.families import prompt, subject
from tests.modes import MODES
from tests.reference import Full, held, kept, layers_of, run, run_cache
from tests.test_portable import carried, go_on

SMALL = ("cake(budget=24, window=4)", "prefixkv(budget=0.4)")


class Attention(Full):
    """Remembers the attention of the prompt, [layer][head] of [g, m, n]."""

    def after(self, layer: int, head: int, s: Any, q: Tensor, p: Tensor) -> None:
        self.seen = getattr(self, "seen", {})
        self.seen[layer, head] = p


def looked(model: Any, ids: Tensor) -> dict[tuple[int, int], Tensor]:
    method = Attention(model)
    run(method, ids, [ids.shape[1]])
    return method.seen


def cake(p: dict[tuple[int, int], Tensor], budget: int, w: int, gamma: float, layers: int) -> list[list[list[int]]]:
    """What CAKE keeps if all layers are cut once, after the last, one head and one number at a time."""
    wish = []
    for i in range(layers):
        entropy = variance = 0.0
        for h in range(2):
            a = p[i, h][:, -w:, :-w].double()
            entropy += float(-(a * (a + 1e-10).log()).sum())
            variance += float(a.var(1, unbiased=True).sum())
        wish.append(entropy * variance)
    sizes = [int(x / sum(wish) * (budget - w) * layers) for x in wish]
    at = 0
    while sum(sizes) < (budget - w) * layers:
        sizes[at % layers] += 1
        at += 1
    found = []
    for i, size in enumerate(sizes):
        heads = []
        for h in range(2):
            a = p[i, h][:, -w:].double()
            u = (a.mean(1) + gamma * a.var(1, unbiased=True))[:, :-w]
            pooled = torch.nn.functional.pad(u, (2, 2)).unfold(-1, 5, 1).mean(-1).mean(0)
            n = a.shape[-1]
            heads.append(sorted([*pooled.topk(size).indices.tolist(), *range(n - w, n)]))
        found.append(heads)
    return found


def test_the_cascade_ends_as_one_cut_after_the_last_layer() -> None:
    model, ids = subject("llama"), prompt(120)
    want = cake(looked(model, ids), 40, 8, 200.0, 3)
    cache = KVCache(model, "cake(budget=40, window=8)")
    run_cache(model, cache, ids, [120])
    assert kept(cache) == want
    assert sum(len(heads[0]) for heads in want) == 3 * 40
    assert all("score" not in s.cols for layer in layers_of(cache) for g in layer.groups for s in g)


def test_memory_is_bounded_while_the_prompt_is_read() -> None:
    """Never more than the budget of all layers and one layer in full; others' methods hold all layers in full."""
    model, ids, peaks = subject("llama", num_hidden_layers=6, max_position_embeddings=1024), prompt(600), {}
    for recipe in ("cake(budget=60, window=8)", "prefixkv(budget=0.1)"):
        cache, seen = KVCache(model, recipe), []
        row = 2 * 16 * 2 * 4  # bytes of a token in one layer

        def look(*_: Any, cache: KVCache = cache, seen: list[int] = seen) -> None:
            slots = sum(e.nbytes for e in cache.report().entries if e.plane in ("key", "value"))
            seen.append(slots)

        with watched(look):
            run_cache(model, cache, ids, [600])
        peaks[recipe] = [x / row for x in seen]
        assert peaks[recipe][-1] == 6 * 60
    cascade, late = peaks.values()
    assert max(cascade) <= 6 * 60  # a layer's own tokens have been cut by the time it is looked at
    assert max(late) == 5 * 600  # before the last one settles


def prefixes(p: dict[tuple[int, int], Tensor], budget: int, layers: int) -> list[int]:
    """How many tokens each layer keeps by PrefixKV's rule, from a fine table of shares."""
    curves = []
    for i in range(layers):
        s = torch.stack([p[i, h].double().sum(1).mean(0) for h in range(2)]).mean(0)
        curves.append(s.sort(descending=True).values.cumsum(0) / s.sum())
    n = len(curves[0])
    best: list[int] = []
    for share in torch.linspace(0, 1, 5001):
        sizes = [min(n, int((c < share).sum()) + 1 + 2) for c in curves]
        if sum(sizes) <= budget * layers:
            best = sizes
    return best


def test_prefixes_of_one_share() -> None:
    model, ids = subject("llama"), prompt(120)
    p = looked(model, ids)
    want = prefixes(p, 48, 3)
    cache = KVCache(model, "prefixkv(budget=0.4)")
    run_cache(model, cache, ids, [120])
    got = [len(heads[0]) for heads in kept(cache)]
    assert sum(got) == 3 * 48 and all(abs(a - b) <= 3 for a, b in zip(got, want, strict=True))
    assert len(set(got)) > 1
    for i, heads in enumerate(kept(cache)):
        s = torch.stack([p[i, h].sum(1).mean(0) for h in range(2)]).mean(0)
        s[0] = s[-1] = torch.inf
        assert heads[0] == heads[1] == sorted(s.topk(got[i]).indices.tolist())


def test_more_budget_never_shortens_a_prefix() -> None:
    model, ids, sizes = subject("llama"), prompt(120), []
    for budget in (0.2, 0.4, 0.6, 0.8):
        cache = KVCache(model, f"prefixkv(budget={budget})")
        run_cache(model, cache, ids, [120])
        sizes.append([len(heads[0]) for heads in kept(cache)])
    for less, more in pairwise(sizes):
        assert all(a <= b for a, b in zip(less, more, strict=True))


def test_prefixkv_decodes_at_a_fixed_place() -> None:
    """One slot leaves for each that is too many: the one that stands 25 before the end of what was kept of the prompt."""
    model, ids = subject("llama"), prompt(160)
    cache = KVCache(model, "prefixkv(budget=0.4)")
    run_cache(model, cache, ids, [120])
    share = [len(heads[0]) / 120 for heads in kept(cache)]
    texts = [list(heads[0]) for heads in kept(cache)]
    first = [len(t) for t in texts]
    for token in range(120, 160):
        run_cache(model, cache, ids, [1])
        for i, text in enumerate(texts):
            text.append(token)
            if len(text) - (token + 1) * share[i] >= 1 - 1e-2:
                text.pop(first[i] - 25 if first[i] - 25 >= 1 else len(text) // 2)
            assert len(text) <= (token + 1) * share[i] + 1
        assert [heads[0] for heads in kept(cache)] == texts


def test_cake_holds_its_sizes_while_decoding() -> None:
    model, ids = subject("llama"), prompt(180)
    cache = KVCache(model, "cake(budget=40, window=8)")
    run_cache(model, cache, ids, [120])
    sizes = [len(heads[0]) for heads in kept(cache)]
    run_cache(model, cache, ids, [1] * 30 + [20] + [1] * 10)
    after = [len(heads[0]) for heads in kept(cache)]
    assert sum(sizes) == sum(after) == 120
    assert all(set(range(172, 180)) <= set(heads[0]) for heads in kept(cache))
    short = KVCache(model, "cake(budget=40, window=8)")  # a prompt that fits: the same bound while decoding
    run_cache(model, short, ids, [30] + [1] * 40)
    assert [len(heads[0]) for heads in kept(short)] == [40, 40, 40]


def test_layers_that_differ_beat_layers_alike() -> None:
    """At 10 % of the slots, on the bundled model."""
    model, tokenizer = load_model("nano")
    text = (NANO.parent / "text" / "gutenberg.txt").read_text(encoding="utf-8")[30000:40000]
    ids, lost, full = tokenizer(text, return_tensors="pt").input_ids[:, :1240], [], torch.zeros(())
    for recipe in ("full", "cake(budget=0.1)", "cake(budget=0.1, tau1=1e8, tau2=1e8)"):
        cache = KVCache(model, recipe)
        got = run_cache(model, cache, ids, [1200] + [1] * 40)[1200:].log_softmax(-1)
        full = full if lost else got
        lost.append(float((full.exp() * (full - got)).sum(-1).mean()))
    assert 0 < lost[1] < lost[2]


@pytest.mark.parametrize("recipe", ["cake(budget=200)", "prefixkv(budget=1.0)", "prefixkv(budget=200)"])
def test_with_room_for_all_it_is_the_full_cache(recipe: str) -> None:
    model, ids = subject("llama"), prompt(110)
    sizes = [60] + [1] * 20 + [20] + [1] * 10
    want = run_cache(model, KVCache(model, "full"), ids, sizes)
    torch.testing.assert_close(run_cache(model, KVCache(model, recipe), ids, sizes), want, atol=3e-4, rtol=0)


@pytest.mark.parametrize("recipe", SMALL)
@pytest.mark.parametrize("mode", ["padded", "beams", "assisted", "chunkedpadded", "turns"])
def test_ways_of_running(recipe: str, mode: str) -> None:
    model = subject("llama")
    found = [MODES[mode](model, model, lambda m: KVCache(m, recipe)) for _ in range(2)]
    for x in found[0].logits:
        assert bool(torch.isfinite(x).all())
    for a, b in zip(found[0].tokens, found[1].tokens, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", [f"{small} | kivi(bits=4, group=16, residual=16)" for small in SMALL])
def test_with_a_codec(recipe: str) -> None:
    """Nothing is encoded before all layers have been cut, no slot is lost or doubled, and the state can be carried."""
    from kvloom.core import portable

    model, ids = subject("llama"), prompt(200)
    cache, fresh = KVCache(model, recipe), KVCache(model, recipe)
    run_cache(model, cache, ids, [120])
    assert sum(len(heads[0]) for heads in kept(cache)) == 3 * (24 if "cake" in recipe else 48)
    run_cache(model, cache, ids, [1] * 40)
    for layer in held(cache):
        for head in layer:
            every = [i for index in head.values() for i in index]
            assert len(every) == len(set(every)) and every
    portable.load(fresh, carried(portable.dump(cache)))
    assert torch.equal(go_on(fresh, model), go_on(cache, model))


@pytest.mark.parametrize(
    "recipe",
    ["cake(window=1)", "cake(budget=8)", "cake(kernel=4)", "cake(tau1=0)", "cake(gamma=-1)", "cake(interval=0)"]
    + [
        "prefixkv(budget='1MiB')",
        "prefixkv(start=-1)",
        "prefixkv(protect=0)",
        "prefixkv(distance=-2)",
        "prefixkv(budget=2)",
    ],
)
def test_impossible_options_are_refused(recipe: str) -> None:
    with pytest.raises(RecipeError):
        KVCache(subject("llama"), recipe)
