"""WindowKV (arXiv 2503.17922), KVCrush (2503.00022) and Task-KV (2501.15113).

Each beside a plain re-implementation from its paper's definitions: the same slots kept, the same logits.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom import KVCache
from kvloom.policies.crush import Crushed
from kvloom.policies.roles import Semantic
from kvloom.policies.scorers import Window
from tests.families import build, prompt
from tests.reference import Full, Slots, kept, run_cache
from tests.test_recipe_selection import compare


class AllHeads(Full):
    """Calls `choose(layer, slots, q [Hq, m, D], p [Hq, m, n])` once all heads of a layer are there."""

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        self.late = [] if head == 0 else self.late
        self.late.append((q, p))
        if head == self.config.num_key_value_heads - 1 and p.shape[1] > 1:
            qs, ps = (torch.cat(x) for x in zip(*self.late, strict=True))
            self.choose(layer, [self.slots[layer, h] for h in range(head + 1)], qs, ps)

    def choose(self, layer: int, slots: list[Slots], q: Tensor, p: Tensor) -> None:
        raise NotImplementedError


class Windows(AllHeads):
    """Windows of w tokens; the first layer of a group chooses."""

    def __init__(self, model: Any, budget: int, suffix: int, width: int, shared: int, beta: int, best: bool) -> None:
        super().__init__(model)
        self.c, self.suffix, self.width, self.shared, self.beta, self.best = (
            budget - suffix,
            suffix,
            width,
            shared,
            beta,
            best,
        )

    def size(self, layer: int) -> int:
        groups = math.ceil(self.config.num_hidden_layers / self.shared)
        if groups < 2:
            return self.c
        last = min(self.c, self.c * self.shared // self.beta)
        first = 2 * self.c - last
        return first - layer // self.shared * ((first - last) // (groups - 1))

    def choose(self, layer: int, slots: list[Slots], q: Tensor, p: Tensor) -> None:
        n, w = p.shape[-1], self.width
        old, size = n - self.suffix, self.size(layer)
        if old <= size:
            return
        if layer % self.shared == 0:
            a = p[:, -self.suffix :, :old].sum(1)
            scores = []
            for start in range(0, old, w):
                part = a[:, start : start + w]
                each = part.sort(-1, descending=True).values[:, : w // 2] if self.best else part
                scores.append(float(each.mean(-1).mean()))
            gone = sorted(range(len(scores)), key=scores.__getitem__)[: math.ceil((old - size) / w)]
            stay = [i for i in range(old) if i // w not in gone]
            self.stay = [] if len(gone) * w >= old else stay
        for s in slots:
            s.keep(torch.tensor([*self.stay, *range(old, n)]))


@pytest.mark.parametrize("length", [90, 61, 40, 30])
@pytest.mark.parametrize(
    ("task", "width", "shared"), [("find", 8, 1), ("sum up", 8, 2), ("find", 4, 3), ("sum up", 1, 1)]
)
def test_windowkv_keeps_whole_windows(length: int, task: str, width: int, shared: int) -> None:
    recipe = f"windowkv(budget=36, task={task!r}, width={width}, shared={shared}, beta=4, suffix=8, interval=None)"
    compare(recipe, Windows(build("llama"), 36, 8, width, shared, 4, task == "find"), [length] + [1] * 8)


def test_windowkv_layers_of_a_group_share_and_budgets_average() -> None:
    model = build("llama", num_hidden_layers=6)
    cache = KVCache(model, "windowkv(budget=64, suffix=8, shared=2, beta=4)")
    for sizes in ([200], [40], [1] * 4):  # a later turn too
        run_cache(model, cache, prompt(244), sizes)
        layers = kept(cache)
        assert all(head == layers[i // 2 * 2][0] for i, layer in enumerate(layers) for head in layer)
    cache = KVCache(model, "windowkv(budget=64, suffix=8, shared=2, beta=4)")
    run_cache(model, cache, prompt(200), [200])
    counts = [len(layer[0]) for layer in kept(cache)]
    assert counts[0] > counts[2] > counts[4] and abs(sum(counts) / 6 - 64) < 8
    assert all(
        set(range(i // 8 * 8, i // 8 * 8 + 8)) <= set(layer[0]) for layer in kept(cache) for i in layer[0] if i < 192
    )


def test_windowkv_drafts_settle_late_and_share_still() -> None:
    """Layers settle one after another when drafts are accepted, not within the forward that brought them."""
    model, ids = build("llama"), prompt(100)
    one, two = (KVCache(model, "windowkv(budget=40, suffix=8, shared=3)") for _ in range(2))
    run_cache(model, one, ids, [90])
    two.activate_past_recording()
    run_cache(model, two, ids, [90])
    two.crop(0)
    assert kept(one) == kept(two)


class Crush(AllHeads):
    """SnapKV's scores; bits by head; representatives at even ranks of the distance to the mean string."""

    def __init__(self, model: Any, budget: int, window: int, share: float) -> None:
        super().__init__(model)
        self.budget, self.window, self.extra = budget, window, int(share * budget)

    def choose(self, layer: int, slots: list[Slots], q: Tensor, p: Tensor) -> None:
        n, w, heads = p.shape[-1], self.window, len(slots)
        if n <= self.budget:
            return
        a = p[:, -w:, : n - w].sum(1)
        pooled = torch.nn.functional.pad(a, (2, 2)).unfold(-1, 5, 1).sum(-1) / 5
        score = pooled.unflatten(0, (heads, -1)).mean(1)
        ranks = [row.sort(descending=True).indices.tolist() for row in score]
        important = [set(r[: self.budget - w - self.extra]) for r in ranks]
        half = [set(r[: math.ceil((n - w) / 2)]) for r in ranks]
        free = [i for i in range(n - w) if not any(i in x for x in important)]
        word = {i: [i in x for x in half] for i in range(n - w)}
        anchor = [sum(word[i][h] for i in free) > len(free) / 2 for h in range(heads)]
        free.sort(key=lambda i: sum(b != c for b, c in zip(word[i], anchor, strict=True)))
        count = min(self.extra, len(free))
        chosen = {free[i * (len(free) // count)] for i in range(count)}
        assert len(free) >= self.extra and all(not chosen & x for x in important)
        for s, x in zip(slots, important, strict=True):
            s.keep(torch.tensor(sorted(x | chosen | set(range(n - w, n)))))


@pytest.mark.parametrize("share", [0.25, 0.1])
@pytest.mark.parametrize("heads", [2, 4])
def test_kvcrush_adds_representatives(share: float, heads: int) -> None:
    recipe = f"kvcrush(budget=40, share={share}, window=8, kernel=5, pool='avg', interval=None)"
    compare(recipe, Crush(build("llama", num_key_value_heads=heads), 40, 8, share), [120] + [1] * 8)


@pytest.mark.parametrize("base", ["snapkv(budget=40, window=8", "h2o(budget=40, window=8"])
def test_kvcrush_without_representatives_is_the_base(base: str) -> None:
    model, found = build("llama"), []
    name = base.partition("(")[0]
    interval = ", interval=8" if name == "snapkv" else ""
    crush = f"kvcrush(budget=40, base={name!r}, share=0.0, window=8, interval={8 if interval else 1})"
    for recipe in (f"{base}{interval})", crush, crush.replace("0.0", "0.3")):
        cache = KVCache(model, recipe)
        run_cache(model, cache, prompt(110), [90] + [1] * 20)
        found.append(kept(cache))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("anchor", ["mean", "alternating", "zeros", "ones", "random"])
def test_kvcrush_representatives_span_the_distances(anchor: Any) -> None:
    bits = torch.rand(6, 64, generator=torch.Generator().manual_seed(1)) > 0.5
    crushed = Crushed(Window(4, 5, "avg"), 0.5, 4, anchor)
    free = torch.arange(64) % 3 > 0
    taken = crushed._spread(bits, free, 10)
    distance = (bits != crushed._anchor(bits[:, free])[:, None]).sum(0)
    assert int(taken.sum()) == 10 and not bool((taken & ~free).any())
    assert distance[taken].min() == distance[free].min() and distance[taken].max() > distance[free].float().median()
    blocks = Crushed(Window(4, 5, "avg"), 0.5, 4, anchor, 4)._spread(bits, torch.ones(64, dtype=torch.bool), 12)
    assert int(blocks.sum()) == 12 and bool(
        (blocks.unflatten(0, (-1, 4)).any(1) == blocks.unflatten(0, (-1, 4)).all(1)).all()
    )


class Task(AllHeads):
    """Heads far from the mean of all views keep everything."""

    def __init__(self, model: Any, budget: int, semantic: Semantic, sinks: int, recent: int, window: int) -> None:
        super().__init__(model)
        self.budget, self.semantic, self.sinks, self.recent, self.window = budget, semantic, sinks, recent, window

    def choose(self, layer: int, slots: list[Slots], q: Tensor, p: Tensor) -> None:
        n, w, heads, rule = p.shape[-1], self.window, len(slots), self.semantic
        if n <= self.budget:
            return
        a = torch.nn.functional.pad(p[:, -w:].sum(1), (2, 2)).unfold(-1, 5, 1).sum(-1) / 5
        score = a.unflatten(0, (heads, -1)).mean(1)
        views = []
        for s, row in zip(slots, score, strict=True):
            best = row.topk(min(rule.top, n)).indices
            views.append((row[best, None] * s.v[best]).sum(0))
        centre = torch.stack(views).mean(0)
        far = sorted(range(heads), key=lambda h: -float((views[h] - centre).norm()) if heads > 2 else h)
        layers = self.config.num_hidden_layers
        most = max(heads * rule.beta, rule.least)
        count = max(1, min(heads - 1, round(most - (most - rule.least) * layer / (layers - 1))))
        near = min(rule.near, heads - count - 1)
        whole = far[:count] + far[::-1][:near]
        while whole and self.budget * heads - len(whole) * n < (heads - len(whole)) * (self.sinks + self.recent):
            whole.pop()
        each, over = divmod(self.budget * heads - len(whole) * n, heads - len(whole))
        rest = [h for h in far[:count] + far[::-1][:near] + far[count : heads - near] if h not in whole]
        for i, h in enumerate(rest):
            size = each + (i < over)
            ends = [*range(self.sinks), *range(n - self.recent, n)]
            middle = score[h, self.sinks : n - self.recent].topk(size - len(ends)).indices + self.sinks
            slots[h].keep(torch.tensor(sorted([*ends, *middle.tolist()])))


@pytest.mark.parametrize("budget", [60, 45, 30])
@pytest.mark.parametrize(("heads", "near"), [(4, 0), (4, 1), (2, 1)])
def test_task_kv_keeps_heads_that_differ_whole(budget: int, heads: int, near: int) -> None:
    recipe = f"task-kv(budget={budget}, beta=0.5, near={near}, top=24, sinks=4, recent=12, window=8, kernel=5, interval=None)"
    model = build("llama", num_key_value_heads=heads)
    compare(recipe, Task(model, budget, Semantic(0.5, 1, 24, near, 16), 4, 12, 8), [100] + [1] * 8)


def test_task_kv_counts_and_bytes() -> None:
    rule = Semantic(0.25, 4, 256, 1, 272)
    counts = [rule.heads(i, 32, 32) for i in range(32)]
    assert counts[0] == 8 and counts[-1] == 4 and counts == sorted(counts, reverse=True)
    model = build("llama", num_key_value_heads=4)
    cache = KVCache(model, "task-kv(budget=120, sinks=4, recent=12, window=8)")
    run_cache(model, cache, prompt(200), [200])
    assert all(sum(map(len, layer)) == 480 and max(map(len, layer)) == 200 for layer in kept(cache))


def test_task_kv_equal_heads_have_no_distance() -> None:
    model = build("llama", num_key_value_heads=2)
    for layer in model.model.layers:
        for p in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            p.weight.data[16:] = p.weight.data[:16]
        layer.self_attn.q_proj.weight.data[32:] = layer.self_attn.q_proj.weight.data[:32]
    cache = KVCache(model, "task-kv(budget=60, sinks=4, recent=12, window=8)")
    run_cache(model, cache, prompt(100), [100])  # which of the two stays whole is only an order
    assert all(sum(map(len, layer)) == 120 for layer in kept(cache))
