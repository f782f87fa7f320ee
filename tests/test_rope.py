"""kvloom.core.rope against the keys that stock transformers models rotate and cache."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.core.rope import Layout, Rope, rope_of
from kvloom.errors import ModelError

ORIGINAL = 64  # where length-dependent frequencies change
FAR = 30_000  # fp32 angles have lost a thousandth of a radian here

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4 * ORIGINAL,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD: dict[str, Any] = {**TINY, "head_dim": 32}
MHA = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}


def _rope(rope_type: str, **extra: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 10000.0, **extra}


def _partial(fraction: float) -> dict[str, Any]:
    return {"rope_parameters": _rope("default", partial_rotary_factor=fraction)}


_AT = {"original_max_position_embeddings": ORIGINAL}
_SHORT = [1.0 + 0.05 * i for i in range(8)]
_LONG = [1.5 + 0.4 * i for i in range(8)]
_LINEAR = _rope("linear", factor=4.0)
_DYNAMIC = _rope("dynamic", factor=4.0)
_YARN = _rope("yarn", factor=4.0, **_AT)
_LONGROPE = _rope("longrope", factor=4.0, short_factor=_SHORT, long_factor=_LONG, **_AT)
_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **_AT)
_TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
_BY_TYPE = {"sliding_attention": _rope("default"), "full_attention": _LINEAR | {"rope_theta": 1e6}}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 96}
_BLOOM = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}
_FALCON = {key: value for key, value in MHA.items() if key != "intermediate_size"}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_LLAMA4 = {"intermediate_size_mlp": 64, "moe_layers": [], "no_rope_layers": [1, 0], "use_qk_norm": False}

# What `rope_of` should say of a layer: kind, layout and R, or None
Expected = tuple[str, Layout, int] | None


def _half(rotary_dim: int, kind: str = "default") -> Expected:
    return (kind, "half", rotary_dim)


def _pairs(rotary_dim: int) -> Expected:
    return ("default", "interleaved", rotary_dim)


# name -> model class without "ForCausalLM", arguments of its config, what to expect of its two layers
MODELS: dict[str, tuple[str, dict[str, Any], list[Expected]]] = {
    "llama": ("Llama", TINY, [_half(16)] * 2),
    "llama-linear": ("Llama", {**TINY, "rope_parameters": _LINEAR}, [_half(16, "linear")] * 2),
    "llama-dynamic": (
        "Llama",
        {**TINY, "rope_parameters": _DYNAMIC, "max_position_embeddings": ORIGINAL},
        [_half(16, "dynamic")] * 2,
    ),
    "llama-yarn": ("Llama", {**TINY, "rope_parameters": _YARN}, [_half(16, "yarn")] * 2),
    "llama-longrope": ("Llama", {**TINY, "rope_parameters": _LONGROPE}, [_half(16, "longrope")] * 2),
    "llama-llama3": ("Llama", {**TINY, "rope_parameters": _LLAMA3}, [_half(16, "llama3")] * 2),
    "qwen3": ("Qwen3", HEAD, [_half(32)] * 2),
    "gemma2": ("Gemma2", {**HEAD, **_TYPES}, [_half(32)] * 2),
    "gemma3": ("Gemma3", {**HEAD, **_TYPES, "rope_parameters": _BY_TYPE}, [_half(32), _half(32, "linear")]),
    "phi3": ("Phi3", TINY, [_half(16)] * 2),
    "phi3-longrope": ("Phi3", {**TINY, "rope_parameters": _LONGROPE, **_AT}, [_half(16, "longrope")] * 2),
    "nanochat": ("NanoChat", TINY, [_half(16)] * 2),  # turns backwards
    "gpt_neox": ("GPTNeoX", {**MHA, **_partial(0.25)}, [_half(4)] * 2),
    "phi": ("Phi", {**TINY, **_partial(0.5)}, [_half(8)] * 2),
    "stablelm": ("StableLm", {**TINY, **_partial(0.25)}, [_half(4)] * 2),
    "nemotron": ("Nemotron", {**HEAD, **_partial(0.5)}, [_half(16)] * 2),
    "olmo2": ("Olmo2", TINY, [_half(16)] * 2),
    "cohere": ("Cohere", {**TINY, "use_qk_norm": True}, [_pairs(16)] * 2),
    "cohere2": ("Cohere2", {**HEAD, **_TYPES}, [_pairs(32), None]),
    "gpt-oss": ("GptOss", {**HEAD, **_EXPERTS, **_TYPES, "rope_parameters": _YARN}, [_half(32, "yarn")] * 2),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 8}, [_pairs(8)] * 2),
    "falcon": ("Falcon", {**_FALCON, "alibi": False}, [_half(16)] * 2),
    "falcon-alibi": ("Falcon", {**_FALCON, "alibi": True}, [None, None]),
    "smollm3": ("SmolLM3", {**TINY, "no_rope_layers": [1, 0]}, [_half(16), None]),
    "glm": ("Glm", HEAD, [_pairs(16)] * 2),
    "glm4": ("Glm4", HEAD, [_pairs(16)] * 2),
    "llama4": ("Llama4", {**HEAD, **_EXPERTS, **_LLAMA4}, [_pairs(32), None]),
    "gpt2": ("GPT2", _GPT, [None, None]),
    "bloom": ("Bloom", _BLOOM, [None, None]),
}
ROTARY = [name for name, (_, _, layers) in MODELS.items() if any(layers)]
NORM_AFTER = ("nanochat",)  # a norm without weights follows the rotation: directions are what can be compared
MAX_POSITION = {"gptj": 500, "gpt2": 500}  # models with a table


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model; norms are far from 1, so that a norm between projection and rotation can't hide."""
    family, options, _ = MODELS[name]
    cls = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cls(cls.config_class(**copy.deepcopy(options)))  # configs write into their dicts
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape) * (0.5 if value.dim() == 1 else value.shape[-1] ** -0.5))
    return model.to(dtype).eval()


def record(model: Any, position: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[Tensor | None, Tensor]]:
    """One forward on tokens at `position` [B, n]; -> per layer keys before (or None) and after rotation.

    What the modeling file's own rotation function was given is what it rotated; it's [B, H, n, R or D] here.
    """
    modeling = sys.modules[type(model).__module__]
    gptj, llama4 = "GPTJ" in type(model).__name__, "Llama4" in type(model).__name__
    name = "apply_rotary_emb" if llama4 else "apply_rotary_pos_emb"
    stock: Callable[..., Any] | None = getattr(modeling, name, None)
    pending: list[Tensor] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        key = args[0] if gptj else args[1]
        pending.append(key.transpose(1, 2) if gptj or llama4 else key)
        assert stock is not None
        return stock(*args, **kwargs)

    if stock is not None:
        monkeypatch.setattr(modeling, name, spy)
    seen: dict[int, tuple[Tensor | None, Tensor]] = {}
    cache = transformers.DynamicCache(config=model.config)
    update = cache.update

    def spy_update(key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        seen[layer_idx] = (pending[0] if pending else None, key)
        return update(key, value, layer_idx, *args, **kwargs)

    def forget(*_: Any) -> None:
        pending.clear()  # GPT-J rotates keys first and queries afterwards, one call each

    monkeypatch.setattr(cache, "update", spy_update)
    for block in model.modules():
        if type(block).__name__.endswith(("DecoderLayer", "Block", "Layer")):
            block.register_forward_pre_hook(forget)
    kwargs = {} if "Bloom" in type(model).__name__ else {"position_ids": position}
    with torch.no_grad():
        model(torch.randint(3, 96, position.shape), past_key_values=cache, use_cache=True, **kwargs)
    return seen


def relative(found: Tensor, true: Tensor) -> float:
    return float((found.float() - true.float()).abs().max() / true.float().abs().max())


@pytest.mark.exactness
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("name", MODELS)
def test_rotates_as_the_model_does(name: str, far: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    if far:
        rope_of(model, 0)  # what is asked later has to follow frequencies that change
    # two rows at different positions, as under left padding; frequencies change between near and far
    n = 24
    start = min(FAR, MAX_POSITION.get(name, FAR) - 2 * n) if far else 0
    position = start + torch.arange(n) + torch.tensor([[0], [7]])
    seen = record(model, position, monkeypatch)
    _, _, expected = MODELS[name]
    assert len(seen) == len(expected)
    for layer, (pre, post) in seen.items():
        rope = rope_of(model, layer)
        wanted = expected[layer]
        if rope is None or wanted is None:
            assert rope is None and wanted is None and pre is None
            continue
        assert (rope.kind, rope.layout, rope.rotary_dim, rope.offset) == (*wanted, 0)
        assert rope.varies == (rope.kind in ("dynamic", "longrope"))
        assert rope.inv_freq.dtype == torch.float32 and rope.inv_freq.shape == (rope.rotary_dim // 2,)
        assert pre is not None
        pre = torch.cat((pre, post[..., pre.shape[-1] :]), -1)  # some are given only the channels that turn
        if name in NORM_AFTER:
            pre, post = (F.normalize(t, dim=-1) for t in (pre, post))
        at = position[:, None]
        assert relative(rope.rotate(pre, at), post) < 1e-6
        assert relative(rope.unrotate(post, at), pre) < 1e-6
        turned = rope.rotate(pre, at)
        assert relative(rope.unrotate(turned, at), pre) < 1e-6


@pytest.mark.exactness
@pytest.mark.parametrize("name", ROTARY)
def test_low_precision_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounding of bf16 models is followed bit by bit; un-rotating costs little more than that."""
    model = build(name, torch.bfloat16)
    position = torch.arange(20)[None] + 30
    for layer, (pre, post) in record(model, position, monkeypatch).items():
        rope = rope_of(model, layer)
        if rope is None or pre is None:
            assert rope is None and pre is None
            continue
        pre = torch.cat((pre, post[..., pre.shape[-1] :]), -1)
        if name in NORM_AFTER:
            pre = F.rms_norm(pre.float(), pre.shape[-1:], eps=1e-6).to(pre.dtype)
        rotated, back = rope.rotate(pre, position), rope.unrotate(post, position)
        assert rotated.dtype == back.dtype == torch.bfloat16
        assert relative(rotated, post) <= (2**-7 if name in NORM_AFTER else 0)
        assert relative(back, pre) < 2**-6


def test_probing_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llama-dynamic", "llama-longrope"):
        model = build(name).train()
        model.model.embed_tokens.eval()
        record(model, torch.arange(3 * ORIGINAL)[None], monkeypatch)
        rotary = model.model.rotary_emb
        buffer, values = rotary.inv_freq, rotary.inv_freq.clone()
        longest = getattr(rotary, "max_seq_len_cached", None)
        rope = rope_of(model, 1)
        assert rope is not None and torch.equal(rope.inv_freq, values)
        assert rotary.inv_freq is buffer and torch.equal(buffer, values)
        assert getattr(rotary, "max_seq_len_cached", None) == longest
        assert set(rotary._non_persistent_buffers_set) >= {"inv_freq"} and "inv_freq" not in rotary.state_dict()
        assert model.training and not model.model.embed_tokens.training
        record(model, torch.arange(8)[None], monkeypatch)
        now = rope_of(model, 1)
        assert now is not None and not torch.equal(now.inv_freq, rope.inv_freq), "a snapshot of the present frequencies"


def test_a_probe_is_made_once_per_model_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    calls: list[object] = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(0))
    assert [rope_of(model, i) is not None for i in (0, 1, 0)] == [True] * 3
    assert len(calls) == 1
    low = rope_of(model.to(torch.bfloat16), 0)
    assert len(calls) == 2 and low is not None
    assert torch.equal(low.inv_freq, model.model.rotary_emb.inv_freq.float()), "as cast together with the model"


def test_refusals() -> None:
    model = build("llama")
    with pytest.raises(ModelError, match=r"layer=2.*LlamaForCausalLM has layers 0 to 1"):
        rope_of(model, 2)
    with pytest.raises(ModelError, match="layer=-1"):
        rope_of(model, -1)
    with torch.device("meta"):
        bare = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*meta"):
        rope_of(bare, 0)


def test_keys_that_do_not_rotate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    modeling = sys.modules[type(model).__module__]
    stock = modeling.apply_rotary_pos_emb

    def stretched(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **kwargs: Any) -> Any:
        return stock(q, k, cos * (1 + 0.01 * cos), sin, **kwargs)

    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", stretched)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: layer 0 moves its keys"):
        rope_of(model, 0)


def _some(layout: Layout = "half", rotary_dim: int = 16, offset: int = 0, **kwargs: Any) -> Rope:
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    return Rope(inv_freq, layout, rotary_dim, offset, **kwargs)


SHAPES = [("half", 16, 0), ("half", 8, 0), ("half", 8, 8), ("interleaved", 16, 0), ("interleaved", 6, 10)]
shapes = st.sampled_from(SHAPES)
positions = st.integers(0, 32_000)
deltas = st.integers(-32_000, 32_000)
seeds = st.integers(0, 2**16)
few = settings(deadline=None, max_examples=40)


def _keys(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


@few
@given(shapes, seeds, deltas, deltas, positions)
def test_shifts_compose(shape: Any, seed: int, a: int, b: int, p: int) -> None:
    rope, x = _some(*shape), _keys(seed)
    assert relative(rope.shift(rope.shift(x, a), b), rope.shift(x, a + b)) < 1e-6
    assert torch.equal(rope.shift(x, 0), x)
    assert torch.equal(rope.shift(x, 0, position=p), x)
    assert torch.allclose(rope.shift(x, a).norm(dim=-1), x.norm(dim=-1), rtol=1e-6)


@few
@given(shapes, seeds, positions, positions, st.sampled_from([1.0, 1.35]))
def test_shift_moves_keys(shape: Any, seed: int, p: int, q: int, scaling: float) -> None:
    rope, x = _some(*shape, scaling=scaling), _keys(seed)
    old, new = rope.rotate(x, p), rope.rotate(x, q)
    assert relative(rope.shift(old, q - p, position=p), new) < 1e-6
    bound = 1e-6 + 2**-24 * (p + q)  # the model's two fp32 angles are off by half a unit in the last place each
    error = (rope.shift(old, q - p) - new).norm(dim=-1) / new.norm(dim=-1)
    assert float(error.max()) < bound


@few
@given(shapes, seeds, positions, st.integers(0, 4000), deltas)
def test_scores_depend_on_distance_only(shape: Any, seed: int, p: int, gap: int, delta: int) -> None:
    rope = _some(*shape)
    key, query = rope.rotate(_keys(seed), p), rope.rotate(_keys(seed + 1), p + gap)
    moved = rope.shift(query, delta) @ rope.shift(key, delta).mT
    assert relative(moved, query @ key.mT) < 2e-6
    turned = rope.shift(query, -delta) @ key.mT  # turning the query back is moving the keys ahead
    assert relative(turned, query @ rope.shift(key, delta).mT) < 2e-6


@few
@given(shapes, seeds, positions)
def test_unrotate_inverts(shape: Any, seed: int, p: int) -> None:
    x = _keys(seed)
    for scaling in (1.0, 1.35):
        rope = _some(*shape, scaling=scaling)
        assert relative(rope.unrotate(rope.rotate(x, p), p), x) < 5e-7
    low, rope = x.bfloat16(), _some(*shape)
    for result in (rope.rotate(low, p), rope.unrotate(low, p), rope.shift(low, p)):
        assert result.dtype == torch.bfloat16 and result.shape == low.shape
    # fp32 arithmetic inside: what remains is the rounding of what rotate and unrotate return
    assert relative(rope.unrotate(rope.rotate(low, p), p), low) < 2**-6


def test_positions_broadcast_and_other_channels_pass() -> None:
    rope, x = _some("half", 8, 4), _keys(0)
    p = torch.tensor([3, 1, 4, 1, 5])
    each = torch.stack([rope.rotate(x[..., i, :], int(p[i])) for i in range(5)], -2)
    assert torch.equal(rope.rotate(x, p), each)
    rows = torch.stack((p, p + 2))[:, None]
    assert torch.equal(rope.rotate(x, rows)[1], rope.rotate(x[1], p + 2))
    heads = torch.arange(15).reshape(3, 5)
    assert torch.equal(rope.shift(x, heads)[:, 2], rope.shift(x[:, 2], heads[2]))
    assert torch.equal(rope.rotate(x, p)[..., :4], x[..., :4]) and torch.equal(rope.rotate(x, p)[..., 12:], x[..., 12:])
    assert not torch.equal(rope.rotate(x, p)[..., 4:12], x[..., 4:12])


def test_shift_refuses_frequencies_that_vary() -> None:
    rope = replace(_some(), kind="dynamic", varies=True)
    with pytest.raises(ModelError, match=r"shift.*'dynamic'"):
        rope.shift(_keys(0), 1)
