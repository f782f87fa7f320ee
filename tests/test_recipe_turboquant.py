"""TurboQuant (arXiv 2504.19874)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvloom import KVCache, RecipeError, parse
from kvloom.core.codec import Codec, Const
from kvloom.core.site import Site
from kvloom.segments.rotate import Rotate, hadamard, rotation
from kvloom.segments.sphere import SignResidual, Sphere, levels
from tests.families import build, prompt
from tests.reference import layers_of, run_cache

TABLE = {1: 0.36, 2: 0.117, 3: 0.034, 4: 0.009}  # squared error on unit vectors, from the paper


def constants(codec: Codec, dim: int) -> Const:
    return codec.const(Site(0, 1, 1, 1, dim, dim, torch.float32, lambda: None), "key")


def units(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(1, n, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def error(codec: Codec, x: Tensor) -> float:
    const = constants(codec, x.shape[2])
    return float((codec.decode(codec.encode(x, const), const) - x).square().sum(-1).mean())


@pytest.mark.parametrize("bits", TABLE)
def test_1_error_on_unit_vectors(bits: int) -> None:
    assert error(Rotate(Sphere(bits)), units(4000, 128)) == pytest.approx(TABLE[bits], rel=0.06)


@pytest.mark.parametrize("how", ["haar", "hadamard"])
def test_2_error_does_not_depend_on_the_direction(how: str) -> None:
    """One channel holds nearly everything: as good as any other direction. Without rotation it would be far worse."""
    x = units(2000, 128)
    x[..., 5] = 40 * x[..., 5].abs() + 1
    x = torch.nn.functional.normalize(x, dim=-1)
    found = error(Rotate(Sphere(3), how), x)  # type: ignore[arg-type]
    assert found == pytest.approx(TABLE[3], rel=0.25)
    assert found < 0.1 * error(Sphere(3), x)


def test_3_signs_take_the_bias_away() -> None:
    """One bit of least error tells dot products too small; one with signs beside it is right on average over projections."""
    q, x = units(1, 64, 1)[:, :, :], units(1, 64, 2)
    x = torch.nn.functional.normalize(q + 0.5 * x, dim=-1)
    want = float((q * x).sum())
    told, plain = [], []
    for seed in range(600):
        codec = Rotate(SignResidual(Sphere(1), seed=seed + 1), seed=seed)
        const = constants(codec, 64)
        told.append(float(codec.dot(q, codec.encode(x, const), const, 1.0)))
        mse = Rotate(Sphere(1), seed=seed)
        const = constants(mse, 64)
        plain.append(float(mse.dot(q, mse.encode(x, const), const, 1.0)))
    mean, spread = sum(told) / 600, float(torch.tensor(told).std()) / 600**0.5
    assert abs(mean - want) < 4 * spread + 1e-3
    assert sum(plain) / 600 == pytest.approx(want * 2 / torch.pi, rel=0.05)  # toward 0, as the theory says
    rotation.cache_clear()


def test_4_deterministic() -> None:
    x = torch.randn(2, 10, 32)
    for codec in (Rotate(Sphere(3)), Rotate(SignResidual(Sphere(2)))):
        a, b = (codec.encode(x, constants(codec, 32)) for _ in range(2))
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert rotation("haar", 32, 0) is rotation("haar", 32, 0)


@pytest.mark.parametrize(
    ("recipe", "key", "value"),
    [
        ("turboquant(bits=4)", 16 * 4 / 8 + 2, 16 * 4 / 8 + 2),
        ("turboquant(bits=3, value_bits=2)", 16 * 3 / 8 + 2, 16 * 2 / 8 + 2),
        ("turboquant(bits=3, keys='product')", 16 * 2 / 8 + 16 / 8 + 4, 16 * 3 / 8 + 2),
    ],
)
def test_5_bytes(recipe: str, key: float, value: float) -> None:
    model, n = build("llama"), 61
    cache = KVCache(model, recipe)
    run_cache(model, cache, prompt(n), [40] + [1] * 21)
    planes = cache.report().by("plane")
    assert planes["key",] == 3 * 2 * n * key and planes["value",] == 3 * 2 * n * value
    site = layers_of(cache)[0].site
    assert cache.recipe.nbytes(site, {"main": n}) == 2 * n * (key + value)
    constant = sum(x.nbytes for x in {**cache.recipe.kinds["main"].key.const(site, "key")}.values())
    constant += (
        0 if "value_bits" not in recipe and "product" not in recipe else 4 * 2 ** (2 if "value" in recipe else 3)
    )
    assert planes["constant",] == constant  # once for the model


def test_orthogonal_rotations() -> None:
    for matrix in (rotation("haar", 40, 3)[0], rotation("hadamard", 32, 3)[0]):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5, rtol=0)
    x = torch.randn(3, 64)
    torch.testing.assert_close(hadamard(hadamard(x)), x)


def test_levels_are_the_known_ones() -> None:
    """At one bit the mean of half a normal law; for large heads Max's table of the normal law (1960)."""
    table = levels(2, 4096)[0] * 64
    torch.testing.assert_close(table, torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), atol=3e-3, rtol=0)
    assert float(levels(1, 4096)[0, 1]) * 64 == pytest.approx((2 / torch.pi) ** 0.5, abs=1e-3)


def test_zero_vectors() -> None:
    x = torch.zeros(1, 3, 16)
    for codec in (Rotate(Sphere(2)), Rotate(SignResidual(Sphere(1)))):
        const = constants(codec, 16)
        assert torch.equal(codec.decode(codec.encode(x, const), const), x)


def test_exact_in_the_limit() -> None:
    model, ids, sizes = build("llama"), prompt(80), [50] + [1] * 30
    want = run_cache(model, KVCache(model, "full"), ids, sizes)
    got = run_cache(model, KVCache(model, "turboquant(bits=1, residual=80)"), ids, sizes)
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)
    errors = []
    for bits in (1, 2, 4, 8):
        found = run_cache(model, KVCache(model, f"turboquant(bits={bits})"), ids, sizes)
        errors.append(float((found - want).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 * errors[0]


def test_options() -> None:
    for wrong in ("bits=5", "value_bits=7", "keys='both'", "rotation='none'", "residual=-1", "renorm=2"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0].replace("value_", "")):
            parse(f"turboquant({wrong})")
    with pytest.raises(RecipeError, match="2, 3 or 4"):
        parse("turboquant(bits=1, keys='product')")
    with pytest.raises(RecipeError, match="power of two"):
        KVCache(build("llama", head_dim=24), "turboquant(rotation='hadamard')")
