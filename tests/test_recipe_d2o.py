"""D2O (arXiv 2406.13035) beside a plain re-implementation: the same slots, the same merged keys, the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from kvloom import KVCache, RecipeError, parse
from tests.families import build, prompt
from tests.reference import Full, Slots, kept, run_cache
from tests.test_recipe_merging import compare


class D2O(Full):
    """H2O with budgets by layer from the second token behind a prompt on; what leaves goes into the most similar kept slot."""

    def __init__(self, model: Any, ratio: float, decay: float, share: dict[int, float] | None = None) -> None:
        super().__init__(model)
        self.ratio, self.decay, self.share = ratio, decay, share
        self.columns: dict[tuple[int, int], Tensor] = {}
        self.variance: dict[tuple[int, int], Tensor] = {}
        self.seen: dict[int, list[Any]] = {}
        self.threshold: dict[int, Tensor] = {}

    def shares(self) -> list[float]:
        layers, heads = self.config.num_hidden_layers, self.config.num_key_value_heads
        means = []
        for layer in range(layers):
            x = torch.cat([self.variance[layer, h] for h in range(heads)])
            means.append((x - x.min()) / (x.max() - x.min()))
        return ((-torch.stack([x.mean() for x in means])).softmax(0) * layers).tolist()

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        s.score = s.score + p.sum((0, 1))
        rows, last = p.shape[1], self.config.num_hidden_layers - 1
        if rows > 1 or len(s.k) == 1:
            new = p.sum(1).var(-1, correction=0)
            old = self.variance.get((layer, head), new)
            self.variance[layer, head] = old + (new - old) * rows / self.prompt
            return
        if layer in (0, 1, last):
            return
        n = self.prompt + 1
        ratio = min(1.0, max(0.01, self.shares()[layer] * self.ratio))
        heavy = recent = int(n * ratio / 2)
        if len(s.k) <= heavy + recent:
            return
        score = s.score.masked_fill(s.index < 4, torch.inf)[: len(s.k) - recent]
        best = score.topk(heavy).indices.tolist()
        stay = sorted([*best, *range(len(s.k) - recent, len(s.k))])
        gone = [i for i in range(len(s.k)) if i not in stay]
        found = []
        for i in gone:
            alike = [float(F.cosine_similarity(s.k[i], s.k[j], dim=0)) for j in stay]
            found.append((max(alike), stay[alike.index(max(alike))]))
        self.seen.setdefault(layer, []).append((s, stay, gone, found))
        if len(self.seen[layer]) < self.config.num_key_value_heads:
            return
        heads = self.seen.pop(layer)
        u = torch.tensor([[x for x, _ in found] for *_, found in heads])
        tau = self.threshold[layer] = (
            self.decay * self.threshold[layer] + (1 - self.decay) * u.mean() if layer in self.threshold else u.mean()
        )
        merged = (u.mean(0) >= tau).tolist()
        for s, stay, gone, found in heads:
            k, v = s.k.clone(), s.v.clone()
            for j in stay:
                into = [(i, x) for i, (x, at), m in zip(gone, found, merged, strict=True) if m and at == j]
                for y, z in ((k, s.k), (v, s.v)):
                    y[j] = (z[j] + sum(x * z[i] for i, x in into)) / (1 + len(into))
            s.k, s.v = k, v
            s.keep(torch.tensor(stay))


@pytest.mark.parametrize("sizes", [[48] + [1] * 12, [30, 20, 1, 1, 1, 12, 1, 1]], ids=["decode", "chunks and turns"])
def test_d2o_merges_what_leaves(sizes: list[int]) -> None:
    reference = D2O(build("llama", num_hidden_layers=5), 0.4, 0.3)
    compare("d2o(budget=0.4, decay=0.3)", reference, sizes)
    assert len(set(map(len, (reference.slots[i, 0].k for i in (2, 3))))) == 2  # layers differ


def test_d2o_layers_alike_share_alike_and_some_stay_whole() -> None:
    """One layer's weights in all of them, and a text of one token: equal variances, so each gets the ratio."""
    model = build("llama", num_hidden_layers=5)
    cache = KVCache(model, "d2o(budget=0.5)")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()  # every query attends evenly
    run_cache(model, cache, prompt(61), [60, 1])
    counts = [{len(head) for head in layer} for layer in kept(cache)]
    assert counts == [{61}, {61}, {30}, {30}, {61}]


def test_d2o_the_prompt_and_the_first_token_see_everything() -> None:
    model, ids = build("llama", num_hidden_layers=5), prompt(64)
    want = run_cache(model, DynamicCache(config=model.config), ids, [60] + [1] * 4)
    got = run_cache(model, KVCache(model, "d2o(budget=0.1)"), ids, [60] + [1] * 4)
    torch.testing.assert_close(got[:61], want[:61], atol=1e-4, rtol=1e-4)
    assert float((got[61:] - want[61:]).abs().max()) > 1e-3


def test_d2o_is_exact_while_everything_fits() -> None:
    model, ids, sizes = build("llama", num_hidden_layers=5), prompt(60), [50] + [1] * 10
    want = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    for budget in (1.0, 1000):
        got = run_cache(model, KVCache(model, f"d2o(budget={budget})"), ids, sizes)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_d2o_options() -> None:
    for wrong in ("budget='64MiB'", "decay=2", "weight='mean'", "interval=0"):
        with pytest.raises(RecipeError):
            parse(f"d2o({wrong})")
