"""xKV: layers in one subspace, against torch's singular value decomposition and a plain decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom import KVCache, RecipeError
from kvloom.lab.measure import NANO, load_model
from kvloom.segments.subspace import Subspace
from tests.families import prompt, subject
from tests.reference import Full, layers_of, rope, run, run_cache


def factored(planes: list[Tensor], rank: int) -> list[Tensor]:
    code = Subspace(rank, len(planes))
    return [code.decode(block, {}) for block in code.encode_together(planes, [{}] * len(planes))]


@pytest.mark.parametrize("count", [1, 3])
def test_the_error_is_that_of_the_singular_values_left_out(count: int) -> None:
    torch.manual_seed(0)
    planes = [torch.randn(2, 50, 8) @ torch.randn(2, 8, 8) for _ in range(count)]
    wide = torch.cat([x.transpose(0, 1).flatten(1) for x in planes], 1)
    u, s, v = torch.linalg.svd(wide.double(), full_matrices=False)
    for rank in (1, 7, 16 * count):
        got = torch.cat([x.transpose(0, 1).flatten(1) for x in factored(planes, rank)], 1)
        want = (u[:, :rank] * s[:rank]) @ v[:rank]
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)
        error, rest = (got - wide).double().norm(), s[rank:].square().sum().sqrt()
        torch.testing.assert_close(error, rest, atol=2e-4, rtol=1e-4)


def test_layers_of_one_subspace_need_no_more_rank() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(60, 5)
    planes = [
        (tokens @ torch.randn(5, 16) + 0.1 * torch.randn(60, 16)).unflatten(1, (2, 8)).transpose(0, 1) for _ in range(4)
    ]
    error = sum((x - y).square().sum() for x, y in zip(factored(planes, 12), planes, strict=True))
    alone = sum((factored([x], 3)[0] - x).square().sum() for x in planes)
    assert error <= alone
    assert sum((x - y).square().sum() for x, y in zip(factored(planes, 5), planes, strict=True)) < alone


def test_attention_on_the_factors() -> None:
    torch.manual_seed(0)
    code, planes = Subspace(9, 2), [torch.randn(2, 70, 16) for _ in range(2)]
    q, p = torch.randn(2, 3, 16), torch.rand(2, 3, 70)
    for block in code.encode_together(planes, [{}, {}]):
        x = code.decode(block, {})
        torch.testing.assert_close(code.dot(q, block, {}, 0.5), 0.5 * q @ x.mT, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(code.mix(p, block, {}), p @ x, atol=1e-4, rtol=1e-4)


class Together(Full):
    """Factors keys before RoPE and values after the prompt, by torch's own decomposition; keys turn when they are read."""

    rank = (12, 20)

    def store(self, k: Tensor, place: Tensor) -> Tensor:
        return k

    def logits(self, layer: int, head: int, q: Tensor, s: Any, place: Tensor) -> Tensor:
        return rope(self.model, q, place) @ rope(self.model, s.k, s.index).T

    def after(self, layer: int, head: int, s: Any, q: Tensor, p: Tensor) -> None:
        if p.shape[1] == 1 or layer != 2 or head != 1:
            return
        every = [self.slots[i, h] for i in range(3) for h in range(2)]
        for name, rank in zip(("k", "v"), self.rank, strict=True):
            wide = torch.cat([getattr(each, name) for each in every], 1).double()
            u, sigma, v = torch.linalg.svd(wide, full_matrices=False)
            thin = ((u[:, :rank] * sigma[:rank]) @ v[:rank]).float()
            for each, x in zip(every, thin.chunk(6, 1), strict=True):
                setattr(each, name, x)


def test_against_a_plain_implementation() -> None:
    """Positions, too: a decoded token meets keys turned to where they stood."""
    model, ids = subject("llama"), prompt(80)
    want = run(Together(model), ids, [60] + [1] * 20)
    cache = KVCache(model, "xkv(layers=3, key_rank=12, value_rank=20)")
    torch.testing.assert_close(run_cache(model, cache, ids, [60] + [1] * 20), want, atol=2e-3, rtol=1e-3)
    for layer in layers_of(cache):
        main = layer.groups[0].segments["main"]
        assert main.key.frozen == main.value.frozen == 60 and main.n == 80


def test_short_texts_and_full_rank_stay_exact() -> None:
    model, ids = subject("llama"), prompt(90)
    full = run_cache(model, KVCache(model, "full"), ids, [60] + [1] * 20 + [10])
    got = run_cache(model, KVCache(model, "xkv(key_rank=1.0, value_rank=1.0)"), ids, [60] + [1] * 20 + [10])
    torch.testing.assert_close(got, full, atol=3e-4, rtol=0)
    cache = KVCache(model, "xkv(layers=3, key_rank=40, value_rank=40)")
    run_cache(model, cache, ids, [30, 10, 20])  # 40 numbers for each of n tokens and 96 channels: smaller from 69 on
    assert layers_of(cache)[0].groups[0].segments["main"].key.frozen == 0
    run_cache(model, cache, ids, [1] * 5 + [10, 5])
    assert layers_of(cache)[0].groups[0].segments["main"].key.frozen == 75


def test_bytes_are_those_of_the_card() -> None:
    model, n = subject("llama", num_hidden_layers=4), 400
    cache = KVCache(model, "xkv")
    run_cache(model, cache, prompt(n + 10), [n] + [1] * 10)
    channels, item = 4 * 2 * 16, 4
    ranks = round(0.125 * channels) + round(0.1875 * channels)
    assert cache.report().used == ranks * (n + channels) * item + 10 * 2 * channels * item


@pytest.fixture(scope="module")
def lost() -> Any:
    """KL to the full cache on the bundled model and bytes, for options of xkv."""
    model, tokenizer = load_model("nano")
    text = (NANO.parent / "text" / "gutenberg.txt").read_text(encoding="utf-8")[30000:40000]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1224]

    def measured(recipe: str) -> tuple[float, int]:
        cache = KVCache(model, recipe)
        run_cache(model, cache, ids, [1200])
        used = cache.report().used
        got = run_cache(model, cache, ids, [1] * 24).log_softmax(-1)
        return float((full.exp() * (full - got)).sum(-1).mean()), used

    cache = KVCache(model)
    run_cache(model, cache, ids, [1200])
    full = run_cache(model, cache, ids, [1] * 24).log_softmax(-1)
    return measured


def test_layers_together_beat_each_alone_at_equal_bytes(lost: Any) -> None:
    together, used = lost("xkv(layers=6)")
    alone, more = lost("xkv(layers=1, key_rank=0.2, value_rank=0.3)")
    assert used <= more and together < alone


def test_keys_before_rope_need_less_rank(lost: Any) -> None:
    assert lost("xkv(layers=3)")[0] < 0.7 * lost("xkv(layers=3, keys='post-rope')")[0]


@pytest.mark.parametrize(
    "options", ["layers=0", "layers=2.0", "key_rank=0", "key_rank=1.5", "value_rank=True", "keys='no'"]
)
def test_impossible_options_are_refused(options: str) -> None:
    with pytest.raises(RecipeError):
        KVCache(subject("llama"), f"xkv({options})")
