"""GEAR (arXiv 2403.05527)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvloom import KVCache, RecipeError, parse
from kvloom.core.codec import Codec
from kvloom.core.recipe import Recipe
from kvloom.core.segment import Kind, Tail
from kvloom.segments.lowrank import LowRank
from kvloom.segments.minmax import MinMax
from kvloom.segments.outliers import ChannelOutliers, TokenOutliers
from tests.families import build, prompt
from tests.reference import layers_of, run_cache


def heavy(seed: int = 0) -> Tensor:
    """Numbers with long tails and an error that a few directions explain, [2, 128, 32]."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 128, 32, generator=draw) / (torch.rand(2, 128, 32, generator=draw) + 0.05)
    return x + torch.randn(2, 128, 1, generator=draw) * torch.randn(2, 1, 32, generator=draw)


def error(codec: Codec, x: Tensor) -> float:
    return float((codec.decode(codec.encode(x, {}), {}) - x).norm())


def test_1_without_outliers_and_rank_it_is_the_backbone() -> None:
    model, ids, sizes = build("llama"), prompt(70), [50] + [1] * 20
    tail = Tail(every=16)
    backbone = Recipe("b", kinds={"main": Kind(MinMax(2, 16, "tokens"), MinMax(2, 16, "channels"), tail, tail)})
    want = run_cache(model, KVCache(model, backbone), ids, sizes)
    got = run_cache(model, KVCache(model, "gear(group=16, residual=16, outliers=0.0, rank=0, late_rank=0)"), ids, sizes)
    assert torch.equal(got, want)


@pytest.mark.parametrize("chunk", [None, 32])
def test_2_error_falls_with_rank_to_nothing(chunk: int | None) -> None:
    x = heavy()
    found = [error(LowRank(MinMax(2, 16, "channels"), rank, chunk, loops=6), x) for rank in (1, 2, 4, 8, 16, 32)]
    assert all(a > b for a, b in itertools.pairwise(found))
    assert found[-1] < 2e-3 * float(x.norm())  # what 16-bit factors leave


@pytest.mark.parametrize("code", [MinMax(2, 32, "tokens"), MinMax(2, 32, "channels")])
def test_3_outliers_are_exact(code: Codec) -> None:
    x = heavy()
    for codec, along in ((ChannelOutliers(code, 0.1), 1), (TokenOutliers(code, 0.1, "head"), 2)):
        y = codec.decode(codec.encode(x, {}), {})
        each = round(0.05 * x.shape[along])
        for largest in (True, False):
            place = x.topk(each, along, largest).indices
            assert torch.equal(y.gather(along, place), x.gather(along, place))
    joint = TokenOutliers(code, 0.1)
    y, wide = joint.decode(joint.encode(x, {}), {}).transpose(0, 1).flatten(1), x.transpose(0, 1).flatten(1)
    place = wide.topk(round(0.05 * 64)).indices  # over both heads together
    assert torch.equal(y.gather(1, place), wide.gather(1, place))


def test_4_attention_on_factors_equals_attention_on_what_they_say() -> None:
    """Also in tests/test_codecs.py, for drawn codecs; here at the defaults, with the whole cache."""
    model, ids, sizes = build("llama"), prompt(90), [60] + [1] * 30
    cache = KVCache(model, "gear(group=16, residual=16, outliers=0.1)")
    run_cache(model, cache, ids, sizes)
    for layer in layers_of(cache):
        segment = layer.groups[0].segments["main"]
        q, p = torch.randn(2, 3, 16), torch.rand(2, 3, segment.n)
        at = 0
        for run in segment.value.runs:
            want = p[..., at : at + run.n] @ run.decode().float()
            torch.testing.assert_close(run.mix(p[..., at : at + run.n]), want, rtol=1e-4, atol=1e-4)
            at += run.n
        for run in segment.key.runs:
            want = 0.25 * q @ run.decode().float().transpose(1, 2)
            torch.testing.assert_close(run.dot(q, run.n, 0.25), want, rtol=1e-4, atol=1e-4)


def test_5_gear_beats_gear_l_beats_the_backbone() -> None:
    x = heavy()
    for base, sparse in (
        (MinMax(2, 32, "tokens"), ChannelOutliers(MinMax(2, 32, "tokens"), 0.05)),
        (MinMax(2, 32, "channels"), TokenOutliers(MinMax(2, 32, "channels"), 0.05)),
    ):
        assert error(LowRank(sparse, 4), x) < error(LowRank(base, 4), x) < error(base, x)


@pytest.mark.parametrize("sizes", [[100], [40] + [1] * 40, [20, 30, 1, 1, 30], [1] * 40])
def test_bytes_and_chunks(sizes: list[int]) -> None:
    """The prompt is one chunk, then every 16 tokens; each has its own factors. All exact where nothing is due."""
    model, d, share, r, late = build("llama"), 16, 0.1, 4, 2
    cache = KVCache(model, f"gear(group=16, residual=16, outliers={share}, rank={r}, late_rank={late})")
    run_cache(model, cache, prompt(sum(sizes)), sizes)
    chunks, buffered = [], 0
    for m in sizes:
        buffered += m
        if buffered >= 16:
            chunks.append(buffered // 16 * 16)
            buffered %= 16
    want = 2 * 2 * buffered * 4 * d  # heads, planes
    for n in chunks:
        rank = late if n == 16 else r
        want += 2 * 2 * (n * d * 2 / 8 + 4 * n * d / 16 + 2 * rank * (n + d))
        want += 2 * d * 2 * round(share / 2 * n) * (4 + 2)  # keys: of each channel along the chunk
        want += n * 2 * round(share / 2 * 2 * d) * (4 + 2)  # values: of each token along both heads
    assert cache.report().used == 3 * want  # layers
    assert cache.recipe.nbytes(layers_of(cache)[0].site, {"main": 96}) > 0


def test_exact_in_the_limit() -> None:
    model, ids, sizes = build("llama"), prompt(80), [50] + [1] * 30
    want = run_cache(model, KVCache(model, "full"), ids, sizes)
    for recipe in ("gear(group=16, residual=16, outliers=1.0)", "gear(bits=2, group=16, residual=96)"):
        torch.testing.assert_close(run_cache(model, KVCache(model, recipe), ids, sizes), want, atol=3e-4, rtol=1e-4)
    close = run_cache(model, KVCache(model, "gear(group=16, residual=16, rank=16, late_rank=16, loops=8)"), ids, sizes)
    assert float((close - want).abs().max()) < 0.02


def test_options() -> None:
    for wrong in (
        "bits=5", "group=12", "residual=100", "outliers=-0.1", "outliers=1.5", "rank=-1", "rank=1.5", "late_rank=100",
        "loops=0", "spread='row'",
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=wrong.partition("=")[0] if "late" not in wrong else "rank"):
            parse(f"gear({wrong})")
    with pytest.raises(RecipeError, match="head size 16"):
        KVCache(build("llama"), "gear(group=16, residual=32, rank=20)")
    with pytest.raises(RecipeError, match="layer"):
        parse("snapkv(budget=64) | gear")
    parse("snapkv(budget=64) | gear(spread='head')")
