"""Prefill, observation and encoding by the compiled kernels, against float64 and against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.kernels import native, reference
from kvloom.segments.minmax import MinMax

pytestmark = pytest.mark.skipif(native.ISA is None, reason="installed without compiled kernels")
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the output's dtype


def strided(generator: torch.Generator, heads: int, rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """[heads, rows, dim] as a model's projections give it: heads beside each other in a row."""
    return torch.randn(rows, heads, dim, generator=generator).to(dtype).transpose(0, 1)


def logits64(q: Tensor, k: Tensor, scale: float, softcap: float | None, past: int | None) -> Tensor:
    """[h, g, m, n] in fp64; a row sees slots up to `past` + its place (None: all)."""
    h, g = k.shape[0], q.shape[0] // k.shape[0]
    s = torch.einsum("hgmd,hnd->hgmn", q.double().unflatten(0, (h, g)), k.double()) * scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    if past is not None:
        s = s.masked_fill(torch.arange(s.shape[3]) > torch.arange(s.shape[2])[:, None] + past, -torch.inf)
    return s


@settings(max_examples=60, deadline=None)
@given(
    h=st.integers(1, 3), g=st.integers(1, 4), m=st.integers(1, 210), n=st.integers(1, 210), causal=st.booleans(),
    dim=st.sampled_from([8, 64, 72, 80, 128]), value_dim=st.sampled_from([8, 40, 64, 96]), dtype=DTYPES,
    softcap=st.sampled_from([None, None, 20.0]), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_prefill_against_float64(
    h: int, g: int, m: int, n: int, causal: bool, dim: int, value_dim: int, dtype: torch.dtype, softcap: float | None,
    seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    q = strided(generator, h * g, m, dim, dtype)
    k, v = strided(generator, h, n, dim, dtype), strided(generator, h, n, value_dim, dtype)
    assert native.fits(q, k, v)
    out, lse = native.prefill(q, k, v, dim**-0.5, causal, softcap)
    s = logits64(q, k, dim**-0.5, softcap, 0 if causal else None)
    expected = torch.einsum("hgmn,hnd->hgmd", s.softmax(-1), v.double()).flatten(0, 1)
    assert out.dtype == dtype and torch.allclose(lse.double(), s.logsumexp(-1).flatten(0, 1), atol=1e-5)
    assert float((out - expected).norm() / expected.norm()) < ROUNDING[dtype]


@settings(max_examples=40, deadline=None)
@given(
    h=st.integers(1, 3), g=st.integers(1, 4), m=st.integers(1, 150), n=st.integers(1, 210), past=st.integers(-90, 150),
    dim=st.sampled_from([8, 64, 80]), dtype=DTYPES, softcap=st.sampled_from([None, 20.0]), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_observe_against_float64(
    h: int, g: int, m: int, n: int, past: int, dim: int, dtype: torch.dtype, softcap: float | None, seed: int
) -> None:
    """The compiled kernel and the reference, also where rows see more than these slots or nothing of them."""
    generator = torch.Generator().manual_seed(seed)
    q, k = strided(generator, h * g, m, dim, dtype), strided(generator, h, n, dim, dtype)
    s = logits64(q, k, dim**-0.5, softcap, past)
    lse = torch.logaddexp(s.logsumexp(-1), torch.rand(h, g, m, generator=generator).double()).float()
    expected = (s - lse[..., None].double()).exp().sum(2).flatten(0, 1)
    for found in (native.observe, reference.observe):
        mass = found(q, k, lse.flatten(0, 1), dim**-0.5, past, softcap)
        assert mass.dtype == torch.float32 and torch.allclose(mass.double(), expected, atol=1e-5, rtol=1e-4)


def test_same_bits_for_any_number_of_threads() -> None:
    q, k = torch.randn(8, 500, 64), torch.randn(2, 500, 64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, lse = native.prefill(q, k, k, 0.125, causal=True)
            found.append(
                (out, lse, native.observe(q, k, lse, 0.125, 0), *(native.encode(k[:, :480], "tokens", 3, 32) or ()))
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert len(other) == 6 and all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_extremes() -> None:
    """Rows that see nothing, logits far apart, infinite log-sum-exps: no NaN."""
    q = torch.zeros(1, 3, 64)
    q[0, :, 0] = torch.tensor([1e4, 0.0, -1e4])
    k = torch.zeros(1, 70, 64)
    k[0, 69, 0] = 1e4
    v = torch.randn(1, 70, 64)
    out, lse = native.prefill(q, k, v, 1.0)
    assert torch.equal(out[0, 0], v[0, 69]) and lse[0, 0] == 1e8
    assert torch.allclose(out[0, 1], v[0].mean(0), atol=1e-6) and torch.allclose(
        out[0, 2], v[0, :69].mean(0), atol=1e-6
    )
    assert not native.observe(q, k, torch.full((1, 3), -torch.inf), 1.0, 70).any()
    assert not native.observe(q, k, torch.zeros(1, 3), 1.0, -70).any()


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]), group=st.sampled_from([8, 24, 32, 64]), tokens=st.booleans(), dtype=DTYPES,
    size=st.sampled_from([1.0, 1e-7, 6e4, 1e30]), units=st.integers(1, 5), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_encoding_is_bit_for_bit_that_of_torch(
    bits: int, group: int, tokens: bool, dtype: torch.dtype, size: float, units: int, seed: int
) -> None:
    """Codes, scales and minima, also of constant groups, outliers, and numbers that 16 bits can't hold."""
    generator = torch.Generator().manual_seed(seed)
    x = (strided(generator, 2, units * 24 * 8, 192, torch.float32) * size).to(dtype).nan_to_num(0.0, 6e4, -6e4)
    x[0, :64], x[1, :, 3], x[1, 5] = x[0, 0, 0], 0.0, x[1, 5] * 50
    x = x.nan_to_num(0.0, 6e4, -6e4)
    codec = MinMax(bits, group, "tokens" if tokens else "channels")
    found = codec.encode(x, {})
    with pytest.MonkeyPatch.context() as patch:
        nothing: Callable[..., None] = lambda *_: None  # noqa: E731
        patch.setattr(native, "encode", nothing)
        expected = codec.encode(x, {})
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == y.dtype and torch.equal(found[name], y) for name, y in expected.items())
