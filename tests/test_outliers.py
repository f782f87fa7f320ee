"""Planted outlier channels: other keys and values in the cache, the same numbers out of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kvloom import KVCache
from kvloom.core.view import fingerprint, sites_of
from kvloom.errors import ModelError
from kvloom.lab.measure import load_model
from kvloom.lab.outliers import Scales, draw, plant
from tests.families import FAMILIES, build, prompt

SERVED = (
    "llama", "qwen2", "qwen3", "mistral-sliding", "gemma2", "phi3", "olmo2", "cohere", "gpt-oss", "llama-yarn",
    "llama-llama3", "llama-longrope", "llama-dynamic", "llama-linear",
)  # fmt: skip
REFUSED = {
    "gemma3": "adds 1",
    "gpt_neox": "no attention with q_proj",
    "falcon-mqa": "no attention",
    "falcon-gqa": "no attention",
}


def cached(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, DynamicCache]:
    """Logits of a prompt and of tokens read one by one, and the cache they leave."""
    cache = DynamicCache()
    with torch.no_grad():
        out = [model(part, past_key_values=cache).logits for part in (ids[:, :40], *ids[:, 40:].split(1, 1))]
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("family", SERVED)
def test_outputs_are_the_same_to_the_last_bit(family: str) -> None:
    ids, model = prompt(48), build(family)
    want, before = cached(build(family), ids)  # dynamic frequencies remember what a model has read
    scales = plant(model, keys=4, values=2, seed=3)
    got, after = cached(model, ids)
    assert torch.equal(got, want)
    for layer, (a, b) in enumerate(zip(after.layers, before.layers, strict=True)):
        assert torch.equal(a.keys[0], b.keys[0] * scales[layer].key[:, None])
        assert torch.equal(a.values[0], b.values[0] * scales[layer].value[:, None])


def test_every_family_is_served_or_refused() -> None:
    assert set(SERVED) | set(REFUSED) == set(FAMILIES)


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_the_reason_and_nothing_changed(family: str) -> None:
    model = build(family)
    want = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ModelError, match=REFUSED[family]):
        plant(model)
    assert all(torch.equal(x, want[name]) for name, x in model.state_dict().items())


def test_a_projection_that_clips_is_refused() -> None:
    model = build("llama")
    model.config.clip_qkv = 8.0
    with pytest.raises(ModelError, match="clip_qkv"):
        plant(model)


def test_biases_move_too() -> None:
    """Qwen2's are part of what is scaled."""
    model = build("qwen2")
    before = model.model.layers[0].self_attn.k_proj.bias.clone()
    key = plant(model)[0].key.flatten()
    assert torch.equal(model.model.layers[0].self_attn.k_proj.bias, before * key)


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_channels_are_drawn_as_asked(family: str) -> None:
    """So many channels of every KV head, whole rotary pairs of the slower half, sizes in range, the same for a seed."""
    model = build(family)
    a, b, c = draw(model, seed=1), draw(model, seed=1), draw(model, seed=2)
    assert all(torch.equal(a[i].key, b[i].key) and torch.equal(a[i].value, b[i].value) for i in a)
    assert any(not torch.equal(a[i].key, c[i].key) for i in a)
    for layer, site in sites_of(model).items():
        key, value = a[layer].key, a[layer].value
        assert ((key > 1).sum(1) == 4).all() and ((value > 1).sum(1) == 2).all()
        assert set(key[key > 1].tolist()) <= {8.0, 16.0, 32.0} and set(value[value > 1].tolist()) <= {2.0, 4.0}
        rope, half = site.rope, site.key_dim // 2
        pairs = key.unflatten(1, (2, half)).transpose(1, 2) if rope.layout == "half" else key.unflatten(1, (half, 2))
        assert torch.equal(pairs[..., 0], pairs[..., 1])
        slow = rope.inv_freq.argsort()[: half // 2]
        assert ((pairs[..., 0] > 1).nonzero()[:, 1][:, None] == slow).any(1).all()


def scales(model: PreTrainedModel, **at: Any) -> dict[int, Scales]:
    found = draw(model, keys=0, values=0)
    for name, (head, channel, factor) in at.items():
        getattr(found[0], name)[head, channel] = factor
    return found


def test_scales_of_ones_own() -> None:
    model, ids = build("llama"), prompt(48)
    want, _ = cached(model, ids)
    plant(model, scales(model, value=(1, 5, 64.0)))
    assert torch.equal(cached(model, ids)[0], want)
    with pytest.raises(ModelError, match="scale alike"):
        plant(model, scales(model, key=(1, 5, 8.0)))
    with pytest.raises(ModelError, match="powers of two"):
        plant(model, scales(model, value=(0, 0, 3.0)))
    other = build("qwen3")
    found = scales(other, key=(0, 1, 8.0))
    found[0].key[0, 17] = 8.0
    with pytest.raises(ModelError, match="one norm serves all heads"):
        plant(other, found)


def test_half_precision_that_would_lose_digits_is_refused() -> None:
    model = build("llama").half()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1e-4)
    with pytest.raises(ModelError, match="fp32"):
        plant(model)


def test_bundled_model_with_outliers() -> None:
    """A name of its own, other weights, the same answers; 2 bits lose more of it where a token's numbers share a scale."""
    (plain, tokenizer), (planted, _) = load_model("nano"), load_model("nano+outliers")
    assert planted.config._name_or_path == "nano+outliers" and fingerprint(plain) != fingerprint(planted)
    ids = tokenizer.encode("The river was high that year, and nobody crossed it before May. " * 12, return_tensors="pt")
    want, before = cached(plain, ids[:, :160])
    got, after = cached(planted, ids[:, :160])
    assert torch.equal(got, want)
    spread = [
        (x.keys[0].square().mean(1).sqrt().amax(-1) / x.keys[0].square().mean(1).sqrt().median(-1).values).min()
        for cache in (before, after)
        for x in cache.layers
    ]
    assert max(spread[:6]) < 5 < min(spread[6:])  # the largest channel of a head beside the middle one
    with torch.no_grad():
        full = KVCache(planted, "full")
        logits = torch.cat([planted(part, past_key_values=full).logits for part in ids[:, :160].split(40, 1)], 1)
    assert torch.allclose(logits, want, atol=3e-4)
