"""OliVe (arXiv 2304.07493) as the code of a cache."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom import KVCache, RecipeError, parse
from kvloom.segments.pairs import LARGE, Pairs, _book, _codes
from tests.families import build, prompt
from tests.reference import layers_of, run_cache

SPANS = tuple(0.75 + 0.1 * i for i in range(18))
CONST = {"book": _book()}


def by_hand(y: list[float]) -> list[float]:
    """The rule for numbers in units of the scale, pair by pair."""
    levels = [*range(-7, 8), *LARGE, *(-x for x in LARGE)]
    near = [min(levels, key=lambda level, x=x: abs(level - x)) for x in y]
    out = []
    for a, b in zip(near[::2], near[1::2], strict=True):
        if abs(a) > 7:
            b = 0
        elif abs(b) > 7:
            a = 0
        out += [a, b]
    return out


def rare(n: int = 200, dim: int = 64, seed: int = 0) -> Tensor:
    """One number in fifty is ten times as large."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, dim, generator=draw)
    return torch.where(torch.rand(2, n, dim, generator=draw) < 0.02, 10 * x, x)


def test_1_without_outliers_it_is_fifteen_even_levels() -> None:
    x = torch.rand(2, 50, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codec = Pairs((1.0,))
    block = codec.encode(x, CONST)
    step = block["scale"].float()
    want = (x / step).round().clamp(-7, 7) * step
    assert float((x / step).abs().amax()) < 9.5
    torch.testing.assert_close(codec.decode(block, CONST), want)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-200, 200, allow_nan=False, width=32), min_size=2, max_size=16).filter(lambda x: len(x) % 2 == 0)
)
def test_2_a_pair_has_at_most_one_outlier_and_its_partner_is_zero(y: list[float]) -> None:
    x = torch.tensor(y)[None, None]
    codes, told = _codes(x)
    ties = {9.5, *((a + b) / 2 for a, b in pairwise(LARGE))}
    if not any(abs(v) in ties or abs(v) % 1 == 0.5 for v in y):
        assert told.flatten().tolist() == by_hand(y)
    for a, b in told.flatten().view(-1, 2).tolist():
        assert abs(a) <= 7 or b == 0
        assert abs(b) <= 7 or a == 0
    assert int(codes.amax()) <= 15
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    assert torch.equal(_book()[0, 0][packed.long()].flatten(2), told)


def test_3_rare_outliers_cost_less_than_one_scale_for_all() -> None:
    x = rare()
    codec = Pairs(SPANS)
    got = codec.decode(codec.encode(x, CONST), CONST)
    step = x.abs().amax(-1, keepdim=True) / 7
    plain = (x / step).round() * step
    assert float((got - x).square().mean()) < 0.5 * float((plain - x).square().mean())


def test_3_the_scale_is_the_best_of_those_tried() -> None:
    x = rare(40)
    best = Pairs(SPANS)
    errors = [(c.decode(c.encode(x, CONST), CONST) - x).square().sum(-1) for c in [best, *(Pairs((p,)) for p in SPANS)]]
    torch.testing.assert_close(errors[0], torch.stack(errors[1:]).amin(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dim", [16, 34])
def test_4_bytes(dim: int) -> None:
    model, n = build("llama", head_dim=dim), 61
    cache = KVCache(model, "olive")
    run_cache(model, cache, prompt(n), [40] + [1] * 21)
    planes = cache.report().by("plane")
    assert planes["key",] == planes["value",] == 3 * 2 * n * (dim // 2 + 2)
    assert planes["constant",] == 256 * 2 * 4
    assert cache.recipe.nbytes(layers_of(cache)[0].site, {"main": n}) * 3 == planes["key",] + planes["value",]
    block = layers_of(cache)[0].groups[0].segments["main"].key.runs[0].block
    assert block["codes"].shape == (2, n, dim // 2)


def test_lookup_is_the_product_with_what_is_decoded() -> None:
    x, q = rare(70, 32), torch.randn(2, 3, 32)
    codec = Pairs(SPANS)
    block = codec.encode(x, CONST)
    y = codec.decode(block, CONST)
    torch.testing.assert_close(codec.dot(q, block, CONST, 0.3), 0.3 * q @ y.transpose(1, 2), atol=1e-3, rtol=1e-4)
    zero = codec.encode(torch.zeros(1, 3, 16), CONST)
    assert bool((codec.decode(zero, CONST) == 0).all())


def test_options() -> None:
    for wrong in ("least=0", "most=-1", "step=0", "most=0.5", "step=0.0001"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            parse(f"olive({wrong})")
