"""Scissorhands (arXiv 2305.17118) and Keyformer (2403.09054) beside plain re-implementations from the papers' definitions."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvloom import KVCache, RecipeError, parse
from kvloom.core.group import Table
from kvloom.core.step import Step
from kvloom.policies.histories import Unimportant
from tests.families import build, prompt, subject
from tests.reference import Full, Slots, kept, run_cache
from tests.test_recipe_selection import SIZES, compare

BURSTS = {**SIZES, "long decode": [20] + [1] * 70, "turn": [40, 1, 1, 1, 30, 1, 1, 1, 1]}


class Scissors(Full):
    """Counts the rows, of the last `window`, in which a token got less than 1 / n."""

    def __init__(self, model: Any, budget: int, window: int, recent: int, drop: float) -> None:
        super().__init__(model)
        self.budget, self.window, self.recent, self.left = budget, window, recent, budget - int(budget * drop)
        self.history: dict[tuple[int, int], list[Tensor]] = {}

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        history, (_, m, n) = self.history.setdefault((layer, head), []), p.shape
        for i, row in enumerate(p.mean(0)):
            sees = n - m + i + 1
            history.append(row[:sees] < 1 / sees)
        if n <= self.budget:
            return
        low = torch.zeros(n)
        for row in history[-self.window :]:
            low[: len(row)] += row
        order = sorted(range(n - self.recent), key=lambda i: (int(low[i]), -i))
        s.keep(torch.tensor(sorted([*order[: self.left - self.recent], *range(n - self.recent, n)])))
        history.clear()  # its rows are over slots that are gone


@pytest.mark.parametrize("sizes", BURSTS.values(), ids=BURSTS)
@pytest.mark.parametrize(("window", "drop"), [(12, 0.5), (100, 0.5), (5, 0.25)])
def test_scissorhands_drops_what_is_unimportant_most_often(sizes: list[int], window: int, drop: float) -> None:
    recipe = f"scissorhands(budget=32, window={window}, recent=4, drop={drop})"
    compare(recipe, Scissors(build("llama"), 32, window, 4, drop), sizes)


def test_scissorhands_length_saws_below_the_budget() -> None:
    model, lengths = build("llama"), []
    cache = KVCache(model, "scissorhands(budget=32, window=8, recent=4)")
    run_cache(
        model, cache, prompt(120), [20] + [1] * 100, lambda n: lengths.append({len(h) for x in kept(cache) for h in x})
    )
    assert all(len(held) == 1 for held in lengths)
    counts = [held.pop() for held in lengths]
    assert max(counts) == 32 and all(b == 16 for a, b in pairwise(counts) if a == 32)


class Noised(Full):
    """Gumbel scores without their noise, temperature by step; keeps `key` best and `recent`."""

    def __init__(self, model: Any, budget: int, window: float, start: float, end: float, tokens: int) -> None:
        super().__init__(model)
        self.recent = int(window * budget)
        self.key = budget - self.recent
        self.start, self.end, self.tokens = start, end, tokens
        self.total: dict[tuple[int, int], int] = {}

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        n, seen = len(s.k), int(s.index[-1]) + 1
        step = 0 if p.shape[1] > 1 or seen == 1 else seen - self.prompt
        t = self.start + (self.end - self.start) * min(1.0, step / self.tokens)
        s.score = s.score + (p.log() / t).softmax(-1).sum((0, 1))
        if n > self.key + self.recent:
            best = s.score[: n - self.recent].topk(self.key).indices.sort().values
            s.keep(torch.cat([best, torch.arange(n - self.recent, n)]))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_keyformer_temperature_rises_with_decoded_tokens(sizes: list[int]) -> None:
    recipe = "keyformer(budget=32, noise=0.0, start=1.0, end=3.0, tokens=15)"
    compare(recipe, Noised(build("llama"), 32, 0.3, 1.0, 3.0, 15), sizes)


def test_keyformer_without_noise_and_temperature_is_h2o() -> None:
    model, found = build("llama"), []
    for recipe in ("keyformer(budget=24, noise=0.0, end=1.0)", "h2o(budget=24, window=0.3)", "keyformer(budget=24)"):
        cache = KVCache(model, recipe)
        run_cache(model, cache, prompt(90), [70] + [1] * 20)
        found.append(kept(cache))
    assert found[0] == found[1] != found[2]


def test_keyformer_same_seed_same_tokens_and_the_newest_stay() -> None:
    model, found = build("llama"), []

    def check(length: int) -> None:
        assert all(len(h) <= 24 and h[-7:] == list(range(length - 7, length)) for x in kept(cache) for h in x)

    for seed in (0, 0, 1):
        cache = KVCache(model, f"keyformer(budget=24, seed={seed})")
        run_cache(model, cache, prompt(80), [60] + [1] * 20, check)
        found.append(kept(cache))
    assert found[0] == found[1] != found[2]


def test_keyformer_noise_is_gumbel() -> None:
    """With uniform logits a row's noisy weights average what independent draws of softmax(z / t) do."""
    from kvloom.policies.histories import Noisy

    table: Any = type("Table", (), {"device": torch.device("cpu")})()
    draw = torch.Generator().manual_seed(3)
    factors = Noisy(1.0, 2.0, 10, 1.0, 0)._factors(200_000, 2.0, draw, table)
    z = 2 * factors.log()
    assert abs(float(z.mean()) - 0.5772) < 0.02 and abs(float(z.var()) - 1.6449) < 0.03


@pytest.mark.parametrize("name", ["scissorhands", "keyformer"])
def test_exact_while_everything_fits(name: str) -> None:
    model, ids, sizes = build("llama"), prompt(90), [80] + [1] * 10
    want = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    torch.testing.assert_close(
        run_cache(model, KVCache(model, f"{name}(budget=90)"), ids, sizes), want, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["scissorhands", "keyformer"])
def test_composes_with_a_codec(name: str) -> None:
    model, sizes = build("llama"), [150] + [1] * 40
    cache = KVCache(model, f"{name}(budget=96) | kivi(bits=4, group=16, residual=16)")
    assert bool(run_cache(model, cache, prompt(190), sizes).isfinite().all())


@pytest.mark.parametrize(
    "text",
    [
        "scissorhands(budget=20)", "scissorhands(drop=1.0)", "scissorhands(window=0)", "scissorhands(recent=0)",
        "keyformer(window=2)", "keyformer(start=0.0)", "keyformer(tokens=0)", "keyformer(noise=-1.0)", "keyformer(seed=-1)",
        "keyformer(interval=0)",
    ],
)  # fmt: skip
def test_options(text: str) -> None:
    with pytest.raises(RecipeError):
        parse(text)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("ahead", [0.0, 7.0])
def test_weights_in_blocks_are_those_of_whole_rows(family: str, ahead: float) -> None:
    """Of the newest rows of prompts and of later turns, with soft-capped logits, too."""
    model, seen = subject(family, max_position_embeddings=2048), []

    class Looks(Unimportant):
        def __call__(self, step: Step, table: Table) -> Tensor:
            if step.q.shape[2] > 1:
                want = torch.full((step.heads, step.site.group, 150, table.n), ahead)
                for place, p in step.rows(table, 150):
                    want[:, :, place - step.length + 150, : p.shape[-1]] = p
                unseen = table.index[0] > torch.arange(step.length - 150, step.length)[:, None]
                want[:, :, unseen] = ahead
                got = torch.full_like(want, ahead)
                for place, start, p in step.blocks(table, torch.arange(step.q.shape[2] - 150, step.q.shape[2]), ahead):
                    got[:, :, place - step.length + 150, start : start + p.shape[-1]] = p
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
                some = torch.tensor([3, 77, 140]) + step.q.shape[2] - 150
                mass = want[:, :, [3, 77, 140]].masked_fill(unseen[[3, 77, 140]], 0.0).sum(2)
                torch.testing.assert_close(step.probed(table, some), mass, atol=1e-5, rtol=1e-4)
                seen.append(table.n)
            return super().__call__(step, table)

    recipe = parse("scissorhands(budget=500)")
    policy = replace(recipe.policy["prompt"], score=Looks(400))
    cache = KVCache(model, replace(recipe, policy={"prompt": policy, "decode": policy}))
    run_cache(model, cache, prompt(900), [700, 1, 1, 198])
    assert seen and max(seen) > 600
