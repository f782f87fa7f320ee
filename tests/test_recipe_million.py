"""MILLION (arXiv 2504.03661)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvloom import KVCache, RecipeError, parse
from kvloom.core.codec import Codec, Const
from kvloom.core.sample import samples
from kvloom.errors import ProfileError
from kvloom.lab.measure import load_model
from kvloom.segments.minmax import MinMax
from kvloom.segments.product import SIZES, Product, kmeans, nearest
from tests.families import build, prompt
from tests.profiles import profiled
from tests.reference import layers_of, run_cache


def heavy(n: int = 400, dim: int = 16, seed: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, dim, generator=draw) / (torch.rand(2, n, dim, generator=draw) + 0.1)


def learned(x: Tensor, width: int, bits: int, rounds: int = 8) -> tuple[Product, Const]:
    parts = x.flatten(0, 1).unflatten(1, (-1, width)).transpose(0, 1).contiguous()
    book = kmeans(parts, 2**bits, rounds).half()[None]
    return Product(width, bits, book), {"book": book}


def error(codec: Codec, const: Const, x: Tensor) -> float:
    return float((codec.decode(codec.encode(x, const), const) - x).norm() / x.norm())


def test_1_a_text_that_fits_the_buffer_is_exact() -> None:
    model, ids = build("llama"), prompt(60)
    want = run_cache(model, KVCache(model, "full"), ids, [1] * 60)
    got = run_cache(model, KVCache(model, profiled(model, "million(residual=64)")), ids, [1] * 60)
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", SIZES)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_2_lookup_is_the_product_with_what_is_decoded(width: int, bits: int) -> None:
    x, q = heavy(100, 32), torch.randn(2, 3, 32)
    codec, const = learned(x, width, bits, 1)
    block = codec.encode(x, const)
    assert block["codes"].shape == (2, 100, 32 // width * bits / 8)
    y = codec.decode(block, const)
    torch.testing.assert_close(codec.dot(q, block, const, 0.3), 0.3 * q @ y.transpose(1, 2), atol=1e-4, rtol=1e-4)
    p = torch.rand(2, 3, 100)
    torch.testing.assert_close(codec.mix(p, block, const), p @ y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [3, 8, 12])
def test_3_vectors_of_centroids_are_told_exactly(bits: int) -> None:
    book = torch.randn(1, 8, 2**bits, 4, generator=torch.Generator().manual_seed(bits)).half()
    codec, const = Product(4, bits, book), {"book": book}
    which = torch.randint(2**bits, (2, 50, 8))
    x = book[0].float()[torch.arange(8), which].flatten(2)
    assert torch.equal(codec.decode(codec.encode(x, const), const), x)


def test_4_shorter_parts_and_more_centroids_lose_less() -> None:
    x = heavy()
    by_width = [error(*learned(x, width, 4), x) for width in (4, 2, 1)]
    by_bits = [error(*learned(x, 2, bits), x) for bits in (2, 4, 8)]
    assert by_width == sorted(by_width, reverse=True) and by_bits == sorted(by_bits, reverse=True)


def test_5_outlier_channels_have_centroids_of_their_own() -> None:
    """Keys of the bundled model with planted outliers: at 4 bits it beats one scale for the numbers of a token."""
    model, tokenizer = load_model("nano+outliers")
    text = (Path(__file__).parents[1] / "kvloom" / "models" / "text" / "gutenberg.txt").read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer.encode(text[300_000:312_000], add_special_tokens=False)[:2048]])
    found = next(s for s in samples(model, [ids], weights=False, pre_rope=False, tell=print) if s.layer == 2)
    train, rest = found.keys[:, ::2], found.keys[:, 1::2]
    uniform = MinMax(4, None, "channels")
    per_channel = found.keys.abs().mean(1)[:, None]  # outliers must not be all that counts

    def damage(codec: Codec, const: Const) -> float:
        return float(((codec.decode(codec.encode(rest, const), const) - rest) / per_channel).square().mean())

    assert damage(*learned(train, 2, 8)) < 0.5 * damage(uniform, {})


def test_k_means() -> None:
    """One round is what its definition says, for every part by itself."""
    x = torch.randn(3, 200, 2, generator=torch.Generator().manual_seed(1))
    start, book = kmeans(x, 8, 0), kmeans(x, 8, 1)
    for part in range(3):
        near = torch.cdist(x[part], start[part]).argmin(1)
        assert torch.equal(near, nearest(x, start)[part])
        for c in range(8):
            torch.testing.assert_close(book[part, c], x[part][near == c].mean(0), atol=1e-5, rtol=1e-5)
    alike = kmeans(torch.ones(1, 5, 2), 4)
    assert bool((alike == 1).all())


@pytest.mark.parametrize(("options", "each"), [("residual=16", 16 * 4 / 8), ("width=4, residual=16", 16 * 2 / 8)])
def test_bytes(options: str, each: float) -> None:
    model, n = build("llama"), 90
    cache = KVCache(model, profiled(model, f"million({options})"))
    run_cache(model, cache, prompt(n), [50] + [1] * 40)
    planes = cache.report().by("plane")
    held = 3 * 2 * (80 * each + 10 * 16 * 4)
    assert planes["key",] == planes["value",] == held
    assert planes["constant",] == 2 * 16 * 256 * 2  # once for the model
    assert cache.recipe.nbytes(layers_of(cache)[0].site, {"main": n}) * 3 == 2 * held


def test_a_profile_of_other_codes_is_refused_with_the_remedy() -> None:
    with pytest.raises(ProfileError, match=r"calibrate .*million\(width=2, bits=4\)"):
        KVCache(load_model("nano")[0], "million(bits=4)")


def test_options() -> None:
    for wrong in ("bits=5", "width=3", "residual=0"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            parse(f"million({wrong})")
