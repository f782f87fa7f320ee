"""KIVI (arXiv 2402.02750) against dense quantization on the same schedule."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvloom import KVCache, RecipeError, parse
from kvloom.segments.minmax import MinMax
from tests.families import build, prompt
from tests.reference import Kivi, layers_of, run, run_cache

SIZES = {
    "decode": [40] + [1] * 40,
    "multiple of the residual": [48] + [1] * 20,
    "single tokens": [1] * 50,
    "chunks": [20, 9, 1, 1, 33, 1, 1],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("group", "residual"), [(8, 16), (16, 16), (8, 8)])
def test_logits_equal_dense_quantization(sizes: list[int], bits: int, group: int, residual: int) -> None:
    model, ids = build("llama"), prompt(sum(sizes))
    want = run(Kivi(model, bits, group, residual), ids, sizes)
    got = run_cache(model, KVCache(model, f"kivi(bits={bits}, group={group}, residual={residual})"), ids, sizes)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_1_bit_for_bit_below_the_residual(dtype: torch.dtype) -> None:
    """T < R: nothing is frozen, the same as a cache without quantization."""
    model, ids, sizes = build("llama").to(dtype), prompt(63), [40] + [1] * 23
    want = run_cache(model, KVCache(model, "full"), ids, sizes)
    got = run_cache(model, KVCache(model, "kivi(bits=2, group=8, residual=64)"), ids, sizes)
    assert torch.equal(got, want)
    if dtype == torch.float32:
        stock = run_cache(model, DynamicCache(config=model.config), ids, sizes)
        torch.testing.assert_close(got, stock, atol=1e-4, rtol=1e-4)


def test_1_prompt_logits_are_exact() -> None:
    model, ids = build("llama"), prompt(60)
    want = run_cache(model, KVCache(model, "full"), ids, [60])
    assert torch.equal(run_cache(model, KVCache(model, "kivi(bits=1, group=8, residual=8)"), ids, [60]), want)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_2_frozen_lengths(sizes: list[int]) -> None:
    """Keys R * floor(n / R), values max(0, n - R), the rest exact, both planes complete."""
    model, r = build("llama"), 16
    cache = KVCache(model, f"kivi(bits=2, group=8, residual={r})")

    def check(length: int) -> None:
        for layer in layers_of(cache):
            segment = layer.groups[0].segments["main"]
            assert segment.key.frozen == r * (length // r)
            assert segment.value.frozen == max(0, length - r)
            assert segment.key.n == segment.value.n == length

    run_cache(model, cache, prompt(sum(sizes)), sizes, check)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_3_error_is_at_most_half_a_step(bits: int) -> None:
    model, ids, sizes = build("llama"), prompt(80), [60] + [1] * 20
    exact, small = KVCache(model, "full"), KVCache(model, f"kivi(bits={bits}, group=8, residual=16)")
    run_cache(model, exact, ids, sizes)
    run_cache(model, small, ids, sizes)
    # the first layer's keys and values do not depend on what the cache lost
    for plane in ("key", "value"):
        want, got = (
            torch.cat([run.decode() for run in getattr(layers_of(c)[0].groups[0].segments["main"], plane).runs], 1)
            for c in (exact, small)
        )
        n = getattr(layers_of(small)[0].groups[0].segments["main"], plane).frozen
        x, y = want[:, :n], got[:, :n].float()
        grouped = (
            (lambda t: t.unflatten(1, (-1, 8)).transpose(2, 3))
            if plane == "key"
            else (lambda t: t.unflatten(2, (-1, 8)))
        )
        x, y = grouped(x), grouped(y)
        top = x.abs().amax(-1, keepdim=True)
        step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1)
        # rounding of an fp16 minimum, and of an fp16 scale times the largest code
        slack = 2**-11 * (top + (2**bits - 1) * step) + 1e-6
        assert ((x - y).abs() <= step / 2 + slack).all()
        assert torch.equal(want[:, n:], got[:, n:])


@pytest.mark.parametrize("bits", [2, 4])
def test_4_per_channel_beats_per_token_on_outlier_channels(bits: int) -> None:
    keys = torch.randn(2, 64, 32)
    keys[:, :, [3, 17]] = 20 + 2 * keys[:, :, [3, 17]]
    errors = []
    for along in ("tokens", "channels"):
        codec = MinMax(bits, 32, along)  # type: ignore[arg-type]
        errors.append((codec.decode(codec.encode(keys, {}), {}) - keys).square().mean())
    assert errors[0] < 0.2 * errors[1]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [10, 47, 80])
def test_5_bytes_equal_the_formula(bits: int, length: int) -> None:
    model, group, r, d = build("llama"), 8, 16, 16
    cache = KVCache(model, f"kivi(bits={bits}, group={group}, residual={r})")
    run_cache(model, cache, prompt(length), [length])
    keys, values = r * (length // r), max(0, length - r)
    each = d * bits / 8 + 4 * d / group
    want = (keys + values) * each + (2 * length - keys - values) * 4 * d
    assert cache.report().used == want * 2 * 3  # KV heads, layers
    assert cache.recipe.nbytes(layers_of(cache)[0].site, {"main": length}) * 3 == cache.report().used


def test_options() -> None:
    for wrong in ("bits=5", "group=12", "residual=100", "group=0", "residual=0", "bits=0"):
        with pytest.raises(RecipeError):
            parse(f"kivi({wrong})")
    with pytest.raises(RecipeError, match="head size"):
        KVCache(build("llama"), "kivi(group=32)")


def test_many_rows_behind_a_single_group() -> None:
    """One group of keys decodes to a transposed view, which fused kernels must not take as it lies."""
    model, ids = build("llama"), prompt(120)
    whole = run_cache(model, KVCache(model, "full"), ids, [16, 104])
    got = run_cache(model, KVCache(model, "kivi(bits=8, group=16, residual=16)"), ids, [16, 104])
    assert float((got - whole).square().mean()) < 0.02**2 * float(whole.var())
