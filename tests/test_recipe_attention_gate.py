"""Attention-Gate (arXiv 2410.12876): gates that are open change nothing, those that are shut free bytes; how they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvloom import KVCache, RecipeError, parse
from kvloom.core import profile as profiles
from kvloom.core.override import attending, causal
from kvloom.policies.token_gates import evicting, fresh, train
from tests.families import build, prompt
from tests.reference import Full, Slots, kept, run_cache
from tests.test_recipe_selection import SIZES, compare


def random_gates() -> dict[str, Tensor]:
    """About half open."""
    found = fresh(3, 2, 32)
    return {**found, "out": 20 * found["out"], "bias": 0 * found["bias"]}


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "gates.safetensors"
    profiles.save(path, build("llama"), "attention-gate", random_gates())
    return repr(str(path))


def plain_gate(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Logits [n] of one head from x [n, wide], token by token."""
    read = torch.nn.functional.gelu(x @ w["read"])
    means = torch.stack([part.mean(0) for part in read.split(16)])
    logits = []
    for row in read:
        p = ((row @ w["query"]) @ (means @ w["key"]).T / 4).softmax(-1)
        logits.append(torch.cat([row, p @ (means @ w["value"])]) @ w["out"] + w["bias"])
    return torch.stack(logits)


class Gated(Full):
    """New tokens of a forward of several leave as a gate over their keys before RoPE and values says."""

    def __init__(self, model: Any, gates: dict[str, Tensor]) -> None:
        super().__init__(model)
        self.gates = gates

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        self.raw = k, v
        return super().attend(layer, q, k, v, start)

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        m, n = p.shape[1], len(s.k)
        if m == 1 and n > 1:
            return
        norm = [torch.nn.functional.layer_norm(x[head], (16,)) for x in self.raw]
        logits = plain_gate(torch.cat(norm, -1), {name: w[layer, head] for name, w in self.gates.items()})
        stays = torch.cat([torch.ones(n - m, dtype=torch.bool), logits > 0]) | (s.index == 0)
        s.keep(stays.nonzero()[:, 0])


@pytest.mark.parametrize("sizes", [SIZES["decode"], SIZES["chunks and turns"], [1, 30, 1, 1]])
def test_shut_gates_drop_tokens(sizes: list[int], profile: str) -> None:
    """A cache that is really shorter gives what masks would: dropped tokens are seen by no later query."""
    compare(f"attention-gate(profile={profile})", Gated(build("llama"), random_gates()), sizes)


def test_open_gates_change_nothing(profile: str) -> None:
    model, ids, sizes = build("llama"), prompt(90), [80] + [1] * 10
    want = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    got = run_cache(model, KVCache(model, f"attention-gate(threshold=0.0, profile={profile})"), ids, sizes)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_flags_differ_and_bytes_are_freed(profile: str) -> None:
    model, found = build("llama"), []
    for seed in (0, 1):
        cache = KVCache(model, f"attention-gate(profile={profile})")
        run_cache(model, cache, prompt(300, seed=seed), [300])
        found.append(kept(cache))
    heads = [tuple(head) for layers in found for layer in layers for head in layer]
    assert len(set(heads)) == 12 and all(0 in head for head in heads)
    share = sum(map(len, heads)) / (12 * 300)
    full = KVCache(model)
    run_cache(model, full, prompt(300), [300])
    assert 0.2 < share < 0.8 and cache.report().used < (share + 0.15) * full.report().used


def test_a_stricter_threshold_keeps_less_and_codecs_compose(profile: str) -> None:
    model, counts = build("llama"), []
    for t in (0.2, 0.5, 0.8):
        cache = KVCache(
            model, f"attention-gate(threshold={t}, profile={profile}) | kivi(bits=4, group=16, residual=16)"
        )
        assert bool(run_cache(model, cache, prompt(150), [100, 1, 1, 30] + [1] * 18).isfinite().all())
        counts.append(sum(len(head) for layer in kept(cache) for head in layer))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


def test_training_sees_what_the_cache_does(profile: str) -> None:
    """The attention that gates are trained in is that of a cache with the same gates."""
    model, ids = build("llama"), prompt(80)
    opened: list[Tensor] = []
    ropes = [layer.site.rope for layer in KVCache(model).managed()]
    with torch.no_grad(), attending(model, evicting(random_gates(), ropes, [0, 1, 2], 60, opened)):
        want = model(ids).logits[0]
    got = run_cache(model, KVCache(model, f"attention-gate(profile={profile})"), ids, [60] + [1] * 20)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)
    assert len(opened) == 3 and 0.2 < float(torch.stack(opened).mean()) < 0.8


def test_gradients_pass_through_hard_flags_and_a_price_shuts_gates() -> None:
    model, told = build("llama"), []
    gates = {name: x.requires_grad_() for name, x in random_gates().items()}
    ropes = [layer.site.rope for layer in KVCache(model).managed()]
    with attending(model, evicting(gates, ropes, [0, 1, 2], 60, [])):
        model(prompt(80)).logits[0, 60:].square().sum().backward()
    assert all(x.grad is not None and bool((x.grad != 0).any()) for x in gates.values())
    ids = torch.randint(3, 300, (600,), generator=torch.Generator().manual_seed(0))
    flags = [p.requires_grad for p in model.parameters()]
    found = train(model, ids, told.append, share=0.0, steps=40, length=400, rate=0.05, weight=50.0)
    assert float(told[-1].split("open ")[1]) < 0.3 < float(told[0].split("open ")[1])
    assert flags == [p.requires_grad for p in model.parameters()] and found["read"].shape == (3, 2, 32, 32)
    with torch.no_grad(), attending(model, lambda layer, q, k, v, scale: causal(q, k, v, scale)):
        assert bool(model(prompt(9)).logits.isfinite().all())


@pytest.mark.parametrize("text", ["attention-gate(threshold=1.0)", "attention-gate(threshold=-0.1)"])
def test_options(text: str) -> None:
    with pytest.raises(RecipeError):
        parse(text)
