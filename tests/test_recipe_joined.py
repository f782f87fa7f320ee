"""CSKV (arXiv 2409.10593) and joined KV heads (arXiv 2406.07056): heads of a layer together, in few directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from kvloom import KVCache, ModelError, ProfileError, RecipeError, parse
from kvloom.core.codec import Exact
from kvloom.core.profile import load
from kvloom.core.sample import managed, rows, samples
from kvloom.lab.measure import load_model
from kvloom.policies.subspaces import orthonormal, principal
from kvloom.policies.weights import projections, weight_directions
from kvloom.recipes.effectively_compress_kv_heads import read
from kvloom.segments.project import Project
from tests.families import build, prompt, subject
from tests.profiles import profiled
from tests.reference import Full, Slots, rope, run, run_cache

SIZES = [40, 9, *[1] * 30]
JOINED = "effectively-compress-kv-heads"


def profile_of(recipe: str, model: Any, name: str) -> dict[str, Tensor]:
    return load(recipe.partition("profile='")[2].rstrip("')"), model, name, {})


class Cskv(Full):
    """Keys before RoPE, turned when read; whole windows of a layer are projected once they are full."""

    def __init__(self, model: Any, keys: Tensor, values: Tensor, window: int) -> None:
        super().__init__(model)
        self.bases, self.window, self.done = (keys, values), window, dict[int, int]()

    def store(self, k: Tensor, place: Tensor) -> Tensor:
        return k

    def logits(self, layer: int, head: int, q: Tensor, s: Slots, place: Tensor) -> Tensor:
        return rope(self.model, q, place) @ rope(self.model, s.k, s.index).T

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        heads = self.config.num_key_value_heads
        if head < heads - 1:
            return
        done, full = self.done.get(layer, 0), len(s.k) // self.window * self.window
        self.done[layer] = full
        for name, basis in zip(("k", "v"), self.bases, strict=True):
            every = [getattr(self.slots[layer, h], name) for h in range(heads)]
            wide = torch.cat([x[done:full] for x in every], 1) @ basis[layer] @ basis[layer].T
            for h, part in enumerate(wide.chunk(heads, 1)):
                setattr(self.slots[layer, h], name, torch.cat([every[h][:done], part, every[h][full:]]))


class Joined(Full):
    """What is stored of a token is its projection, over all heads together."""

    def __init__(self, model: Any, keys: Tensor, values: Tensor) -> None:
        super().__init__(model)
        self.bases = (keys, values)

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        heads, m = self.config.num_key_value_heads, q.shape[1]
        if head < heads - 1:
            return
        for name, basis in zip(("k", "v"), self.bases, strict=True):
            every = [getattr(self.slots[layer, h], name) for h in range(heads)]
            wide = torch.cat([x[-m:] for x in every], 1) @ basis[layer] @ basis[layer].T
            for h, part in enumerate(wide.chunk(heads, 1)):
                setattr(self.slots[layer, h], name, torch.cat([every[h][:-m], part]))


@pytest.mark.parametrize(("keys", "values"), [(0.25, 0.5), (1.0, 1.0)])
def test_cskv_equals_dense_projection(keys: float, values: float) -> None:
    """1: with all channels it is the model."""
    model, ids = subject("llama"), prompt(sum(SIZES))
    recipe = profiled(model, f"cskv(keys={keys}, values={values}, window=8)")
    held = profile_of(recipe, model, "cskv")
    bases = [orthonormal(held[f"{p}.basis"][..., : int(share * 32)]) for p, share in (("key", keys), ("value", values))]
    want = run(Cskv(model, *bases, window=8), ids, SIZES)
    got = run_cache(model, KVCache(model, recipe), ids, SIZES)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
    if keys == values == 1.0:
        torch.testing.assert_close(got, run_cache(model, KVCache(model), ids, SIZES), atol=2e-3, rtol=1e-3)


def test_cskv_2_below_the_window_is_the_model() -> None:
    model, ids, sizes = subject("llama"), prompt(31), [20] + [1] * 11
    got = run_cache(model, KVCache(model, profiled(model, "cskv")), ids, sizes)
    assert torch.equal(got, run_cache(model, KVCache(model), ids, sizes))


def errors(model: Any, ids: Tensor, bases: dict[Any, Tensor], rank: int) -> float:
    """Mean squared error of keys and values at a rank, summed over layers."""
    total = 0.0
    layers = list(managed(model))
    for sample in samples(model, [ids], weights=False, pre_rope=True, tell=lambda text: None):
        for plane, x in (("key", sample.keys), ("value", sample.values)):
            wide, u = x.transpose(0, 1).flatten(1), bases[plane][layers.index(sample.layer)][:, :rank]
            total += float((wide - wide @ u @ u.T).square().mean())
    return total


def test_cskv_3_and_4_inputs_help_and_training_ends_at_the_data() -> None:
    """Errors on the calibration text: scaled weights less than plain, steps of training less, the data's directions least."""
    model, _ = load_model("nano")
    ids = torch.randint(3, 4000, (1, 200), generator=torch.Generator().manual_seed(0))
    plain, scaled = (weight_directions(model, [ids], each, lambda text: None) for each in (False, True))
    data = {p: b[:, 0] for p, (b, _) in principal(model, [ids], lambda _: None, None, False, True).items()}
    found = [errors(model, ids, bases, 24) for bases in (plain, scaled, data)]
    assert found[0] > found[1] > found[2]
    # factors A [hidden, r], B [r, H * D] of one layer, trained by the paper's loss from the scaled start
    layer = model.model.layers[2].self_attn
    seen: list[Tensor] = []
    hook = layer.k_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    x, w, v = seen[0], layer.k_proj.weight.detach().T, scaled["key"][2][:, :24]
    a, b = (w @ v).clone().requires_grad_(), v.T.clone().requires_grad_()
    adam, losses = torch.optim.Adam([a, b], lr=2e-3), []
    for _ in range(60):
        loss = (x @ a @ b - x @ w).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    u = data["key"][2][:, :24]
    least = float((x @ w @ u @ u.T - x @ w).square().mean())
    assert losses[0] > losses[-1] > 0.999 * least


@pytest.mark.parametrize("bits", [None, 4])
def test_cskv_5_bytes(bits: int | None) -> None:
    model = subject("llama", head_dim=64)
    cache = KVCache(model, profiled(model, f"cskv(keys=0.25, values=0.25, window=16, bits={bits})"))
    run_cache(model, cache, prompt(100), [100])
    found = cache.report().by("plane", "field")
    layers, old, r = model.config.num_hidden_layers, 96, 16
    if bits is None:
        assert found["key", "x"] == found["value", "x"] == layers * old * 2 * r * 4
    else:
        assert found["key", "codes"] == found["value", "codes"] == layers * old * 2 * r // 2
        assert found["key", "scale"] + found["key", "zero"] == layers * 2 * r * 4 * old // 16
        assert found["value", "scale"] + found["value", "zero"] == layers * old * 2 * 4
    assert found["key", "exact"] == found["value", "exact"] == layers * 4 * 2 * 64 * 4


@pytest.mark.parametrize("width", [1.0, 2.0])
def test_joined_equals_dense_projection(width: float) -> None:
    """1: as wide as all heads together, it is the model."""
    model, ids = subject("llama"), prompt(sum(SIZES))
    recipe = profiled(model, f"{JOINED}(width={width})")
    held = profile_of(recipe, model, JOINED)
    want = run(Joined(model, read(held, "key")[:, 0], read(held, "value")[:, 0]), ids, SIZES)
    got = run_cache(model, KVCache(model, recipe), ids, SIZES)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
    if width == 2.0:
        torch.testing.assert_close(got, run_cache(model, KVCache(model), ids, SIZES), atol=1e-3, rtol=1e-3)


def test_joined_2_error_is_the_tail_and_below_mean_pooling() -> None:
    model = subject("llama")
    texts = rows(model, prompt(200)[0], 1, 200)
    bases = principal(model, texts, lambda text: None, 2, centred=False)
    for sample in samples(model, texts, weights=False, pre_rope=False, tell=lambda text: None):
        for plane, x in (("key", sample.keys), ("value", sample.values)):
            wide = x.transpose(0, 1).flatten(1)
            u = bases["key" if plane == "key" else "value"][0][sample.layer, 0][:, :16]
            error = float((wide - wide @ u @ u.T).square().sum())
            tail = torch.linalg.svdvals(wide.double())[16:].square().sum()
            assert error == pytest.approx(float(tail), rel=1e-3)
            assert error <= float((x - x.mean(0, keepdim=True)).square().sum())


def test_joined_3_and_4_one_head_is_the_identity_and_bytes() -> None:
    model, ids = build("llama", num_key_value_heads=4), prompt(60)
    got = run_cache(model, KVCache(model, profiled(model, f"{JOINED}(heads=1)")), ids, [40] + [1] * 20)
    torch.testing.assert_close(got, run_cache(model, KVCache(model), ids, [40] + [1] * 20), atol=1e-3, rtol=1e-3)
    for heads in (2, 4):
        cache = KVCache(model, profiled(model, f"{JOINED}(heads={heads})"))
        run_cache(model, cache, ids, [60])
        found = cache.report().by("plane", "field")
        assert found["key", "x"] == found["value", "x"] == 3 * 60 * (4 // heads) * 16 * 4


@pytest.mark.parametrize("recipe", ["cskv(window=8)", f"{JOINED}(heads=2)", f"{JOINED}(heads=4)"])
def test_values_are_summed_as_coordinates(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding expands at most keys that turn by RoPE, a piece at a time."""
    model, ids = build("llama", num_key_value_heads=4), prompt(90)
    cache = KVCache(model, profiled(model, recipe))
    run_cache(model, cache, ids, [70])
    decode = Project.decode

    def watched(self: Project, block: Any, const: Any) -> Tensor:
        assert self.tap == "pre-rope" and self.slots(block) <= 70
        return decode(self, block, const)

    monkeypatch.setattr(Project, "decode", watched)
    run_cache(model, cache, ids, [1] * 5)


def test_options(tmp_path: Path) -> None:
    for wrong in ("keys=0", "values=1.5", "window=0", "start='pca'"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            parse(f"cskv({wrong})")
    for wrong in ("heads=0", "width=0", "width=3.0"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            parse(f"{JOINED}({wrong})")
    model, ids = subject("llama"), prompt(100)[0]
    path = tmp_path / "few.safetensors"
    made = parse("cskv").calibrate
    assert made is not None
    made(model, ids, path, lambda text: None)
    with pytest.raises(ProfileError, match=r"kvloom calibrate MODEL --cache 'cskv\(keys=0.9\)'"):
        KVCache(model, f"cskv(keys=0.9, profile={str(path)!r})")
    with pytest.raises(ProfileError, match=r"kvloom calibrate .* --cache cskv"):
        KVCache(build("llama", seed=5), "cskv")
    three = parse(f"{JOINED}(heads=3)").calibrate
    assert three is not None
    with pytest.raises(RecipeError, match="4 KV heads, which can't be joined 3"):
        three(build("llama", num_key_value_heads=4), ids, tmp_path / "x", lambda text: None)
    with pytest.raises(ModelError, match="start='data'"):
        projections(build("phi3"))


def test_rank_is_checked() -> None:
    rank: Literal[0] = 0
    with pytest.raises(RecipeError, match="rank=0"):
        Project(Exact(), rank)
