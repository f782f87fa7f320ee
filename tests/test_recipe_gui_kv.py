"""GUI-KV (arXiv 2510.00536) against its score computed head by head, with and without images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom import KVCache, RecipeError, detach, parse
from kvloom.policies.modality import Screens
from tests.families import build, prompt, subject
from tests.modes import pad_left
from tests.reference import Full, Slots, held, kept, layers_of, run, run_cache
from tests.test_modality import example, llava, read

LENGTH = 100


def screens(n: int = LENGTH) -> Tensor:
    """Three images in a text of n tokens."""
    kinds = torch.zeros(n, dtype=torch.long)
    kinds[5 : n // 4], kinds[n // 4 : n // 2], kinds[n // 2 + 8 : n - 12] = 1, 2, 3
    return kinds


class Gui(Full):
    """Behind prompts, one head at a time. Hidden states are seen by a hook on the norm in front of attention."""

    def __init__(
        self, model: Any, kinds: Tensor, budget: int | float, alpha: float, temperature: float, window: int, rank: int
    ) -> None:
        super().__init__(model)
        self.kinds, self.budget, self.alpha, self.temperature = kinds, budget, alpha, temperature
        self.window, self.rank = window, rank
        self.hidden: dict[int, Tensor] = {}
        for i, layer in enumerate(model.model.layers):
            layer.input_layernorm.register_forward_hook(lambda _m, _x, y, i=i: self.hidden.update({i: y}))

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        n, m, length = len(s.k), p.shape[1], int(s.index[-1]) + 1
        size = int(self.budget * self.prompt + 1e-9) if isinstance(self.budget, float) else self.budget
        if m == 1 or n <= size:
            return
        w = min(self.window, size - 2)
        seen = p[:, -w:, : n - w].sum(1)
        score = torch.nn.functional.pad(seen, (2, 2)).unfold(-1, 5, 1).sum(-1).div(5).mean(0)
        told = [int(self.kinds[i]) if i < min(len(self.kinds), length - w) else 0 for i in range(length)]
        kind, last = [told[i] for i in s.index[: n - w].tolist()], max(told)
        new = [i for i in range(length - m, length) if told[i] == last and last]
        if new:
            r = torch.stack([self.hidden[layer][i - length + m].norm() for i in new])
            z = torch.softmax((r - r.mean()) / (r.std() + 1e-8) / self.temperature, 0)
            for i, bonus in zip(new, z, strict=True):
                score[s.index[: n - w] == i] += self.alpha * bonus
        mine = [j for j, k in enumerate(kind) if k == last]
        earlier = [j for j, k in enumerate(kind) if 0 < k < last]
        if earlier and mine:
            full = torch.linalg.qr(s.k[mine].T, mode="complete").Q
            basis = full[:, : min(self.rank, len(mine), s.k.shape[1])]
            left = [float((s.k[j] - basis @ (basis.T @ s.k[j])).norm()) for j in earlier]
            assert basis.shape[1] < s.k.shape[1]  # else it explains everything
            for _, j in sorted(zip(left, earlier, strict=True))[: int((1 - size / n) * len(earlier))]:
                score[j] = 0.0
        best = score.topk(size - w).indices.sort().values
        s.keep(torch.cat([best, torch.arange(n - w, n)]))


@pytest.mark.parametrize(
    ("sizes", "budget", "alpha", "rank"),
    [
        ([LENGTH] + [1] * 12, 0.3, 2.0, 32),
        ([LENGTH, 1, 1], 40, 0.0, 4),
        ([LENGTH, 1, 1], 9, 0.5, 32),  # less than the window and two
        ([45, 55, 1, 1, 20, 1, 1], 0.4, 2.0, 32),
    ],
    ids=["ratio", "no saliency", "small", "chunks and turns"],
)
def test_logits_and_kept_indices(sizes: list[int], budget: int | float, alpha: float, rank: int) -> None:
    model, ids, kinds = subject("llama", head_dim=64), prompt(sum(sizes)), screens()
    cache = KVCache(model, f"gui-kv(budget={budget}, alpha={alpha}, temperature=1.5, rank={rank})").tokens(kinds)
    got = run_cache(model, cache, ids, sizes)
    reference = Gui(model, kinds, budget, alpha, 1.5, 8, rank)
    want = run(reference, ids, sizes)
    for i, layer in enumerate(kept(cache)):
        for h, index in enumerate(layer):
            assert index == reference.slots[i, h].index.tolist(), f"layer {i}, head {h}"
    torch.testing.assert_close(got, want, atol=4e-4, rtol=1e-3)


@pytest.mark.parametrize("recipe", ["gui-kv(budget=1.0)", "gui-kv(budget=120)"])
def test_1_full_cache_while_it_fits(recipe: str) -> None:
    model, ids, sizes = build("llama"), prompt(120), [60, 40] + [1] * 20
    cache = KVCache(model, recipe).tokens(screens())
    want = run_cache(model, KVCache(model), ids, sizes)
    torch.testing.assert_close(run_cache(model, cache, ids, sizes), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("told", ["one image", "text", "nothing"])
def test_2_without_saliency_it_is_snapkv(told: str) -> None:
    """Of text alone it is with saliency, too."""
    model, ids, kinds = build("llama"), prompt(LENGTH), torch.zeros(LENGTH, dtype=torch.long)
    cache = KVCache(model, "gui-kv(budget=30)" if told != "one image" else "gui-kv(budget=30, alpha=0.0)")
    if told != "nothing":
        kinds[10:60] = told == "one image"
        cache.tokens(kinds)
    other = KVCache(model, "snapkv(budget=30, window=8, kernel=5, pool='avg', interval=None)")
    got, want = (run_cache(model, each, ids, [90] + [1] * 10) for each in (cache, other))
    assert kept(cache) == kept(other)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_3_a_screen_seen_before_goes_first() -> None:
    """Keys of an earlier image that are those of the last one leave nothing, and score nothing."""
    model, kinds, found = subject("llama", head_dim=64), torch.zeros(96, dtype=torch.long), []
    kinds[10:26], kinds[30:46], kinds[60:76] = 1, 2, 3

    class Watched(Screens):
        def _explained(self, table: Any, images: Tensor, last: int, share: float) -> Tensor:
            _, segment = table.parts[0]
            x = segment.key.dense(0, table.n)
            x[:, 10:26] = x[:, 60:76]  # as if the first screen had been the last one, at its place
            x[:, 30:46] += torch.randn(16, 1)  # and the second one another
            got = super()._explained(table, images, last, share)
            found.append(got)
            return got

    recipe = parse("gui-kv(budget=0.5)")
    policy = recipe.policy["prompt"]
    score = Watched(8, 5, "avg")
    cache = KVCache(model, replace(recipe, policy={"prompt": replace(policy, score=score)})).tokens(kinds)
    run_cache(model, cache, prompt(96), [96])
    assert len(found) == 3
    for each in found:
        assert bool(each[:, 10:26].all()) and int(each.sum()) == 16 * len(each)  # half of 32
    assert all(not set(range(10, 26)) & set(head) for layer in kept(cache) for head in layer)


@pytest.mark.parametrize("budget", [9, 20, 0.3])
def test_4_budget_and_window(budget: int | float) -> None:
    model = build("llama")
    cache = KVCache(model, f"gui-kv(budget={budget})").tokens(screens())
    run_cache(model, cache, prompt(LENGTH + 5), [LENGTH] + [1] * 5)
    size = int(budget * LENGTH) if isinstance(budget, float) else budget
    for head in (head for layer in kept(cache) for head in layer):
        assert len(head) == size + 5  # what is decoded stays
        assert set(range(LENGTH - min(8, size - 2), LENGTH + 5)) <= set(head)


def test_saliency_chooses() -> None:
    """A large enough alpha keeps the tokens of the last image whose hidden states are longest, the same in all heads."""
    model, ids, kinds = build("llama"), prompt(80), torch.zeros(80, dtype=torch.long)
    kinds[20:60] = 1
    norms: list[Tensor] = []
    hooks = [
        x.input_layernorm.register_forward_hook(lambda _m, _x, y: norms.append(y[0].norm(dim=-1)))
        for x in model.model.layers
    ]
    cache = KVCache(model, "gui-kv(budget=18, alpha=1e6)").tokens(kinds)
    run_cache(model, cache, ids, [80])
    for hook in hooks:
        hook.remove()
    for norm, layer in zip(norms, kept(cache), strict=True):
        best = sorted((norm[20:60].topk(10).indices + 20).tolist()) + list(range(72, 80))
        assert all(head == best for head in layer)


def test_bytes_are_freed() -> None:
    model = build("llama")
    full, small = KVCache(model), KVCache(model, "gui-kv").tokens(screens(400))
    for cache in (full, small):
        run_cache(model, cache, prompt(400), [400])
    site = layers_of(small)[0].site
    state = 8 * site.q_heads * site.key_dim * 4
    assert small.report().used == 3 * (site.kv_heads * 80 * (2 * 16 * 4 + 4) + state)
    assert small.report().used < 0.3 * full.report().used


def test_a_model_that_sees_images() -> None:
    model, inputs = llava(), example()
    kinds = read(inputs["input_ids"])
    n = kinds.shape[1]
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    full = model.generate(**inputs, past_key_values=KVCache(model), **options)
    for budget, slots in ((0.3, int(0.3 * n)), (1.0, n)):
        cache = KVCache(model, f"gui-kv(budget={budget})").tokens(kinds)
        out = model.generate(**inputs, past_key_values=cache, **options)
        assert all(len(head) == slots + 5 for layer in kept(cache) for head in layer)
        torch.testing.assert_close(out.logits[0], full.logits[0])  # the prompt saw all of itself
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(full.logits), atol=1e-4, rtol=1e-4)
    bare = KVCache(model, "gui-kv(budget=0.3)")
    model.generate(**inputs, past_key_values=bare, **options)
    told = KVCache(model, "gui-kv(budget=0.3, alpha=10.0)").tokens(kinds)
    model.generate(**inputs, past_key_values=told, **options)
    assert kept(bare) != kept(told)


def test_rows_go_by_their_own_images() -> None:
    """In a padded batch every row, and each of its beams, keeps what it keeps alone."""
    model, rows = build("llama"), [prompt(80), prompt(61, seed=1)]
    kinds = torch.zeros(2, 80, dtype=torch.long)
    kinds[0, 10:30], kinds[0, 40:70], kinds[1, 5:20], kinds[1, 20:50] = 1, 2, 1, 2
    together = KVCache(model, "gui-kv(budget=0.3)").tokens(kinds)
    model.generate(**pad_left(rows), past_key_values=together, max_new_tokens=1, do_sample=False, num_beams=2)
    for i, ids in enumerate(rows):
        alone = KVCache(model, "gui-kv(budget=0.3)").tokens(kinds[i])
        run_cache(model, alone, ids, [ids.shape[1]])
        for beam in (2 * i, 2 * i + 1):
            assert held(together, beam) == held(alone)


def test_drafts_and_codecs() -> None:
    """Hidden states wait for drafts to be accepted, as queries do; kept slots may be encoded."""
    model, ids, kinds = subject("llama", head_dim=64), prompt(160), screens(140)
    waits, plain = (KVCache(model, "gui-kv(budget=40, rank=6)").tokens(kinds) for _ in range(2))
    for layer in waits.managed():
        layer.activate_past_recording()
    model(ids[:, :LENGTH], past_key_values=waits)
    assert any(e.field == "pending" for e in waits.report().entries)
    waits.crop(-20)
    run_cache(model, plain, ids, [LENGTH - 20])
    assert kept(waits) == kept(plain)
    cache = KVCache(model, "gui-kv(budget=64) | kivi(bits=4, group=16, residual=16)").tokens(kinds)
    assert bool(run_cache(model, cache, ids, [100, 1, 1, 40, *[1] * 18]).isfinite().all())


def test_the_model_is_left_as_it_was() -> None:
    model = build("llama")
    KVCache(model, "gui-kv")
    assert any(x.self_attn._forward_pre_hooks for x in model.model.layers)
    detach(model)
    assert not any(x.self_attn._forward_pre_hooks for x in model.model.layers)


def test_options() -> None:
    for wrong in ("budget=2", "alpha=-1.0", "temperature=0.0", "rank=0", "window=0", "kernel=4", "alpha='x'"):
        with pytest.raises(RecipeError):
            parse(f"gui-kv({wrong})")
