"""XQuant (arXiv 2508.10395): inputs of layers in the place of keys and values, and keys and values made of them again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvloom
from kvloom import KVCache, KvloomError, RecipeError, parse
from kvloom.core.forecast import forecast
from kvloom.core.project import attentions
from kvloom.kernels import native
from kvloom.lab.measure import load_model
from kvloom.lab.outliers import plant
from kvloom.segments.delta import Delta
from kvloom.segments.minmax import MinMax
from tests.families import build, prompt, subject
from tests.modes import MODES, make_cache
from tests.reference import Full, Slots, layers_of, per_token, rope, run, run_cache
from tests.test_prefill_memory import Largest

MHA: dict[str, Any] = {"num_key_value_heads": 4}
SIZES = [50] + [1] * 12 + [70] + [1] * 9
INPUTS = [("llama", MHA), ("qwen3", {**MHA, "head_dim": 16}), ("olmo2", MHA), ("phi3", {**MHA, "hidden_size": 64}),
          ("gpt_neox", {}), ("falcon-mqa", {"multi_query": False}), ("qwen2", {**MHA, "hidden_size": 64})]  # fmt: skip


@pytest.mark.parametrize(("family", "options"), INPUTS, ids=[family for family, _ in INPUTS])
def test_1_inputs_unquantized_give_the_full_cache(family: str, options: dict[str, Any]) -> None:
    """Fused and separate weights, biases, key norms, partial rotation, models that call attention by themselves."""
    model, ids = build(family, **options), prompt(sum(SIZES))
    want = run_cache(model, DynamicCache(config=model.config), ids, SIZES)
    cache = KVCache(model, "xquant(bits=16)")
    got = run_cache(model, cache, ids, SIZES)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    assert cache.report().used == sum(sum(SIZES) * layer.site.hidden * 4 for layer in layers_of(cache))


def test_1_latents_of_full_rank_give_the_full_cache() -> None:
    for family, options in (
        ("llama", {"num_key_value_heads": 1}),
        ("qwen2", {"hidden_size": 128, "num_key_value_heads": 1}),
    ):
        model, ids = build(family, **options), prompt(sum(SIZES))
        want = run_cache(model, DynamicCache(config=model.config), ids, SIZES)
        got = run_cache(model, KVCache(model, "xquant(bits=16)"), ids, SIZES)
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


class XQuant(Full):
    """Inputs are quantized once a forward has seen them; keys and values are made of what that leaves."""

    def __init__(self, model: Any, bits: int, group: int) -> None:
        super().__init__(model)
        self.bits, self.group = bits, group

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        out = super().attend(layer, q, k, v, start)
        at = self.model.model.layers[layer].self_attn
        # the input itself, from its keys and values: hidden = 4 heads of both together is square or tall here
        both = torch.cat([k, v]).transpose(0, 1).flatten(1)
        weight = torch.cat([at.k_proj.weight, at.v_proj.weight])
        x = torch.linalg.lstsq(weight.double(), both.double().T).solution.T.float()
        seen = self.seen(layer, x)
        place = torch.arange(start, start + len(x))
        for h in range(len(k)):
            s = self.slots[layer, h]
            dim = k.shape[2]
            rows = slice(h * dim, (h + 1) * dim)
            s.k[start:] = rope(self.model, seen @ at.k_proj.weight[rows].T, place)
            s.v[start:] = seen @ at.v_proj.weight[rows].T
        return out

    def seen(self, layer: int, x: Tensor) -> Tensor:
        return per_token(x, self.bits, self.group)

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None: ...


class Across(XQuant):
    """Layers behind layer 1 add to what the one before them reads back; that and the one before it take `many` bits."""

    many = 8

    def seen(self, layer: int, x: Tensor) -> Tensor:
        if layer < 2:
            self.sum = per_token(x, self.many, self.group)
        else:
            self.sum = self.sum + per_token(x - self.sum, self.bits, self.group)
        return self.sum


@pytest.mark.parametrize("bits", [4, 8])
def test_logits_are_those_of_quantized_inputs(bits: int) -> None:
    model, ids, sizes = build("llama", **MHA), prompt(90), [50] + [1] * 20 + [15, 1, 1, 1, 1, 1]
    want = run(XQuant(model, bits, 16), ids, sizes)
    got = run_cache(model, KVCache(model, f"xquant(bits={bits}, group=16, first=0)"), ids, sizes)
    close = (got - want).abs().amax(-1) < 0.02
    assert float(close.float().mean()) > 0.9  # a number between two codes may go either way
    full = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    assert float((got - want).square().mean()) < 0.05 * float((full - want).square().mean())


def test_logits_are_those_of_sums_over_layers() -> None:
    model, ids, sizes = build("llama", num_hidden_layers=4, **MHA), prompt(90), [50] + [1] * 20 + [15, 1, 1, 1, 1, 1]
    want = run(Across(model, 4, 16), ids, sizes)
    cache = KVCache(model, "xquant(bits=4, group=16, first=2, first_bits=8, across=True)")
    got = run_cache(model, cache, ids, sizes)
    assert cache.recipe.groups == ((1, 2, 3),)
    close = (got - want).abs().amax(-1) < 0.02
    assert float(close.float().mean()) > 0.9  # a number between two codes may go either way
    full = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    assert float((got - want).square().mean()) < 0.05 * float((full - want).square().mean())


@pytest.mark.parametrize("first", [0, 1, 3])
def test_sums_unquantized_give_the_full_cache(first: int) -> None:
    for family, more in (("llama", {}), ("qwen3", {"head_dim": 16}), ("gpt_neox", None)):
        model = build(family, num_hidden_layers=4, **({} if more is None else {**MHA, **more}))
        ids = prompt(sum(SIZES))
        want = run_cache(model, DynamicCache(config=model.config), ids, SIZES)
        got = run_cache(model, KVCache(model, f"xquant(bits=16, first={first}, across=True)"), ids, SIZES)
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_the_error_of_a_sum_does_not_grow_with_depth() -> None:
    """It is that of one code of the last difference: at most half a step of it, however many layers are below."""
    torch.manual_seed(0)
    code, x = MinMax(2, 16, "channels"), torch.randn(1, 40, 64)
    planes = [x + 0.1 * torch.randn(1, 40, 64) * i for i in range(12)]
    delta = Delta(MinMax(4, 16, "channels"), code, 12)
    blocks = delta.encode_together(planes, [{}] * 12)
    p = torch.rand(1, 3, 40)
    for i, (want, block) in enumerate(zip(planes, blocks, strict=True)):
        got = delta.decode(block, {})
        steps = block[f"scale{i}"].float().repeat_interleave(16, 2)
        assert bool(((got - want).abs() <= 0.51 * steps + 2e-3).all())
        torch.testing.assert_close(delta.mix(p, block, {}), p @ got, atol=1e-4, rtol=1e-4)


def test_sums_of_layers_beat_inputs_and_kivi_at_equal_bytes() -> None:
    """Inputs of neighbouring layers of a trained model are alike, with outlier channels in keys or without."""
    model, tokenizer = load_model("nano+outliers")
    text = (Path(kvloom.__file__).parent / "models" / "text" / "gutenberg.txt").read_text()[100_000:102_500]
    ids, sizes = tokenizer(text, return_tensors="pt").input_ids[:, :416], [400] + [1] * 16
    full = run_cache(model, DynamicCache(config=model.config), ids, sizes)[399:].log_softmax(-1)
    found = []
    for recipe in ("xquant(bits=2, across=True)", "xquant(bits=2)", "kivi(bits=2, residual=32)"):
        cache = KVCache(model, recipe)
        got = run_cache(model, cache, ids, sizes)[399:].log_softmax(-1)
        found.append((float((full.exp() * (full - got)).sum(-1).mean()), cache.report().used))
    (sums, size), (inputs, same), (kivi, more) = found
    assert size == same < more
    assert sums < 0.1 * inputs
    assert sums < 0.7 * kivi


def test_latents_are_the_inputs_in_the_directions_of_the_weights() -> None:
    """What values are stored as is x U, for the thin singular vectors of their weight: the same however it is got."""
    model, ids = build("llama", num_key_value_heads=1), prompt(64)
    seen: list[Tensor] = []
    handle = attentions(model)[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"][0]), with_kwargs=True
    )
    cache = KVCache(model, "xquant(bits=8, group=16, first=0)")
    run_cache(model, cache, ids, [64])
    handle.remove()
    plane = layers_of(cache)[1].groups[0].segments["main"].value
    run_ = plane.runs[0]
    inner = run_.codec.inner.inner
    got = inner.decode(run_.block, run_.const)[0]
    u, _, _ = torch.linalg.svd(attentions(model)[1].v_proj.weight.T, full_matrices=False)
    want = (seen[-1] @ u).detach()
    signs = (got * want).sum(0).sign()
    assert float((got * signs - want).abs().max()) < 0.02 * float(want.abs().max())


def test_4_bytes() -> None:
    """hidden * bits / 8 + 4 * hidden / group for a token and layer; the first layers take four bits."""
    model, n = build("llama", **MHA), 320
    cache = KVCache(model, "xquant(bits=2, group=16, first=1)")
    run_cache(model, cache, prompt(n), [n])
    want = [n * (64 * bits // 8 + 4 * 64 // 16) for bits in (4, 2, 2)]
    report = cache.report()
    assert [sum(e.nbytes for e in report.entries if e.layer == i) for i in range(3)] == want
    assert [cache.recipe.nbytes(layer.site, {"main": n}) for layer in cache.managed()] == want


def test_bytes_of_sums() -> None:
    """As without sums: each layer pays for its own difference only, and the ledger counts it once."""
    model, n = build("llama", num_hidden_layers=4, **MHA), 320
    cache = KVCache(model, "xquant(bits=2, group=16, first=2, across=True)")
    run_cache(model, cache, prompt(n), [n - 40] + [1] * 40)
    want = [n * (64 * bits // 8 + 4 * 64 // 16) for bits in (4, 4, 2, 2)]
    report = cache.report()
    assert [sum(e.nbytes for e in report.entries if e.layer == i) for i in range(4)] == want
    shares = [cache.recipe.nbytes(layer.site, {"main": n}) for layer in cache.managed()]  # whole bytes of a group's
    assert 0 <= sum(want) - sum(shares) < 3
    told = forecast(cache.recipe, [layer.site for layer in cache.managed()], n - 40, 40)
    assert [each.used for each in told] == want


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("mode", [m for m in MODES if m != "sampled"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_ways_of_running(family: str, mode: str, across: bool) -> None:
    """Batches, padding, beams, drafts, crops, copies and chunks: as the full cache, when inputs are exact."""
    model = subject(family, **(MHA if family == "llama" else {}))
    assistant = build(family, assistant=True, **(MHA if family == "llama" else {}))
    got = MODES[mode](model, assistant, lambda m: make_cache(m, f"xquant(bits=16, first=1, across={across})"))
    want = MODES[mode](model, assistant, lambda m: make_cache(m, "full"))
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    for a, b in zip(got.tokens, want.tokens, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("family", "options"), INPUTS, ids=[family for family, _ in INPUTS])
def test_kernels_make_the_same(family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels, where there are any, and plain torch read the same keys and values out of inputs."""
    model, ids, sizes = build(family, **options), prompt(120), [100] + [1] * 20
    got = run_cache(model, KVCache(model, "xquant(bits=4, group=16)"), ids, sizes)
    monkeypatch.setattr("kvloom.core.layer.job", lambda *x: None)
    want = run_cache(model, KVCache(model, "xquant(bits=4, group=16)"), ids, sizes)
    close = (got - want).abs().amax(-1) < 0.02
    assert float(close.float().mean()) > 0.9  # a number between two codes may go either way


def test_a_crop_inside_and_a_copy() -> None:
    model, ids = subject("llama", **MHA), prompt(120)
    cache = KVCache(model, "xquant(bits=8, group=16)")
    run_cache(model, cache, ids, [60] + [1] * 5)
    cache.crop(-20)
    twin = copy.deepcopy(cache)
    fresh = KVCache(model, "xquant(bits=8, group=16)")
    run_cache(model, fresh, ids, [45])
    got, other = (run_cache(model, x, ids, [1] * 20) for x in (cache, twin))
    assert torch.equal(got, other)
    torch.testing.assert_close(got, run_cache(model, fresh, ids, [1] * 20), atol=0.05, rtol=0.05)


def test_stock_caches_and_detach() -> None:
    """Listening changes nothing for other caches, serves two kvloom caches in turn, and ends with detach."""
    model, ids, sizes = build("llama", **MHA), prompt(40), [30] + [1] * 10
    want = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    cache, kivi = KVCache(model, "xquant(bits=16)"), KVCache(model, "full")
    for each in (cache, DynamicCache(config=model.config), kivi):
        torch.testing.assert_close(run_cache(model, each, ids, sizes), want, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0, :30], want[:30], atol=1e-3, rtol=1e-3)
    assert all(len(m._forward_pre_hooks) == 1 for m in attentions(model).values())
    KVCache(model, "xquant")
    assert all(len(m._forward_pre_hooks) == 1 for m in attentions(model).values())
    twin = copy.deepcopy(model)
    for each in (model, twin):
        kvloom.detach(each)
        assert not any(m._forward_pre_hooks for m in attentions(each).values())
    torch.testing.assert_close(
        run_cache(twin, KVCache(twin, "xquant(bits=16)"), ids, sizes), want, atol=1e-3, rtol=1e-3
    )


def test_outlier_channels_of_keys_do_not_matter() -> None:
    """Inputs have none of them: with channels planted, predictions stay as they were, and those of per-token codes do not."""
    ids, sizes, errors = prompt(120), [100] + [1] * 20, []
    for planted in (False, True):
        model = build("llama", **MHA)
        if planted:
            plant(model)
        full = run_cache(model, DynamicCache(config=model.config), ids, sizes)
        found = [
            run_cache(model, KVCache(model, recipe), ids, sizes)
            for recipe in ("xquant(group=16)", "turboquant(bits=4)")
        ]
        errors.append([float((x - full)[100:].square().mean()) for x in found])
    assert errors[1][0] == pytest.approx(errors[0][0], rel=0.1)
    assert errors[1][1] > 2 * errors[0][1]


def test_what_cannot_be_is_refused() -> None:
    for wrong in ("bits=5", "group=9", "first=-1", "across=1"):
        with pytest.raises(RecipeError):
            parse(f"xquant({wrong})")
    with pytest.raises(RecipeError, match="normalizes"):
        KVCache(build("qwen3", num_key_value_heads=1, head_dim=16), "xquant(group=16)")
    for options, why in (
        ({"num_key_value_heads": 1}, "larger than keys"),
        ({**MHA, "num_hidden_layers": 1}, "together"),
    ):
        with pytest.raises(RecipeError, match=why):
            KVCache(build("llama", **options), "xquant(group=16, first=1, across=True)")
    with pytest.raises(KvloomError, match="whole group"):
        KVCache(build("llama", **MHA), "h2o | xquant(group=16, first=1, across=True)")
    with pytest.raises(KvloomError, match="how kept tokens"):
        KVCache(build("llama", **MHA), "xquant(group=16) | kivi(group=16)")
    with pytest.raises(KvloomError, match="whole layer"):
        KVCache(build("llama", **MHA), "h2o | xquant(group=16)")
    model = build("llama", **MHA)
    attentions(model)[0].k_proj.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(KvloomError, match="not just its input"):
        run_cache(model, KVCache(model, "xquant(group=16)"), prompt(10), [10])


@pytest.mark.skipif(native.ISA is None, reason="in torch the pieces have a size of their own")
def test_no_copy_of_the_keys_while_decoding() -> None:
    """What a step makes again, it makes in pieces: no tensor is as large as an eighth of a layer's keys."""
    model, n = subject("llama", **MHA, head_dim=32, vocab_size=64, max_position_embeddings=8200), 8192
    cache = KVCache(model, "xquant(bits=4, group=16)")
    ids = prompt(n + 2, distinct=50)
    run_cache(model, cache, ids, [n, 1])
    with Largest(n) as largest:
        run_cache(model, cache, ids, [1])
    assert 0 < largest.most <= n * 4 * 32 * 4 / 8, largest.by
