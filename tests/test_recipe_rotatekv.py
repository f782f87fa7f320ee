"""RotateKV (arXiv 2501.16383)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom import KVCache, RecipeError, parse
from kvloom.core.codec import Codec
from kvloom.core.recipe import Recipe
from kvloom.core.run import Run
from kvloom.core.segment import Kind
from kvloom.core.site import Site
from kvloom.errors import ProfileError
from kvloom.kernels import native
from kvloom.lab.measure import load_model
from kvloom.recipes.rotatekv import learn
from kvloom.segments.across import AcrossHeads, blocked
from kvloom.segments.minmax import Clipped, MinMax
from kvloom.segments.rotate import Rotate
from kvloom.segments.spared import Spared
from tests.families import build, prompt, subject
from tests.profiles import profiled
from tests.reference import layers_of, run_cache
from tests.test_recipe_fireq import Kept
from tests.test_tile import attention, close, plain


def orders(model: Any, seed: int) -> dict[int, Tensor]:
    config, draw = model.config, torch.Generator().manual_seed(seed)
    h, dim = config.num_key_value_heads, config.head_dim
    return {
        i: torch.randperm(h * dim, generator=draw).view(h, dim).to(torch.int16) for i in range(config.num_hidden_layers)
    }


def kinds(key: Codec, value: Codec) -> Recipe:
    return Recipe("test", kinds={"main": Kind(key, value)})


@pytest.mark.parametrize("together", [1, 2, 4])
def test_1_and_4_without_rounding_no_turn_and_no_order_changes_anything(together: int) -> None:
    model, ids, sizes = (
        subject("llama", head_dim=16, num_attention_heads=8, num_key_value_heads=4),
        prompt(90),
        [50, *[1] * 20, 20],
    )
    want = run_cache(model, KVCache(model, "full"), ids, sizes)
    for seed in (1, 2):
        key = AcrossHeads(Kept(), together, orders(model, seed), tap="pre-rope")
        got = run_cache(model, KVCache(model, kinds(key, Rotate(Kept(), "hadamard", seed=None))), ids, sizes)
        torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)


def test_2_a_large_channel_costs_less_when_turned() -> None:
    x = torch.randn(4, 100, 16, generator=torch.Generator().manual_seed(0))
    x[1, :, 3] *= 30
    site = Site(0, 1, 4, 4, 16, 16, torch.float32, lambda: None)

    def error(codec: Codec) -> float:
        const = codec.const(site, "key")
        return float((codec.decode(codec.encode(x, const), const) - x).square().mean())

    wide = x.transpose(0, 1).flatten(1)[None]
    for bits, share in ((2, 1.0), (4, 0.2)):
        none = Clipped(bits, 64, 1.0)
        unturned = float((none.decode(none.encode(wide, {}), {}) - wide).square().mean())
        one, four = (error(AcrossHeads(none, together)) for together in (1, 4))
        assert four < one and four < share * unturned


def test_3_sinks_are_exact() -> None:
    """Four tokens of the prompt come back as they were, in both planes, those that its end looks at most."""
    model, ids = build("llama"), prompt(80)
    want = KVCache(model, "full")
    got = KVCache(model, profiled(model, "rotatekv(sinks=4)"))
    for cache in (want, got):
        run_cache(model, cache, ids, [60] + [1] * 10 + [10])
    segments = [layers_of(cache)[0].groups[0].segments["main"] for cache in (got, want)]
    for mine, its in ((segments[0].key, segments[1].key), (segments[0].value, segments[1].value)):
        gap = (mine.dense(0, 80) - its.dense(0, 80)).abs().amax((0, 2))
        exact = (gap < 1e-5).nonzero()[:, 0]
        assert exact.tolist() == [*mine.const["spared"][0, :4].int().tolist(), 70, 71, 72, 73]  # and of the second turn
        assert len(set(exact.tolist())) == 8 and int(exact[3]) < 60
        whole = mine.runs[0].read(0, 60)
        for start, stop in ((0, 20), (15, 60), (30, 31)):
            torch.testing.assert_close(mine.runs[0].read(start, stop), whole[:, start:stop], atol=1e-5, rtol=1e-5)
        some = torch.arange(0, 60, 3).expand(2, -1)
        torch.testing.assert_close(mine.runs[0].take(some).decode(), whole[:, ::3], atol=1e-5, rtol=1e-5)


def test_4_the_order_matters_to_what_is_rounded() -> None:
    x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)) + torch.linspace(-3, 3, 64)
    site = Site(0, 1, 2, 2, 64, 64, torch.float32, lambda: None)
    draw = torch.randperm(128, generator=torch.Generator().manual_seed(1)).view(2, 64).to(torch.int16)
    alike = blocked(x.transpose(0, 1).flatten(1), 128).sum(0).argsort().view(2, 64).to(torch.int16)
    errors = []
    for order in (draw, alike):
        codec = AcrossHeads(Clipped(2, 32, 1.0), 4, {0: order})
        const = codec.const(site, "key")
        errors.append(float((codec.decode(codec.encode(x, const), const) - x).square().mean()))
    assert errors[1] < errors[0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-50, 50, width=16), min_size=8, max_size=8),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([0.8, 1.0]),
)
def test_clipped_codes(x: list[float], bits: int, clip: float) -> None:
    """s and z by the definition, but for the 16-bit scale."""
    given_ = torch.tensor(x)[None, None]
    codec = Clipped(bits, 8, clip)
    block = codec.encode(given_, {})
    s, top = float(block["scale"]), 2**bits - 1
    if s < 1e-3 * max(map(abs, x)) or s < 1e-6:
        return
    assert s == pytest.approx(clip * (max(x) - min(x)) / top, rel=1e-3)
    z = round(-float(block["zero"]) / s)
    assert abs(z + clip * min(x) / s) <= 0.51 + 1e-3 * top
    want = [s * (min(max(round(v / s) + z, 0), top) - z) for v in x]
    assert (
        codec.decode(block, {}).flatten().tolist() == pytest.approx(want, abs=1.01 * s)
        and torch.isfinite(codec.decode(block, {})).all()
    )


def test_kernels_read_heads_that_were_mixed() -> None:
    if native.ISA is None:
        pytest.skip("needs the compiled kernels")
    draw = torch.Generator().manual_seed(2)
    site = Site(0, 1, 2, 2, 32, 32, torch.float32, lambda: None)
    codec = AcrossHeads(Clipped(4, 64, 1.0), 4, {0: torch.randperm(64, generator=draw).view(2, 32).to(torch.int16)})
    const = codec.const(site, "key")
    runs = [Run(codec, codec.encode(torch.randn(2, 300, 32, generator=draw), const), const) for _ in range(2)]
    q = torch.randn(2, 4, 32, generator=draw)
    found = attention(q, [runs[0]], [runs[1]])
    assert found is not None
    close(found, plain(q, runs[0].decode(), runs[1].decode()), 5.0)


def test_turning_beats_none_at_2_bits(tmp_path: Path) -> None:
    """The bundled model with planted outliers."""
    model, tokenizer = load_model("nano+outliers")
    text = (Path(__file__).parents[1] / "kvloom" / "models" / "text" / "gutenberg.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text[300_000:312_000], add_special_tokens=False)[:2000])
    learn(model, ids[:1200], tmp_path / "profile", lambda told: None, length=1200)
    sizes = [600] + [1] * 24
    ids = ids[None, 1200 : 1200 + 624]
    want = run_cache(model, KVCache(model, "full"), ids, sizes).log_softmax(-1)[600:]

    def damage(recipe: str | Recipe) -> float:
        got = run_cache(model, KVCache(model, recipe), ids, sizes).log_softmax(-1)[600:]
        return float((want.exp() * (want - got)).sum(-1).mean())

    turned = damage(f"rotatekv(sinks=0, profile={str(tmp_path / 'profile')!r})")
    assert turned < 0.7 * damage(kinds(Clipped(2, 64, 0.8), Clipped(2, 64, 0.8)))


@pytest.mark.parametrize(("options", "bits", "sinks"), [("sinks=0", 2, 0), ("bits=4, sinks=3", 4, 3)])
def test_bytes(options: str, bits: int, sinks: int) -> None:
    model, n = build("llama"), 61
    cache = KVCache(model, profiled(model, f"rotatekv({options})"))
    run_cache(model, cache, prompt(n), [40] + [1] * 21)
    planes = cache.report().by("plane")
    own = 2 * sinks * 16 * (4 + 4)  # numbers and places
    assert planes["key",] == 3 * (n * (2 * 16 * bits / 8 + 4) + own)  # one group for both heads
    assert planes["value",] == 3 * (n * 2 * (16 * bits / 8 + 4) + own)
    assert cache.recipe.nbytes(layers_of(cache)[0].site, {"main": n}) * 3 == planes["key",] + planes["value",]
    assert planes["constant",] == 3 * 2 * 16 * 2 + 16 * 16 * 4 + (sinks and 3 * 2 * 2 * (sinks + 1) * 4)


def test_the_profile_is_what_it_says(tmp_path: Path) -> None:
    model, ids = build("llama"), prompt(128)[0]
    found = learn(model, ids, tmp_path / "p", lambda told: None, length=128)
    keys = model.model.layers[0].self_attn.k_proj(
        model.model.layers[0].input_layernorm(model.model.embed_tokens(ids[None]))
    )[0]
    sums = blocked(keys.detach(), 32).sum(0)
    assert bool((sums[found["order"][0].flatten().long()].diff() >= -1e-3).all())
    with pytest.raises(ProfileError, match="heads=2"):
        KVCache(model, f"rotatekv(heads=2, profile={str(tmp_path / 'p')!r})")


def test_options() -> None:
    for wrong in ("bits=5", "heads=0", "clip=0", "clip=1.5", "sinks=-1", "group=7"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            parse(f"rotatekv({wrong})")
    with pytest.raises(RecipeError, match="power of two"):
        AcrossHeads(MinMax(2, None, "channels")).check(Site(0, 1, 2, 2, 24, 24, torch.float32, lambda: None), "key")
    with pytest.raises(RecipeError, match="sinks"):
        Spared(MinMax(2, None, "channels"), 0)
