"""KVQuant (arXiv 2401.18079)."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch

from kvloom import KVCache, RecipeError, parse
from kvloom.core.codec import Const
from kvloom.core.recipe import Recipe
from kvloom.core.segment import Kind
from kvloom.core.site import Site
from kvloom.errors import ProfileError
from kvloom.lab.measure import load_model
from kvloom.segments.levels import Levels
from kvloom.segments.lloyd import lloyd
from kvloom.segments.outliers import RangeOutliers, TokenOutliers
from tests.families import build, prompt
from tests.profiles import profiled
from tests.reference import layers_of, run_cache


def heavy() -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(2, 200, 32, generator=draw) / (torch.rand(2, 200, 32, generator=draw) + 0.1)


def table(codec: Levels, x: torch.Tensor) -> Const:
    """A profile for these keys: their full ranges."""
    low, high = x.aminmax(dim=1)
    even = torch.linspace(-1, 1, 2**codec.bits)[None]
    return {"levels": even, "shown": even, "mid": (low + high) / 2, "half": (high - low) / 2}


def rounded(x: torch.Tensor, bits: int, dim: int | tuple[int, ...]) -> torch.Tensor:
    """Min-max quantization of groups along `dim`, dense."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return ((x - low) / step).round() * step + low


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_1_even_levels_without_outliers_are_min_max(bits: int) -> None:
    """Keys per channel, values per token, of one head or of all; but for 16-bit ranges, which may tip a number over."""
    x = heavy()
    for along, scope, dim in (("tokens", "head", 1), ("channels", "head", 2), ("channels", "layer", (0, 2))):
        codec = Levels(bits, along, scope=scope)  # type: ignore[arg-type]
        const, want = table(codec, x), rounded(x, bits, dim)
        gap = (codec.decode(codec.encode(x, const), const) - want).abs()
        assert float((gap > 2e-3 * x.abs().max()).float().mean()) < 2e-3, along


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_2_and_3_outliers_are_exact_and_as_many_as_asked_for(share: float) -> None:
    x = heavy()
    each = ceil(share / 2 * 64)
    wide = x.transpose(0, 1).flatten(1)
    value = TokenOutliers(Levels(3, "channels"), share, up=True)
    block = value.encode(x, table(value.inner, x))  # type: ignore[arg-type]
    assert block["place"].shape == (1, 200, 2 * each)
    assert all(len(row.unique()) == 2 * each for row in block["place"][0])
    y = value.decode(block, table(value.inner, x)).transpose(0, 1).flatten(1)  # type: ignore[arg-type]
    for largest in (True, False):
        place = wide.topk(each, -1, largest).indices
        assert torch.equal(y.gather(1, place), wide.gather(1, place))
    key = RangeOutliers(Levels(3, "tokens"), share, up=True)
    const: Const = table(key.inner, x)  # type: ignore[arg-type]
    const |= {"half": const["half"] / 8}  # a narrow range: many numbers lie outside
    y = key.decode(key.encode(x, const), const)
    far = ((x - const["mid"][:, None]) / const["half"][:, None]).abs().transpose(0, 1).flatten(1)
    place = far.topk(2 * each, -1).indices
    assert torch.equal(y.transpose(0, 1).flatten(1).gather(1, place), wide.gather(1, place))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_keys_from_before_rope_turn_on_reading(dtype: torch.dtype) -> None:
    """With every number an outlier nothing is lost but the rounding of two rotations."""
    model, ids, sizes = build("llama").to(dtype), prompt(90), [50] + [1] * 20 + [20]
    lossless = RangeOutliers(Levels(2, "tokens", tap="pre-rope"), 1.0)
    recipe = Recipe("lossless", kinds={"main": Kind(lossless, TokenOutliers(Levels(2, "channels"), 1.0))})
    want = run_cache(model, KVCache(model, "full"), ids, sizes)
    got = run_cache(model, KVCache(model, recipe), ids, sizes)
    loose = 3e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(got, want, atol=loose, rtol=loose)
    head = Recipe(
        "per head",
        kinds={
            "main": Kind(RangeOutliers(Levels(2, "tokens", tap="pre-rope"), 1.0, "head"), recipe.kinds["main"].value)
        },
    )
    with pytest.raises(RecipeError, match="layer"):
        parse("h2o(budget=40)") | head
    head = Recipe("per head", kinds={"main": Kind(head.kinds["main"].key)})
    for placement in ("h2o(budget=40)", "snapkv(budget=40, window=8)", "streamingllm(window=30)"):
        want = run_cache(model, KVCache(model, placement), ids, sizes)
        got = run_cache(model, KVCache(model, parse(placement) | head), ids, sizes)
        if dtype == torch.float32:  # places in the text follow the slots that stay
            torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)


def test_5_uneven_levels_and_outliers_help() -> None:
    x = heavy()
    codec = Levels(3, "tokens")
    const = table(codec, x)
    even = float((codec.decode(codec.encode(x, const), const) - x).norm())
    inside = ((x - const["mid"][:, None]) / const["half"][:, None]).flatten().sort().values.double()
    found = lloyd(inside, torch.ones_like(inside), 8, 500).float()[None]
    learned = {**const, "levels": found, "shown": found}
    uneven = float((codec.decode(codec.encode(x, learned), learned) - x).norm())
    ends = torch.quantile(x, torch.tensor([0.005, 0.995]), dim=1)
    narrow = {"mid": (ends[0] + ends[1]) / 2, "half": (ends[1] - ends[0]) / 2}
    inside = ((x - narrow["mid"][:, None]) / narrow["half"][:, None]).flatten().sort().values.double()
    inside = inside[inside.abs() <= 1]
    found = lloyd(inside, torch.ones_like(inside), 8, 500).float()[None]
    sparse, narrow = RangeOutliers(codec, 0.02, up=True), {**narrow, "levels": found, "shown": found}
    both = float((sparse.decode(sparse.encode(x, narrow), narrow) - x).norm())
    assert both < uneven < even


@pytest.mark.parametrize("sizes", [[60], [40] + [1] * 25, [20, 30, 1, 1, 9]])
@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.1])
def test_bytes(sizes: list[int], outliers: float) -> None:
    model, n, c = build("llama"), sum(sizes), 32
    cache = KVCache(model, profiled(model, f"kvquant(bits=3, outliers={outliers})"))
    run_cache(model, cache, prompt(n), sizes)
    sparse = 2 * ceil(outliers / 2 * c) * (4 + 2)
    planes = cache.report().by("plane")
    assert planes["key",] == 3 * n * (c * 3 / 8 + sparse)
    assert planes["value",] == 3 * n * (c * 3 / 8 + sparse + 4)
    assert planes["constant",] == 3 * (2 * 4 * 8 + 2 * 2 * c)  # levels, ranges
    site = layers_of(cache)[0].site
    assert cache.recipe.nbytes(site, {"main": n}) * 3 == planes["key",] + planes["value",]


def test_calibration_of_nano_is_found_and_helps() -> None:
    """More bits, less damage; and learned levels beat even ones in the same ranges."""
    model, tokenizer = load_model("nano")
    text = (Path(__file__).parents[1] / "kvloom" / "models" / "text" / "gutenberg.txt").read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer.encode(text[300_000:302_500], add_special_tokens=False)[:400]])
    sizes = [380] + [1] * 20
    want = run_cache(model, KVCache(model, "full"), ids, sizes).log_softmax(-1)[380:]

    def damage(recipe: Any) -> float:
        got = run_cache(model, KVCache(model, recipe), ids, sizes).log_softmax(-1)[380:]
        return float((want.exp() * (want - got)).sum(-1).mean())

    found = [damage(f"kvquant(bits={bits})") for bits in (2, 3, 4)]
    assert found[0] > found[1] > found[2]


def test_profiles_are_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = build("llama")
    with pytest.raises(ProfileError, match=r"kvloom calibrate .* --cache kvquant"):
        KVCache(model, "kvquant")
    made = profiled(model, "kvquant(outliers=0.1)")
    with pytest.raises(ProfileError, match=r"outliers=0\.1.*calibrate"):
        KVCache(model, made.replace("outliers=0.1", "outliers=0.2"))
    with pytest.raises(ProfileError, match="another model"):
        KVCache(build("llama", seed=5), made)
    with pytest.raises(ProfileError, match="too few"):
        calibrate = parse("kvquant").calibrate
        assert calibrate is not None
        calibrate(model, torch.arange(3, 40), tmp_path / "x", lambda text: None)
    flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    assert all(flag and grad is None for flag, grad in flags.values()), "calibration left the model changed"


def test_the_gradient_is_that_of_the_loss() -> None:
    """Fisher information by the tape equals what a step along one value says."""
    from kvloom.core.sample import samples

    model, ids = build("llama").double(), prompt(64)
    found = next(s for s in samples(model, [ids], weights=True, pre_rope=False, tell=lambda text: None) if s.layer == 1)
    assert found.value_weight is not None and found.value_weight.shape == found.values.shape
    layer = model.model.layers[1].self_attn.v_proj

    def loss(step: float) -> float:
        def nudge(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[0, 7, 16 + 3] += step  # head 1, channel 3
            return out

        hook = layer.register_forward_hook(nudge)
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        hook.remove()
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))

    slope = (loss(0.02) - loss(-0.02)) / 0.04
    assert float(found.value_weight[1, 7, 3]) == pytest.approx(slope**2, rel=0.03)


def test_a_site_without_rope_keeps_keys_as_they_are() -> None:
    from kvloom.core.tap import tap_of

    tap = tap_of(Site(0, 1, 2, 2, 16, 16, torch.float32, lambda: None))
    x = torch.randn(2, 5, 16)
    assert tap.off(x, torch.arange(5)[None]) is x and tap.on(x, torch.arange(5)[None]) is x


def test_options() -> None:
    for wrong in ("bits=1", "bits=8", "outliers=1.0", "outliers=-0.1", "spread='row'"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            parse(f"kvquant({wrong})")
