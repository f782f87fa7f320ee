"""Codecs: what comes back from bytes, how many bytes, and that computing on codes equals decoding first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.core.codec import Codec, Exact
from kvloom.core.site import Site
from kvloom.kernels.pack import BITS, pack, unpack
from kvloom.segments.balance import Balance
from kvloom.segments.floats import MANTISSAS, BlockFloat
from kvloom.segments.levels import Levels
from kvloom.segments.lowrank import LowRank
from kvloom.segments.minmax import MinMax
from kvloom.segments.outliers import ChannelOutliers, RangeOutliers, TokenOutliers
from kvloom.segments.pairs import Pairs
from kvloom.segments.permute import Permute
from kvloom.segments.product import Product
from kvloom.segments.project import Project
from kvloom.segments.prune import Prune
from kvloom.segments.rotate import Rotate
from kvloom.segments.sphere import SignResidual, Sphere
from kvloom.segments.symmetric import Symmetric

shapes = st.tuples(st.integers(1, 3), st.integers(0, 4), st.sampled_from([8, 16, 24, 64]))


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), rows=st.integers(0, 5), bytes_=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_pack_round_trip(bits: int, rows: int, bytes_: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, rows, 8 * bytes_), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, rows, bits * bytes_)
    assert torch.equal(unpack(packed, bits), codes)


def test_pack_layout() -> None:
    """Planes from the lowest bits up; 3 bits as a row of 2 and a row of 1."""
    assert pack(torch.tensor([1, 2, 3, 0, 3, 3, 0, 0], dtype=torch.uint8), 2).tolist() == [0b00111101, 0b00110010]
    assert pack(torch.tensor([7, 0, 4, 1, 0, 0, 0, 0], dtype=torch.uint8), 3).tolist() == [0b0011, 0b0100, 0b00000101]


def codecs() -> st.SearchStrategy[Codec]:
    tokens = st.builds(MinMax, st.sampled_from(BITS), st.sampled_from([8, 16]), st.just("tokens"))
    channels = st.builds(MinMax, st.sampled_from(BITS), st.sampled_from([8, None]), st.just("channels"))
    scopes, shares, chunks = (
        st.sampled_from(["layer", "head"]),
        st.sampled_from([0.0, 0.1, 0.5]),
        st.sampled_from([None, 16]),
    )
    spheres = st.builds(Sphere, st.sampled_from(BITS), st.booleans())
    levels = st.builds(Levels, st.sampled_from(BITS), st.sampled_from(["tokens", "channels"]), st.none(), scopes)
    sparse = st.one_of(
        st.builds(ChannelOutliers, st.one_of(tokens, channels), shares, chunks),
        st.builds(TokenOutliers, st.one_of(channels, levels), shares, scopes, st.booleans()),
        st.builds(RangeOutliers, st.builds(Levels, st.sampled_from(BITS), st.just("tokens")), shares, scopes),
    )
    low = st.builds(LowRank, st.one_of(tokens, channels, sparse), st.sampled_from([1, 4]), chunks)
    turned = st.builds(Rotate, st.one_of(spheres, st.builds(SignResidual, spheres), channels))
    bases = st.sampled_from([1, None]).flatmap(lambda join: st.builds(
        Project, st.one_of(st.builds(Exact), tokens), st.sampled_from([3, 8]), st.just(join), st.none(), st.booleans()
    ))  # fmt: skip
    pruned = st.builds(Prune, st.one_of(st.builds(Exact), tokens), st.sampled_from([0.0, 0.4]))
    blocks = st.builds(BlockFloat, st.sampled_from(MANTISSAS), st.sampled_from([8, None]))
    even = st.builds(Symmetric, st.sampled_from([2, 3, 4, 8]), st.sampled_from([8, None]), st.booleans())
    books = st.builds(Product, st.just(1), st.sampled_from(BITS))
    moved = st.builds(Permute, st.one_of(blocks, even, channels, books))
    return st.one_of(
        blocks,
        even,
        books,
        moved,
        tokens,
        channels,
        st.builds(Balance, channels),
        st.builds(Exact),
        sparse,
        low,
        turned,
        levels,
        pruned,
        bases,
    )


def draw_block(
    codec: Codec, h: int, units: int, dim: int, seed: int, size: float, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(h, units * codec.unit, dim, generator=generator) * size + size).to(dtype)
    site = Site(0, 1, h, h, dim, dim, dtype, lambda: None)
    const = codec.const(site, "key")
    if codec.fits:
        order = torch.stack([torch.randperm(dim, generator=generator) for _ in range(h)])
        const = {"balance": torch.rand(h, dim, generator=generator) + 0.5, "order": order.to(torch.int16)}
    if isinstance(codec, Permute):
        order = torch.stack([torch.randperm(dim, generator=generator) for _ in range(h)])
        const = {**const, "order": order.to(torch.int16)}
    if "book" in const and not isinstance(codec, Pairs):
        const = {**const, "book": torch.randn(const["book"].shape, generator=generator).mul(size).half()}
    return x, const, codec.encode(x, const)


anything = given(
    codec=codecs(), shape=shapes, seed=st.integers(0, 2**32), size=st.sampled_from([1e-3, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@anything
def test_bytes_equal_the_block(codec: Codec, shape: Any, seed: int, size: float, dtype: torch.dtype) -> None:
    h, units, dim = shape
    x, _, block = draw_block(codec, h, max(units, 1), dim, seed, size, dtype)
    assert sum(field.nbytes for field in block.values()) == codec.nbytes(x.shape[1], h, dim, dtype.itemsize)
    assert block.keys() == codec.per.keys()
    for name, field in block.items():
        per = codec.per[name]
        assert field.shape[0] in (1, h) and field.shape[1] == (x.shape[1] // per if per else 1)


@settings(max_examples=80, deadline=None)
@anything
def test_dot_and_mix_equal_decoding_first(codec: Codec, shape: Any, seed: int, size: float, dtype: torch.dtype) -> None:
    h, units, dim = shape
    x, const, block = draw_block(codec, h, max(units, 1), dim, seed, size, dtype)
    y = codec.decode(block, const).float()
    assert y.shape == x.shape
    q, p = torch.randn(h, 3, dim).to(dtype), torch.rand(h, 3, x.shape[1]).softmax(-1)
    dot, mix = codec.dot(q, block, const, 0.3), codec.mix(p, block, const)
    assert dot.dtype == mix.dtype == torch.float32
    close = (
        1e-4 if dtype == torch.float32 else 4e-4
    )  # what is decoded is rounded to 16 bits, what is computed on is not
    tolerance = close * float(y.abs().max() + 1e-6) * dim
    torch.testing.assert_close(dot, 0.3 * q.float() @ y.transpose(1, 2), atol=tolerance, rtol=1e-4)
    torch.testing.assert_close(mix, p @ y, atol=tolerance, rtol=1e-4)


@settings(max_examples=80, deadline=None)
@anything
def test_a_part_and_some_slots_decode_as_in_the_whole(
    codec: Codec, shape: Any, seed: int, size: float, dtype: torch.dtype
) -> None:
    h, units, dim = shape
    x, const, block = draw_block(codec, h, units + 2, dim, seed, size, dtype)
    whole, unit, n = codec.decode(block, const), codec.unit, x.shape[1]
    assert codec.slots(block) == n
    part = codec.cut(block, unit, n)
    torch.testing.assert_close(codec.decode(part, const), whole[:, unit:], rtol=1e-5, atol=1e-5 * size)
    draw = torch.Generator().manual_seed(seed)
    kept = torch.stack([torch.randperm(units + 2, generator=draw)[: units + 1].sort().values for _ in range(h)])
    kept = kept[:1].expand(h, -1) if codec.scope == "layer" else kept
    slots = (kept[..., None] * unit + torch.arange(unit)).flatten(1)
    some = codec.take(block, slots)
    want = whole.gather(1, slots[..., None].expand(-1, -1, dim))
    torch.testing.assert_close(codec.decode(some, const), want, rtol=1e-5, atol=1e-5 * size)
    # what was taken is a block like any other
    part = codec.cut(some, unit, slots.shape[1]) if units else some
    torch.testing.assert_close(codec.decode(part, const), want[:, unit if units else 0 :], rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("n", [4096, 16384])
def test_attention_never_decodes_much_at_once(n: int) -> None:
    """Of 2 heads of 64 channels no more than an eighth is decoded at a time."""
    x, q, p = torch.randn(2, n, 64), torch.randn(2, 2, 64), torch.rand(2, 2, n)
    site = Site(0, 1, 2, 2, 64, 64, torch.float32, lambda: None)
    for codec in (
        LowRank(ChannelOutliers(MinMax(2, 32, "tokens"), 0.02), 4), TokenOutliers(MinMax(2, 32, "channels"), 0.02),
        Rotate(Sphere(4)), Rotate(SignResidual(Sphere(3))), RangeOutliers(Levels(3, "tokens"), 0.01),
    ):  # fmt: skip
        const, most = codec.const(site, "key"), 0
        block, base = codec.encode(x, const), codec
        while hasattr(base, "inner"):
            base = base.inner
        decode = base.decode

        def watched(block: Any, const: Any, decode: Any = decode) -> torch.Tensor:
            nonlocal most
            y: torch.Tensor = decode(block, const)
            most = max(most, y.numel())
            return y

        base.decode = watched  # type: ignore[method-assign]
        codec.dot(q, block, const, 1.0)
        codec.mix(p, block, const)
        assert 0 < most <= x.numel() / 8, codec


@settings(max_examples=100, deadline=None)
@given(
    bits=st.sampled_from(BITS), along=st.sampled_from(["tokens", "channels"]), group=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**32), size=st.sampled_from([1e-3, 1.0, 300.0]), offset=st.sampled_from([0.0, -5.0, 1000.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_minmax_error(
    bits: int, along: Any, group: int, seed: int, size: float, offset: float, dtype: torch.dtype
) -> None:
    """Half a step of the group, and the rounding of a 16-bit minimum and scale."""
    x = (torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(seed)) * size + offset).to(dtype)
    codec = MinMax(bits, group, along)
    got = codec.decode(codec.encode(x, {}), {}).float()
    x = x.float()
    if along == "tokens":
        x, got = x.transpose(1, 2), got.transpose(1, 2)
    x, got = x.unflatten(-1, (-1, group)), got.unflatten(-1, (-1, group))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    subnormal = 2.0**-25 * 2**bits if dtype != torch.bfloat16 else 0.0  # of an fp16 scale below 2**-14, times a code
    slack = unit * (low.abs() + 2 * (high - low)) + subnormal + 1e-6
    assert ((got - x).abs() <= (high - low) / (2**bits - 1) / 2 + slack).all()


@pytest.mark.parametrize("along", ["tokens", "channels"])
@pytest.mark.parametrize("value", [0.0, 3.0, -7.5, 1e-7, 60000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_constant_groups(along: Any, value: float, dtype: torch.dtype) -> None:
    """No division by a range of zero; the constant comes back to 16-bit precision."""
    x = torch.full((1, 16, 16), value).to(dtype)
    codec = MinMax(2, 8, along)
    got = codec.decode(codec.encode(x, {}), {}).float()
    torch.testing.assert_close(got, x.float(), atol=1e-7, rtol=2**-8)


@pytest.mark.parametrize("along", ["tokens", "channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("big", [65000.0, 1e5, 1e30])
def test_extreme_values_stay_finite(along: Any, dtype: torch.dtype, big: float) -> None:
    """Also what fp16 scales can't hold: the worst that may happen is a coarse group, not infinity or NaN."""
    if dtype == torch.float16 and big > 65504:
        pytest.skip("not a number of fp16")
    x = torch.randn(1, 16, 16).to(dtype)
    x[0, 3, 5], x[0, 9, 6] = big, -big
    codec = MinMax(4, 8, along)
    got = codec.decode(codec.encode(x, {}), {})
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("along", ["tokens", "channels"])
def test_tiny_range_far_from_zero(along: Any) -> None:
    """A range below the 16-bit spacing of the minimum: nothing worse than that spacing."""
    x = 1000 + 1e-3 * torch.randn(1, 16, 16)
    codec = MinMax(2, 8, along)
    assert (codec.decode(codec.encode(x, {}), {}) - x).abs().max() < 0.51


def test_units_are_independent() -> None:
    """Encoding units one by one gives the same bytes as together, so a segment may grow by any number of units."""
    for codec in (MinMax(2, 8, "tokens"), MinMax(3, 8, "channels"), MinMax(4, None, "channels")):
        x = torch.randn(2, 32, 16)
        whole, parts = (
            codec.encode(x, {}),
            [codec.encode(x[:, i : i + codec.unit], {}) for i in range(0, 32, codec.unit)],
        )
        for name in whole:
            assert torch.equal(whole[name], torch.cat([part[name] for part in parts], 1))
