"""FireQ's cache (arXiv 2505.20839)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvloom import KVCache, RecipeError, parse
from kvloom.core.codec import Codec, Const
from kvloom.core.recipe import Recipe
from kvloom.core.segment import Kind
from kvloom.lab.measure import load_model
from kvloom.recipes.fireq import learn
from kvloom.segments.balance import Scaled
from kvloom.segments.symmetric import Symmetric
from tests.families import build, prompt, subject
from tests.profiles import profiled
from tests.reference import layers_of, run_cache


class Kept(Codec):
    """Every number, under a name of its own."""

    per = {"kept": 1}

    def encode(self, x: Tensor, const: Const) -> dict[str, Tensor]:
        return {"kept": x.clone()}

    def decode(self, block: dict[str, Tensor], const: Const) -> Tensor:
        return block["kept"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "falcon-mqa"])
def test_1_without_rounding_factors_change_nothing(family: str) -> None:
    model, ids, sizes = subject(family), prompt(90), [50] + [1] * 20 + [20]
    made = parse(profiled(model, "fireq(channels=2)")).ready(model)
    scaled = made.kinds["main"].key
    assert isinstance(scaled, Scaled) and scaled.factors
    recipe = Recipe("scaled", kinds={"main": Kind(Scaled(Kept(), scaled.factors))})
    want = run_cache(model, KVCache(model, "full"), ids, sizes)
    torch.testing.assert_close(run_cache(model, KVCache(model, recipe), ids, sizes), want, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("fp8", [False, True])
def test_2_error_of_every_number(bits: int, fp8: bool) -> None:
    """At most half a step, and what is largest is the largest code."""
    x = 8 * torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(bits))
    codec = Symmetric(bits, 32, fp8)
    block = codec.encode(x, {})
    step = x.unflatten(2, (2, 32)).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    gap = (codec.decode(block, {}) - x).unflatten(2, (2, 32)).abs()
    # the scale's own rounding moves the largest number by up to so much of itself
    loose = (2**-4 if fp8 else 2**-11) * (2 ** (bits - 1) - 1)
    assert bool((gap <= step * (0.5 * (1 + 2**-4 * fp8) + loose) + 1e-6).all())
    assert codec.nbytes(300, 2, 64, 4) == sum(y.nbytes for y in block.values())
    assert bool((codec.decode(codec.encode(torch.zeros(1, 2, 64), {}), {}) == 0).all())


def test_3_planted_outliers_cost_less(tmp_path: Path) -> None:
    """Error of scores on the bundled model with planted outlier channels: less than without factors, least with both kinds."""
    model, tokenizer = load_model("nano+outliers")
    text = (Path(__file__).parents[1] / "kvloom" / "models" / "text" / "gutenberg.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text[300_000:312_000], add_special_tokens=False)[:2400])
    learn(model, ids[:1536], tmp_path / "profile", lambda told: None, length=512)
    sizes = [800] + [1] * 24
    want = run_cache(model, KVCache(model, "full"), ids[None, 1536:2360], sizes).log_softmax(-1)[800:]

    def damage(recipe: str | Recipe) -> float:
        got = run_cache(model, KVCache(model, recipe), ids[None, 1536:2360], sizes).log_softmax(-1)[800:]
        return float((want.exp() * (want - got)).sum(-1).mean())

    plain = damage(Recipe("int4", kinds={"main": Kind(Symmetric(4), Symmetric(4))}))
    assert damage(f"fireq(profile={str(tmp_path / 'profile')!r})") < 0.5 * plain


@pytest.mark.parametrize(("options", "scale"), [("", 2), ("scales='fp8'", 1), ("group=8", 4)])
def test_4_bytes(options: str, scale: int) -> None:
    model, n = build("llama"), 61
    cache = KVCache(model, profiled(model, f"fireq({options})"))
    run_cache(model, cache, prompt(n), [40] + [1] * 21)
    planes = cache.report().by("plane")
    assert planes["key",] == planes["value",] == 3 * 2 * n * (16 / 2 + scale)
    assert planes["constant",] == 3 * 2 * 16 * 4
    assert cache.recipe.nbytes(layers_of(cache)[0].site, {"main": n}) * 3 == planes["key",] + planes["value",]


def test_the_profile_is_what_it_says(tmp_path: Path) -> None:
    """The greatest length of each rotary pair and the largest number of each channel, against a plain computation."""
    model, ids = build("llama"), prompt(128)[0]
    found = learn(model, ids, tmp_path / "p", lambda told: None, length=128)
    cache = KVCache(model, "full")
    run_cache(model, cache, ids[None], [128])
    keys = torch.stack([layer.groups[0].segments["main"].key.dense(0, 128) for layer in layers_of(cache)])
    torch.testing.assert_close(found["channel"].float(), keys.abs().amax(2), rtol=1e-2, atol=0)
    length = (keys[..., :8].square() + keys[..., 8:].square()).sqrt().amax(2)
    torch.testing.assert_close(found["pair"].float(), torch.cat([length, length], -1), rtol=1e-2, atol=0)


def test_kernels_read_it_where_it_lies() -> None:
    """The compiled kernels and plain torch agree."""
    model, ids = subject("llama", head_dim=64), prompt(200)
    cache = KVCache(model, profiled(model, "fireq"))
    run_cache(model, cache, ids, [150])
    segment = layers_of(cache)[0].groups[0].segments["main"]
    q, kept = torch.randn(2, 2, 64), list[Tensor]()
    assert segment.key.runs[0].describe(q, kept) is not None and segment.value.runs[0].describe(None, kept) is not None


def test_options() -> None:
    for wrong in ("bits=1", "alpha=0", "beta=-1", "channels=-1", "scales='fp4'", "group=7"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            parse(f"fireq({wrong})")
