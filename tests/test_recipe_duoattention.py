"""DuoAttention (arXiv 2410.10819): gates, their training, and what each kind of head holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvloom import KVCache, ModelError, RecipeError, parse
from kvloom.core import profile as profiles
from kvloom.core.override import attending, causal
from kvloom.policies.head_gates import gated, passkeys, streaming, train
from tests.families import build, prompt
from tests.reference import Full, Slots, kept, run_cache
from tests.test_recipe_selection import SIZES, compare

GATES = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.25]])


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "duo.safetensors"
    profiles.save(path, build("llama"), "duoattention", {"gates": GATES})
    return repr(str(path))


class Duo(Full):
    """Streaming heads keep the first and the newest tokens after each forward."""

    def __init__(self, model: Any, whole: Tensor, sinks: int, window: int) -> None:
        super().__init__(model)
        self.whole, self.sinks, self.window = whole, sinks, window

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        n = len(s.k)
        if not self.whole[layer, head] and n > self.sinks + self.window:
            s.keep(torch.tensor([i for i in range(n) if i < self.sinks or i >= n - self.window]))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("sparsity", "least"), [(0.0, 0.0), (0.5, 0.28), (1.0, 2.0), (0.34, 0.22)])
def test_streaming_heads_keep_both_ends(sizes: list[int], sparsity: float, least: float, profile: str) -> None:
    recipe = f"duoattention(sparsity={sparsity}, sinks=3, window=12, profile={profile})"
    compare(recipe, Duo(build("llama"), least < GATES, 3, 12), sizes)


def test_bytes_follow_the_formula(profile: str) -> None:
    model = build("llama")
    cache, full = (
        KVCache(model, f"duoattention(sparsity={s}, sinks=4, window=28, profile={profile})") for s in (0.5, 0.0)
    )
    for each in (cache, full):
        run_cache(model, each, prompt(300), [300])
    planes = cache.report().by("plane"), full.report().by("plane")
    for plane in ("key", "value"):
        assert planes[0][(plane,)] == 3 * (300 + 32) * 16 * 4 and planes[1][(plane,)] == 6 * 300 * 16 * 4
    assert sum(len(head) == 32 for layer in kept(cache) for head in layer) == 3


def test_chunks_attend_to_what_streaming_heads_hold(profile: str) -> None:
    model, ids = build("llama"), prompt(96)
    cache = KVCache(model, f"duoattention(sparsity=1.0, sinks=4, window=28, profile={profile})")
    got = run_cache(model, cache, ids, [32, 32, 32])
    want = run_cache(model, DynamicCache(config=model.config), ids, [96])
    torch.testing.assert_close(got[:32], want[:32], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got[64:], want[64:], atol=1e-2)


def test_another_attention_for_a_while() -> None:
    for family in ("llama", "qwen3", "gemma3"):
        model = build(family)
        ids = prompt(60)
        with torch.no_grad():
            want = model(ids).logits
            with attending(model, lambda layer, q, k, v, scale: causal(q, k, v, scale)):
                torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)
            assert torch.equal(model(ids).logits, want)
    model = build("gemma2")
    with pytest.raises(ModelError, match="soft-cap"), attending(model, lambda layer, q, k, v, scale: q):
        model(prompt(9))


def test_gates_open_are_full_and_shut_are_streaming() -> None:
    model, ids = build("llama"), prompt(80)
    shown = streaming(80, 4, 20)
    assert int(shown[79].sum()) == 24 and int(shown[10].sum()) == 11
    cache = KVCache(model, "full")
    with torch.no_grad():
        want = run_cache(model, cache, ids, [80])
        with attending(model, gated(torch.ones(3, 2), shown)):
            torch.testing.assert_close(model(ids).logits[0], want, atol=1e-4, rtol=1e-4)
        with attending(model, gated(torch.zeros(3, 2), shown)):
            got = model(ids).logits[0]
        with attending(model, lambda layer, q, k, v, scale: causal(q, k, v, scale, shown)):
            torch.testing.assert_close(model(ids).logits[0], got, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, want, atol=1e-2)


def test_passkeys_come_again() -> None:
    text = torch.arange(1000)
    ids, answers = passkeys(text, 4, torch.Generator().manual_seed(0))
    assert len(ids) == 1000 and len(answers) == 4 * 28
    for row in answers.tolist():
        at = (ids[: 1000 - 128] == ids[row + 1]).nonzero()[:, 0].tolist()
        assert any(torch.equal(ids[i - 4 : i], ids[row - 3 : row + 1]) for i in at if i >= 4)


def test_training_shuts_gates_that_are_not_needed() -> None:
    """Heads whose output goes nowhere can be shut at no cost; with no price on gates, all stay open where it hurts."""
    model, told = build("llama"), []
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[:, :32] = 0.0  # the first KV head's queries
    flags = [p.requires_grad for p in model.parameters()]
    ids = torch.randint(3, 300, (600,), generator=torch.Generator().manual_seed(0))
    gates = train(model, ids, told.append, steps=30, length=256, sinks=4, recent=16, rate=0.1, weight=0.5)
    assert bool((gates[:, 0] < 0.2).all()) and told and flags == [p.requires_grad for p in model.parameters()]
    free = train(model, ids, told.append, steps=5, length=256, sinks=4, recent=16, rate=0.1, weight=0.0)
    assert float(free[:, 1].mean()) > 0.9 and free.shape == (3, 2)


@pytest.mark.parametrize("text", ["duoattention(sparsity=1.5)", "duoattention(sinks=-1)", "duoattention(window=0)"])
def test_options(text: str) -> None:
    with pytest.raises(RecipeError):
        parse(text)
