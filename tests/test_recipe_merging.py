"""Chelsea (arXiv 2506.11418), EMS (2412.08521), KVMerger (2407.08454).

Each beside a plain re-implementation, token by token: the same slots, the same merged keys, the same logits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from kvloom import KVCache, RecipeError, parse
from kvloom.core.attention import Logits
from kvloom.core.layer import Layer
from kvloom.core.together import together
from kvloom.lab.measure import load_model
from kvloom.lab.tasks import Kit
from tests.families import build, prompt
from tests.reference import Full, Slots, kept, layers_of, run, run_cache

SIZES = {
    "decode": [48] + [1] * 12,
    "single tokens": [1] * 40,
    "chunks and turns": [30, 20, 1, 1, 1, 12, 1, 1],
}


def compare(recipe: str, reference: Full, sizes: Sequence[int]) -> None:
    """The same logits, and the same slots in every layer and head."""
    model, ids = reference.model, prompt(sum(sizes))
    cache = KVCache(model, recipe)
    want = run(reference, ids, sizes)
    got = run_cache(model, cache, ids, sizes)
    for i, layer in enumerate(kept(cache)):
        for h, index in enumerate(layer):
            assert index == reference.slots[i, h].index.tolist(), f"layer {i}, head {h}"
    torch.testing.assert_close(got, want, atol=4e-4, rtol=1e-3)


class Merging(Full):
    """Slots that stand for several tokens. `score` is the log of how many, added to the logits, unless a method says otherwise."""

    def __init__(self, model: Any, budget: int, interval: int) -> None:
        super().__init__(model)
        self.budget, self.interval = budget, interval

    def due(self, s: Slots, p: Tensor) -> bool:
        prefill = p.shape[1] > 1 or len(s.k) == 1
        return len(s.k) - self.budget >= (1 if prefill else self.interval)


class Clustered(Merging):
    """Rounds of matching every second slot of a chunk with the most similar of the others; means by tokens."""

    def __init__(self, model: Any, budget: int, interval: int, chunk: int, sinks: int, window: int) -> None:
        super().__init__(model, budget, interval)
        self.chunk, self.sinks, self.window = chunk, sinks, window

    def bias(self, layer: int, head: int, s: Slots) -> Tensor:
        return s.score

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        if not self.due(s, p):
            return
        n = len(s.k)
        members = [[i] for i in range(self.sinks, n - self.window)]
        size = s.score.exp()
        while len(members) + self.sinks + self.window > self.budget:
            mean = [(s.k[m] * size[m, None]).sum(0) / size[m].sum() for m in members]
            edges = []
            for start in range(0, len(members), self.chunk):
                place = range(start, min(start + self.chunk, len(members)))
                a, b = [i for i in place if (i - start) % 2 == 0], [i for i in place if (i - start) % 2 == 1]
                for i in a if b else []:
                    to = max(b, key=lambda j: float(F.cosine_similarity(mean[i], mean[j], dim=0)))
                    edges.append((float(F.cosine_similarity(mean[i], mean[to], dim=0)), i, to))
            edges.sort(reverse=True)
            for _, i, to in edges[: len(members) + self.sinks + self.window - self.budget]:
                members[to] = members[to] + members[i]
                members[i] = []
            members = [m for m in members if m]
        k, v, logn = s.k.clone(), s.v.clone(), s.score.clone()
        for m in members:
            for x, y in ((k, s.k), (v, s.v)):
                x[m[0]] = (y[m] * size[m, None]).sum(0) / size[m].sum()
            logn[m[0]] = size[m].sum().log()
        s.k, s.v, s.score = k, v, logn
        s.keep(torch.tensor(sorted([*range(self.sinks), *(m[0] for m in members), *range(n - self.window, n)])))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("budget", "chunk", "interval"), [(16, 6, 1), (20, 64, 4)])
def test_chelsea_clusters(sizes: list[int], budget: int, chunk: int, interval: int) -> None:
    recipe = f"chelsea(budget={budget}, chunk={chunk}, sinks=2, window=6, interval={interval})"
    compare(recipe, Clustered(build("llama"), budget, interval, chunk, 2, 6), sizes)


def _layer(recipe: str, x: Tensor, q: Tensor, heads: int = 2) -> tuple[Tensor, Layer]:
    """What a query [4, 1, D] sees behind the keys (and twice them as values) x [h, n, D]."""
    cache = KVCache(build("llama"), recipe)
    layer = Layer(cache.layers[0].site, cache.recipe)
    n = x.shape[1]
    together([layer.forward(torch.randn(4, n, x.shape[-1]), x, x * 2, Logits(0.3), None, None)])
    new = torch.zeros(heads, 1, x.shape[-1])
    return together([layer.forward(q, new, new, Logits(0.3), None, None)])[0], layer


def test_chelsea_counts_every_token_and_doubles_cost_nothing() -> None:
    """Chunks of one key and value: attention over half of the slots, and over a few, equals attention over all."""
    x = torch.randn(2, 8, 16).repeat_interleave(8, 1)
    q = torch.randn(4, 1, 16)
    want, _ = _layer("full", x, q)
    for budget in (32, 16, 8):
        got, layer = _layer(f"chelsea(budget={budget}, chunk=8, sinks=0, window=0)", x, q)
        segment = layer.groups[0].segments["main"]
        assert segment.n == budget + 1
        torch.testing.assert_close(segment.column("logw").exp().sum(-1), torch.full((2,), 65.0))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    without, _ = _layer("kvmerger(budget=9, newest=0.0, best=0.0, count=None)", x, q)
    assert float((without - want).abs().max()) > 1e-3  # without the count it is something else


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_chelsea_token_counts_never_change(sizes: list[int]) -> None:
    model = build("llama")
    cache = KVCache(model, "chelsea(budget=24, chunk=8, sinks=2, window=4, interval=3)")

    def check(length: int) -> None:
        for layer in layers_of(cache):
            segment = layer.groups[0].segments["main"]
            logw = segment.column("logw")
            total = float(segment.n) if logw is None else logw.exp().sum(-1)
            torch.testing.assert_close(torch.as_tensor(total).expand(2), torch.full((2,), float(length)))

    run_cache(model, cache, prompt(sum(sizes)), sizes, check)


class EvictMerge(Merging):
    """Global and local attention at one mean; the next best go into the most similar kept slot, above a threshold."""

    def __init__(self, model: Any, budget: int, interval: int, window: int, merge: float, threshold: float) -> None:
        super().__init__(model, budget, interval)
        self.window, self.merge, self.threshold = window, merge, threshold
        self.recent: dict[tuple[int, int], Tensor] = {}

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        s.score = s.score + p.sum((0, 1))
        seen = self.recent.get((layer, head), q[:, :0])
        q = self.recent[layer, head] = torch.cat([seen, q], 1)[:, -self.window :]
        if not self.due(s, p):
            return
        place = torch.arange(int(s.index[-1]) + 1 - q.shape[1], int(s.index[-1]) + 1)
        logits = (q @ s.k.T * q.shape[-1] ** -0.5).masked_fill(s.index > place[:, None], -torch.inf)
        old = s.index <= s.index[-1] - self.window
        far, near = s.score * old, logits.softmax(-1).sum((0, 1)) * old
        score = (far + near * far.mean() / near.mean()).masked_fill(~old, torch.inf)
        ranked = score.argsort(descending=True).tolist()
        stay, gone = ranked[: self.budget], ranked[self.budget :]
        groups: dict[int, list[int]] = {}
        for i in gone[: max(1, int(self.merge * self.budget))]:
            alike = [
                max(0.0, float(F.cosine_similarity(s.k[i], s.k[j], dim=0)))
                * max(0.0, float(F.cosine_similarity(s.v[i], s.v[j], dim=0)))
                for j in stay
            ]
            if max(alike) >= self.threshold and max(alike) > 0:
                groups.setdefault(stay[alike.index(max(alike))], []).append(i)
        k, v, mass = s.k.clone(), s.v.clone(), s.score.clone()
        for j, members in groups.items():
            m = [j, *members]
            w = s.score[m] / s.score[m].sum()
            mean = (w[:, None] * s.k[m]).sum(0)
            k[j], v[j] = mean / mean.norm() * s.k[j].norm(), (w[:, None] * s.v[m]).sum(0)
            mass[j] = s.score[m].sum()
        s.k, s.v, s.score = k, v, mass
        s.keep(torch.tensor(sorted(stay)))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("merge", "threshold", "interval"), [(1.0, 0.1, 1), (0.3, 0.0, 5)])
def test_ems_evicts_then_merges(sizes: list[int], merge: float, threshold: float, interval: int) -> None:
    recipe = f"ems(budget=24, window=6, merge={merge}, threshold={threshold}, interval={interval})"
    compare(recipe, EvictMerge(build("llama"), 24, interval, 6, merge, threshold), sizes)


def test_ems_keeps_the_length_of_keys() -> None:
    """Of every kept key, whatever was merged into it."""
    model = build("llama")
    keys = {}
    for name in ("full", "ems(budget=24, window=6, threshold=0.0)"):
        cache = KVCache(model, name)
        run_cache(model, cache, prompt(80), [80])
        keys[name] = layers_of(cache)[0].groups[0].segments["main"]
    full, ems = keys.values()
    want = full.key.dense(0, 80).norm(dim=-1).gather(1, ems.index.long())
    got = ems.key.dense(0, 24)
    torch.testing.assert_close(got.norm(dim=-1), want)
    assert float((got - full.key.dense(0, 80)[torch.arange(2)[:, None], ems.index.long()]).abs().max()) > 0.01


class Runs(Merging):
    """The most similar neighbours of a layer are joined into runs; Gaussian weights round the most attended slot."""

    def __init__(self, model: Any, budget: int, interval: int, sigma: float, newest: float, best: float) -> None:
        super().__init__(model, budget, interval)
        self.sigma, self.newest, self.best = sigma, newest, best
        self.eps: float | None = None
        self.logn: dict[tuple[int, int], Tensor] = {}

    def bias(self, layer: int, head: int, s: Slots) -> Tensor:
        logn = self.logn.get((layer, head), torch.zeros(0))
        return F.pad(logn, (0, len(s.k) - len(logn)))

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        self.logn[layer, head] = self.bias(layer, head, s)
        s.score = s.score + p.sum((0, 1))
        heads = self.config.num_key_value_heads
        if head < heads - 1:
            return
        all_heads = [self.slots[layer, h] for h in range(heads)]
        over = sum(len(x.k) for x in all_heads) - heads * self.budget
        prefill = p.shape[1] > 1 or len(s.k) == 1
        if over <= (0 if prefill else (self.interval - 1) * heads):
            return
        pairs = []
        for h, x in enumerate(all_heads):
            n = len(x.k)
            free = n - int(self.newest * self.budget)
            top = set(x.score[:free].argsort(descending=True)[: int(self.best * self.budget)].tolist())
            for i in range(n - 1):
                if i + 1 < free and i not in top and i + 1 not in top:
                    pairs.append((float(F.cosine_similarity(x.k[i], x.k[i + 1], dim=0)), h, i))
        pairs.sort(reverse=True)
        chosen = pairs[:over] if self.eps is None else [pair for pair in pairs if pair[0] > self.eps]
        for h, x in enumerate(all_heads):
            joined = {i for _, head_of, i in chosen if head_of == h}
            runs: list[list[int]] = []
            for i in range(len(x.k)):
                if i - 1 in joined:
                    runs[-1].append(i)
                else:
                    runs.append([i])
            k, v, mass, logn = x.k.clone(), x.v.clone(), x.score.clone(), self.logn[layer, h].clone()
            pivots = []
            for members in runs:
                at = max(members, key=lambda i: float(x.score[i]))
                pivots.append(at)
                d = (x.k[members] - x.k[at]).norm(dim=-1)
                w = (-(d**2) / (2 * self.sigma**2)).exp() * self.logn[layer, h][members].exp()
                w = w / w.sum()
                k[at], v[at] = (w[:, None] * x.k[members]).sum(0), (w[:, None] * x.v[members]).sum(0)
                mass[at], logn[at] = x.score[members].sum(), self.logn[layer, h][members].exp().sum().log()
            x.k, x.v, x.score = k, v, mass
            x.keep(torch.tensor(pivots))
            self.logn[layer, h] = logn[pivots]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("sigma", "best", "interval"), [(5.0, 0.24, 1), (0.5, 0.1, 5)])
def test_kvmerger_joins_runs(sizes: list[int], sigma: float, best: float, interval: int) -> None:
    recipe = f"kvmerger(budget=24, sigma={sigma}, best={best}, interval={interval})"
    compare(recipe, Runs(build("llama"), 24, interval, sigma, 0.34, best), sizes)


@pytest.mark.parametrize("eps", [0.3, 0.75, 1.0])
def test_kvmerger_by_threshold(eps: float) -> None:
    """The paper's rule: what is left hangs on the text. Above the largest cosine nothing is merged."""
    reference = Runs(build("llama"), 40, 1000, 5.0, 0.34, 0.24)
    reference.eps = eps
    compare(f"kvmerger(budget=0.5, eps={eps})", reference, [80] + [1] * 8)


@pytest.mark.parametrize(("sigma", "weights"), [(1e-3, [1.0, 0.0]), (1e6, [0.5, 0.5])])
def test_kvmerger_sigma(sigma: float, weights: list[float]) -> None:
    """Small: only the pivot is left; large: the mean of the run."""
    from kvloom.core.rows import Rows
    from kvloom.policies.mergers import Blend

    a, b = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    got = Blend("gauss", sigma=sigma)(Rows(a, a, 0), Rows(b, b, 0), torch.zeros(1, 1, dtype=torch.long))
    torch.testing.assert_close(got.k, weights[0] * a + weights[1] * b, atol=1e-5, rtol=1e-4)


def test_kvmerger_values_times_their_number() -> None:
    """Merged at once or in two rounds, a value is the weighted mean times the number of tokens."""
    from kvloom.core.rows import Rows
    from kvloom.policies.mergers import Blend

    merge, x = Blend("mean", count="values"), torch.randn(1, 4, 8)
    zero = torch.zeros(1, 1, dtype=torch.long)

    def part(rows: Tensor, cols: dict[str, Tensor] | None = None) -> Rows:
        return Rows(rows, rows, 0, cols or {})

    once = merge(part(x[:, :1]), part(x[:, 1:]), zero.expand(-1, 3))
    halves = [merge(part(x[:, i : i + 1]), part(x[:, i + 1 : i + 2]), zero) for i in (0, 2)]
    twice = merge(*halves, zero)
    torch.testing.assert_close(once.v, x.sum(1, keepdim=True))
    torch.testing.assert_close(once.k, x.mean(1, keepdim=True))
    torch.testing.assert_close(twice.v, once.v)
    torch.testing.assert_close(twice.k, once.k)


@functools.cache
def _damage(recipe: str) -> float:
    """KL to the full cache in nats per token, over 100 tokens behind each of four pieces of a book."""
    model, tokenizer = load_model("nano")
    text, total = Kit(tokenizer).text, 0.0
    for start in range(50_000, 450_000, 100_000):
        ids = torch.tensor([tokenizer.encode(text[start : start + 6000])[:1100]])
        rows = []
        for name in ("full", recipe):
            cache = KVCache(model, name)
            rows.append(run_cache(model, cache, ids, [1000, 100])[1000:].log_softmax(-1))
        total += float((rows[0].exp() * (rows[0] - rows[1])).sum(-1).mean()) / 4
    return total


@pytest.mark.parametrize(
    ("merges", "drops"),
    [
        ("chelsea(budget=0.1)", "keydiff(budget=0.1)"),
        ("kvmerger(budget=0.1)", "h2o(budget=0.1)"),
        ("ems(budget=0.1)", "ems(budget=0.1, threshold=2.0)"),
    ],
)
def test_merging_beats_dropping_at_a_tenth(merges: str, drops: str) -> None:
    assert _damage(merges) < _damage(drops)


NAMES = ["chelsea", "ems", "kvmerger"]
SMALL = {"ems": ", window=8", "chelsea": ", window=8"}


@pytest.mark.parametrize("recipe", ["chelsea(budget=90)", "ems(budget=90)", "kvmerger(budget=90)", "kvmerger(eps=1.0)"])
def test_exact_while_everything_fits(recipe: str) -> None:
    model, ids, sizes = build("llama"), prompt(90), [80] + [1] * 10
    want = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    got = run_cache(model, KVCache(model, recipe), ids, sizes)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_freed_and_within_a_budget_in_bytes(name: str) -> None:
    model = build("llama")
    full, small = KVCache(model, "full"), KVCache(model, f"{name}(budget='40KiB'{SMALL.get(name, '')})")
    for cache in (full, small):
        run_cache(model, cache, prompt(400), [400])
    assert 30 * 1024 < small.report().used <= 40 * 1024 < full.report().used


@pytest.mark.parametrize("name", NAMES)
def test_prompts_may_be_merged_before_they_are_encoded(name: str) -> None:
    model, codec = build("llama"), "kivi(bits=4, group=16, residual=16)"
    with pytest.raises(RecipeError, match="nothing is encoded twice"):
        parse(f"{name}(budget=96) | {codec}")
    cache, plain = (KVCache(model, f"{name}(budget=96, interval=None){more}") for more in (f" | {codec}", ""))
    for each in (cache, plain):
        out = run_cache(model, each, prompt(190), [150] + [1] * 40)
        assert bool(out.isfinite().all())
    assert cache.report().used < 0.75 * plain.report().used


def test_options() -> None:
    for wrong in (
        "chelsea(chunk=7)",
        "chelsea(budget=20)",
        "ems(window=0)",
        "ems(threshold=-1)",
        "ems(budget=16)",
        "kvmerger(sigma=0)",
        "kvmerger(best=0.4)",
        "kvmerger(count='weights')",
        "kvmerger(eps=0.75, budget='64MiB')",
        "kvmerger(interval=0)",
    ):
        with pytest.raises(RecipeError):
            parse(wrong)
