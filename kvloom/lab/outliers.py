"""Outlier channels like those of large models, planted in any Llama-type model without changing what it computes.

Keys are multiplied by powers of two, channel by channel, and queries divided by them; values likewise, and the columns of
the output projection divided. Every product of a query with a key, or of a value with a weight, stays the same number, and
so do its roundings: in fp32 the logits are equal to the last bit. Channels that RoPE turns into one another are scaled
alike, and so are all query heads that share a KV head. What a cache stores has other ranges, and a codec has to cope.

Large models have a few channels of keys that stand out in nearly every token, most of them among those that RoPE turns
slowly (KIVI, arXiv 2402.02750; KVQuant, arXiv 2401.18079; arXiv 2502.01563); values are milder.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvloom.core.rope import Rope
from kvloom.core.site import Site
from kvloom.core.view import sites_of, text_config
from kvloom.errors import ModelError

__all__ = ["SUFFIX", "Scales", "draw", "plant"]

SUFFIX = "+outliers"  # `load_model("nano+outliers")`
NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
PARTS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", *sum(NORMS, ())}


@dataclass(frozen=True)
class Scales:
    """What the keys and the values of one layer are multiplied by: [KV heads, D] fp32, powers of two."""

    key: Tensor
    value: Tensor


def draw(
    model: PreTrainedModel,
    keys: int = 4,
    values: int = 2,
    key_bits: tuple[int, int] = (3, 5),
    value_bits: tuple[int, int] = (1, 2),
    seed: int = 0,
) -> dict[int, Scales]:
    """Chooses channels for every layer, always the same ones for a seed.

    keys, values: channels of each KV head, those of keys in whole rotary pairs from the slower half. key_bits, value_bits:
    least and most power of two: keys 8 to 32 times as large as before, values 2 to 4 times. Where a norm's weight serves
    all heads of a layer, so do the key channels.
    """
    found = {}
    for layer, site in sites_of(model).items():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
        shared = _norm_weight(_attention(model, site), site) == "shared"
        key = torch.ones(site.kv_heads, site.key_dim)
        for head in range(1 if shared else site.kv_heads):
            units = _units(site)
            units = units[: max(-(-keys // len(units[0])), len(units) // 2)]
            for at in torch.randperm(len(units), generator=generator)[: -(-keys // len(units[0]))].tolist():
                key[head, units[at]] = 2.0 ** int(torch.randint(key_bits[0], key_bits[1] + 1, (), generator=generator))
        value = torch.ones(site.kv_heads, site.value_dim)
        for row in value:
            at = torch.randperm(site.value_dim, generator=generator)[:values]
            row[at] = 2.0 ** torch.randint(value_bits[0], value_bits[1] + 1, (len(at),), generator=generator).float()
        found[layer] = Scales(key[:1].expand(site.kv_heads, -1).clone() if shared else key, value)
    return found


@torch.no_grad()
def plant(model: PreTrainedModel, scales: dict[int, Scales] | None = None, **options: Any) -> dict[int, Scales]:
    """Scales the weights of a model in place, by `draw(model, **options)` if nothing else is given. Returns the scales.

    Outputs stay bit-identical in fp32 and bf16. Raises ModelError, before anything is changed, for scales that do not
    cancel and for models whose attention is not built from projections with at most a plain norm behind them.
    """
    sites = sites_of(model)
    scales = draw(model, **options) if scales is None else scales
    changes: list[tuple[Tensor, Tensor]] = []
    for layer, each in scales.items():
        changes += _changes(_attention(model, sites[layer]), sites[layer], each)
    for weight, factor in changes:
        if not torch.equal((weight * factor).to(weight.dtype) / factor, weight.float()):
            raise ModelError(f"model: some weights in {weight.dtype} would overflow or lose digits. Load it in fp32.")
    for weight, factor in changes:
        weight.mul_(factor)
    model.config._name_or_path = f"{model.config._name_or_path}{SUFFIX}"  # profiles of the model as it was don't fit
    return scales


def _changes(module: Any, site: Site, scales: Scales) -> list[tuple[Tensor, Tensor]]:
    """Weights of one layer, and what each is multiplied by."""
    for name, x, dim in (("key", scales.key, site.key_dim), ("value", scales.value, site.value_dim)):
        if tuple(x.shape) != (site.kv_heads, dim) or not bool((x.frexp().mantissa == 0.5).all()):
            raise ModelError(f"scales of layer {site.layer}: {name} must be powers of two, [{site.kv_heads}, {dim}].")
    for unit in _units(site):
        if not bool((scales.key[:, unit] == scales.key[:, unit[:1]]).all()):
            raise ModelError(
                f"scales of layer {site.layer}: RoPE turns key channels {unit} into one another; scale alike."
            )
    device = module.o_proj.weight.device
    key, value = scales.key.float().to(device), scales.value.float().to(device)
    query = 1 / key.repeat_interleave(site.group, 0)
    out = 1 / value.repeat_interleave(site.group, 0)
    found = [(module.o_proj.weight, out.flatten()[None])]
    how, norms = _norm_weight(module, site), _norms(module)
    if how == "shared" and not bool((key == key[0]).all()):
        raise ModelError(f"scales of layer {site.layer}: one norm serves all heads, so all need the same key channels.")
    if norms is not None:
        for norm, x in zip(norms, (query, key), strict=True):
            for weight in (norm.weight, getattr(norm, "bias", None)):
                if weight is not None:
                    found.append((weight, (x[0] if how == "shared" else x.flatten()).view_as(weight)))
        query, key = torch.ones_like(query), torch.ones_like(key)
    parts = query.flatten(), key.flatten(), value.flatten()
    if hasattr(module, "qkv_proj"):
        return [*found, *_linear(module.qkv_proj, torch.cat(parts))]
    for part, x in zip((module.q_proj, module.k_proj, module.v_proj), parts, strict=True):
        found += _linear(part, x)
    return found


def _linear(part: nn.Linear, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(part.weight, rows[:, None])] + ([] if part.bias is None else [(part.bias, rows)])


def _units(site: Site) -> list[list[int]]:
    """Key channels that must be scaled alike: rotary pairs, slowest first, then channels that do not turn."""
    rope: Rope | None = site.rope
    if rope is None:
        return [[i] for i in range(site.key_dim)]
    half, start = rope.rotary_dim // 2, rope.offset
    pairs = [
        [start + i, start + i + half] if rope.layout == "half" else [start + 2 * i, start + 2 * i + 1]
        for i in range(half)
    ]
    turned = {i for pair in pairs for i in pair}
    return [pairs[i] for i in rope.inv_freq.abs().argsort().tolist()] + [
        [i] for i in range(site.key_dim) if i not in turned
    ]


def _attention(model: PreTrainedModel, site: Site) -> Any:
    """The attention module of a layer. Raises ModelError where it is not one that can be scaled."""
    name, config = f"model {type(model).__name__}", text_config(model)
    found = [m for m in model.modules() if getattr(m, "layer_idx", None) == site.layer and hasattr(m, "o_proj")]
    if len(found) != 1:
        raise ModelError(
            f"{name}: layer {site.layer} has no attention with q_proj, k_proj, v_proj and o_proj to scale."
        )
    module, q, kv = found[0], site.q_heads * site.key_dim, site.kv_heads * site.key_dim
    wanted = {"qkv_proj": q + 2 * kv} if hasattr(module, "qkv_proj") else {"q_proj": q, "k_proj": kv, "v_proj": kv}
    for part, rows in wanted.items():
        linear = getattr(module, part, None)
        if not isinstance(linear, nn.Linear) or linear.weight.shape[0] != rows or not linear.weight.is_floating_point():
            raise ModelError(f"{name}: {part} of layer {site.layer} is no plain linear layer with {rows} rows.")
    if not isinstance(module.o_proj, nn.Linear) or module.o_proj.weight.shape[1] != q:
        raise ModelError(f"{name}: o_proj of layer {site.layer} is no plain linear layer with {q} columns.")
    others = [part for part, m in module.named_children() if part not in PARTS and any(True for _ in m.parameters())]
    if others or getattr(config, "clip_qkv", None) is not None:
        what = others[0] if others else "clip_qkv"
        raise ModelError(
            f"{name}: {what!r} acts on queries, keys or values of layer {site.layer}, and scales may not cancel."
        )
    return module


def _norms(module: Any) -> tuple[Any, Any] | None:
    return next(((getattr(module, q), getattr(module, k)) for q, k in NORMS if hasattr(module, q)), None)


def _norm_weight(module: Any, site: Site) -> str:
    """Norms of queries and keys: "none", "shared" by all heads, or with weights for "each" head."""
    norms = _norms(module)
    if norms is None:
        return "none"
    sizes = [norm.weight.numel() if getattr(norm, "weight", None) is not None else 0 for norm in norms]
    how = {
        (site.key_dim, site.key_dim): "shared",
        (site.q_heads * site.key_dim, site.kv_heads * site.key_dim): "each",
    }.get((sizes[0], sizes[1]))
    if site.q_heads == 1 and how == "shared":
        how = "each"
    if how is None or not all(_plain(norm) for norm in norms):
        raise ModelError(
            f"layer {site.layer}: the norm of queries and keys ({type(norms[1]).__name__}) does not multiply by its weight, as "
            "Gemma's, which adds 1 to it: no power of two can be planted in it exactly."
        )
    return how


@torch.no_grad()
def _plain(norm: Any) -> bool:
    """Whether twice the weight (and bias) gives twice the output, exactly."""
    x = torch.randn(3, *norm.weight.shape, generator=torch.Generator().manual_seed(0)).to(norm.weight)
    twice = copy.deepcopy(norm)
    for weight in twice.parameters():
        weight.mul_(2)
    return torch.equal(twice(x), 2 * norm(x))
