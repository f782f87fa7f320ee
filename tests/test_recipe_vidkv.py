"""VidKV (arXiv 2503.16257): its codes, its split of channels, and tokens that are protected."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import KVCache, RecipeError, parse
from kvloom.policies.modality import relevance
from kvloom.segments.fewbits import Sign, Ternary
from kvloom.segments.minmax import MinMax
from kvloom.segments.rotate import Rotate, rotation
from kvloom.segments.split import ByRange
from tests.families import build, prompt, subject
from tests.reference import held, kept, layers_of, run_cache


@pytest.mark.parametrize("dim", [8, 15, 16, 64])
def test_1_fourier_is_rfft_and_turns_back(dim: int) -> None:
    p, x = rotation("fourier", dim, 0)[0], torch.randn(5, dim)
    torch.testing.assert_close(p @ p.T, torch.eye(dim), atol=1e-5, rtol=1e-5)
    waves = torch.fft.rfft(x)
    want = torch.cat([waves.real, waves.imag[:, 1 : (dim + 1) // 2]], 1)
    got = x @ p.T
    torch.testing.assert_close(got / got.abs().amax(0), want / want.abs().amax(0), atol=1e-4, rtol=1e-4)


@given(st.integers(0, 100), st.sampled_from([8, 32]), st.sampled_from([5, 16, 64]))
@settings(max_examples=10, deadline=None)
def test_2_and_4_signs_and_zeros(seed: int, group: int, dim: int) -> None:
    x = torch.randn(2, 3 * group, dim, generator=torch.Generator().manual_seed(seed))
    mean = x.unflatten(1, (3, group)).abs().mean(2).half().float()
    wide = mean.repeat_interleave(group, 1)
    for codec, want in (
        (Sign(group), torch.where(x >= 0, wide, -wide)),
        (Ternary(group), torch.where(x.abs() <= 0.5 * wide, torch.zeros(()), x.sign() * wide)),
    ):
        block = codec.encode(x, {})
        torch.testing.assert_close(codec.decode(block, {}), want)
        assert codec.nbytes(3 * group, 2, dim, 4) == sum(y.nbytes for y in block.values())
        assert float((want - x).square().sum()) < float(x.square().sum())  # better than nothing
    size = wide + 0.05  # the mean is the size of least error, for these signs
    assert float((x.sign() * wide - x).square().sum()) < float((x.sign() * size - x).square().sum())


def _keys(n: int = 256, dim: int = 32) -> torch.Tensor:
    """Keys whose channels drift slowly and differ in range."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(2, 1, dim, generator=draw) + 0.3 * torch.randn(2, n, dim, generator=draw)
    return base * torch.linspace(0.3, 3, dim)


def test_3_errors_are_in_order() -> None:
    """Two bits everywhere < 1.5 bits < signs in frequency space everywhere."""
    x, errors = _keys(), []
    for share in (1.0, 0.5, 0.0):
        codec = ByRange(MinMax(2, 32, "tokens"), Rotate(Sign(32), "fourier"), share)
        const = codec.fit(None, x)  # type: ignore[arg-type]
        wide = SimpleNamespace(key_dim=round(32 * (1 - share)), value_dim=0)
        const |= codec.easy.const(wide, "key") if share < 1 else {}  # type: ignore[arg-type]
        block = codec.encode(x, const)
        back = codec.decode(block, const)
        errors.append(float((back - x).square().mean()))
        q = torch.randn(2, 3, 32)
        torch.testing.assert_close(codec.dot(q, block, const, 0.5), 0.5 * q @ back.mT, atol=1e-2, rtol=1e-3)
    assert errors[0] < errors[1] < errors[2]


def test_channels_of_largest_range_are_hard_in_all_heads() -> None:
    x = torch.rand(2, 40, 16)
    x[1, :, [3, 5]] *= 9  # one head is enough
    x[0, :, 7] += 100  # a shift is no range
    codec = ByRange(MinMax(2, 8, "tokens"), Sign(8), 0.5)
    order = codec.fit(None, x)["order"][0]  # type: ignore[arg-type]
    assert {3, 5} <= set(order[:8].tolist()) and len(set(order.tolist())) == 16


def test_bits_per_number() -> None:
    """Without sizes: 1.5 bits for keys, 1.6 for values; with 16-bit sizes for 32 tokens as the card says."""
    site = SimpleNamespace(key_dim=128)
    recipe = parse("vidkv(protect=0.0)")
    main = recipe.kinds["main"]
    n, dim = 32 * 100, site.key_dim
    assert main.key.nbytes(n, 1, dim, 2) == n * (64 * 2 // 8 + 4 * 64 / 32 + 64 / 8 + 2 * 64 / 32)
    assert main.value.nbytes(n, 1, dim, 2) / n == pytest.approx(128 / 5 + 2 * 128 / 32, rel=1e-3)


def test_5_relevant_tokens_are_protected() -> None:
    """Image tokens, the most relevant first; text never; without a map or a share it is the plain ternary code."""
    model, ids = build("llama"), prompt(200)
    kinds = torch.zeros(200, dtype=torch.long)
    kinds[40:168] = 1
    weight = torch.rand(200)
    plain = run_cache(model, KVCache(model, "vidkv(protect=0.0)"), ids, [190] + [1] * 10)
    untold = run_cache(model, KVCache(model, "vidkv"), ids, [190] + [1] * 10)
    torch.testing.assert_close(untold, plain, atol=2e-3, rtol=1e-3)
    cache = KVCache(model, "vidkv(protect=0.5)").tokens(kinds, weight)
    got = run_cache(model, cache, ids, [190] + [1] * 10)
    want = sorted((weight[40:168].topk(64).indices + 40).tolist())
    assert all(head["clear"] == want for layer in held(cache) for head in layer)
    assert all(head == list(range(200)) for layer in kept(cache) for head in layer)
    full = run_cache(model, KVCache(model), ids, [190] + [1] * 10)
    assert float((got - full)[190:].square().mean()) < 1.1 * float((plain - full)[190:].square().mean())


def test_relevance_is_the_mean_product_with_text() -> None:
    x, kinds = torch.randn(9, 4), torch.tensor([0, 0, 1, 1, 2, 2, 0, 0, 0])
    want = (x @ x[kinds == 0].T).mean(1) * (kinds > 0)
    torch.testing.assert_close(relevance(x, kinds), want)


def test_frozen_groups_stay_as_they_are() -> None:
    model, ids = subject("llama"), prompt(150)
    cache = KVCache(model, "vidkv(protect=0.0)")
    run_cache(model, cache, ids, [70])
    before = layers_of(cache)[1].groups[0].segments["main"].key.runs[0].block["codes"].clone()
    run_cache(model, cache, ids, [1] * 40 + [20] + [1] * 20)
    plane = layers_of(cache)[1].groups[0].segments["main"].key
    assert plane.frozen == 128 and torch.equal(plane.runs[0].block["codes"][:, :2], before)


def test_options() -> None:
    for wrong in ("key_bits=2.5", "group=9", "protect=1.5"):
        with pytest.raises(RecipeError):
            parse(f"vidkv({wrong})")
