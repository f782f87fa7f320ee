"""Accurate block quantization (arXiv 2403.20137): sorted key channels in block floating point."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom import KVCache, RecipeError, parse
from kvloom.core.recipe import Recipe
from kvloom.core.segment import Kind
from kvloom.lab.measure import load_model
from kvloom.segments.floats import BlockFloat
from kvloom.segments.permute import Permute
from tests.families import build, prompt, subject
from tests.reference import layers_of, run_cache
from tests.test_recipe_fireq import Kept

NAME = "accurate-block-quantization"


def by_hand(x: list[float], bits: int) -> list[float]:
    """One block, by the definition."""
    top = max(map(abs, x))
    if top == 0:
        return [0.0] * len(x)
    step = 2.0 ** (math.floor(math.log2(top)) + 2 - bits)
    return [max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, round(v / step))) * step for v in x]


@pytest.mark.parametrize("family", ["llama", "qwen3", "falcon-mqa"])
@pytest.mark.parametrize("sort", ["weights", "keys"])
def test_1_before_rounding_sorted_channels_change_nothing(family: str, sort: str) -> None:
    model, ids, sizes = subject(family), prompt(90), [50] + [1] * 20 + [20]
    made = parse(f"{NAME}(sort={sort!r})").ready(model).kinds["main"].key
    assert isinstance(made, Permute) and made.orders
    assert any(not torch.equal(order[0], order[0].sort().values) for order in made.orders.values())
    recipe = Recipe("sorted", kinds={"main": Kind(Permute(Kept(), made.orders), Permute(Kept(), made.orders))})
    want = run_cache(model, KVCache(model, "full"), ids, sizes)
    torch.testing.assert_close(run_cache(model, KVCache(model, recipe), ids, sizes), want, atol=3e-4, rtol=1e-4)


def test_2_one_block_for_the_head_does_not_mind_the_order() -> None:
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    order = torch.stack([torch.randperm(64), torch.randperm(64)]).to(torch.int16)
    plain, moved = BlockFloat(4, None), Permute(BlockFloat(4, None), {0: order})
    const = {"order": order}
    assert torch.equal(moved.decode(moved.encode(x, const), const), plain.decode(plain.encode(x, {}), {}))


def test_3_sorting_spares_the_channels_beside_outliers() -> None:
    """Keys of the bundled model with planted outliers."""
    model, tokenizer = load_model("nano+outliers")
    ids = torch.tensor([tokenizer.encode("It was a bright cold day in April. " * 40, add_special_tokens=False)[:300]])
    made = parse(NAME).ready(model).kinds["main"].key
    assert isinstance(made, Permute) and made.orders
    cache = KVCache(model, "full")
    run_cache(model, cache, ids, [ids.shape[1]])
    gains, calm = [], []
    for layer in layers_of(cache):
        x = layer.groups[0].segments["main"].key.dense(0, 300)
        const = {"order": made.orders[layer.site.layer]}
        code = BlockFloat(4, 32)
        gaps = [code.decode(code.encode(x, {}), {}) - x, made.decode(made.encode(x, const), const) - x]
        # the calmer half of each head's channels, where a shared exponent does the harm
        quiet = x.abs().amax(1).argsort(-1)[:, :32, None].expand(-1, -1, 300).transpose(1, 2)
        gains.append([float(gap.square().mean()) for gap in gaps])
        calm.append([float(gap.gather(2, quiet).square().mean()) for gap in gaps])
    total = torch.tensor(gains).sum(0)
    assert total[1] < total[0]
    mild = torch.tensor(calm).sum(0)
    assert mild[1] < 0.5 * mild[0]


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [("block=8", 16 / 2 + 2, 16 + 2), ("block=16, value_bits=4", 16 / 2 + 1, 16 / 2 + 1), ("", 16 / 2 + 1, 16 + 1)],
)
def test_4_bytes(options: str, key: float, value: float) -> None:
    model, n = build("llama"), 61
    cache = KVCache(model, f"{NAME}({options})")
    run_cache(model, cache, prompt(n), [40] + [1] * 21)
    planes = cache.report().by("plane")
    assert planes["key",] == 3 * 2 * n * key and planes["value",] == 3 * 2 * n * value
    assert planes["constant",] == 3 * 2 * 16 * 2
    assert cache.recipe.nbytes(layers_of(cache)[0].site, {"main": n}) == 2 * n * (key + value)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=False, width=32), min_size=8, max_size=8),
    st.sampled_from([2, 3, 4, 8]),
)
def test_block_floating_point(x: list[float], bits: int) -> None:
    codec = BlockFloat(bits, 8)
    got = codec.decode(codec.encode(torch.tensor(x)[None, None], {}), {})
    if max(map(abs, x)) > 1e-30:
        assert got.flatten().tolist() == by_hand(x, bits)


def test_kernels_read_it_where_it_lies() -> None:
    """Exponents are scales of theirs."""
    model, ids = subject("llama", head_dim=64), prompt(200)
    cache = KVCache(model, f"{NAME}(value_bits=4)")
    run_cache(model, cache, ids, [150])
    segment, kept = layers_of(cache)[0].groups[0].segments["main"], list[Tensor]()
    assert segment.key.runs[0].describe(torch.randn(2, 2, 64), kept) is not None
    assert segment.value.runs[0].describe(None, kept) is not None


def test_mantissas() -> None:
    """More bits, less error; exact in the limit of what 8 bits hold."""
    x = torch.randn(1, 100, 64)
    errors = [float((c.decode(c.encode(x, {}), {}) - x).norm()) for c in (BlockFloat(b, 32) for b in (2, 3, 4, 8))]
    assert errors == sorted(errors, reverse=True)
    whole = torch.randint(-64, 65, (1, 10, 64)).float() * 2.0**-20
    whole[..., 0] = 64 * 2.0**-20
    c = BlockFloat(8, 64)
    assert torch.equal(c.decode(c.encode(whole, {}), {}), whole)


def test_options() -> None:
    for wrong in ("bits=5", "block=7", "value_bits=1", "sort='size'"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0].removeprefix("value_")):
            parse(f"{NAME}({wrong})")
    with pytest.raises(RecipeError, match="does not divide"):
        KVCache(build("llama", head_dim=24), f"{NAME}(block=16)")
