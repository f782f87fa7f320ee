"""How an attention layer makes keys and values of its input, as data: its own weights, looked at, never copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvloom.core.site import Site
from kvloom.errors import ModelError

__all__ = ["Projection", "attentions", "projection_of"]

BOTH = ("qkv_proj", "query_key_value")  # one matrix for queries, keys and values: in blocks, or by KV head
_found: WeakKeyDictionary[nn.Module, dict[int, nn.Module]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Projection:
    """key [H, D, hidden], value [H, Dv, hidden]: views of a layer's weights; biases [H, D] or None; `norm`: of keys, or None."""

    key: Tensor
    value: Tensor
    key_bias: Tensor | None
    value_bias: Tensor | None
    norm: Any = None

    def keys(self, x: Tensor) -> Tensor:
        """Inputs [n, hidden] -> keys before RoPE [H, n, D]."""
        k = _apply(x, self.key, self.key_bias)
        if self.norm is None:
            return k
        if self.norm.weight.numel() == k.shape[2]:
            normed: Tensor = self.norm(k)
            return normed
        wide: Tensor = self.norm(k.transpose(0, 1).flatten(1))  # over all heads together
        heads: Tensor = wide.unflatten(1, (k.shape[0], k.shape[2])).transpose(0, 1)
        return heads

    def values(self, x: Tensor) -> Tensor:
        """Inputs [n, hidden] -> values [H, n, Dv]."""
        return _apply(x, self.value, self.value_bias)

    def mixed(self, x: Tensor, total: Tensor) -> Tensor:
        """Weighted sums of inputs [H, R, hidden] and the sums of their weights [H, R, 1] -> those of values [H, R, Dv], fp32."""
        out = x @ self.value.float().mT
        return out if self.value_bias is None else out.add_(total * self.value_bias.float()[:, None])


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.matmul(x, weight.to(x.dtype).mT)
    return out if bias is None else out + bias.to(x.dtype)[:, None]


def attentions(model: nn.Module) -> dict[int, nn.Module]:
    """The attention modules of a decoder that project keys and values, by layer."""
    if model not in _found:
        names = ("k_proj", *BOTH)
        modules = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        _found[model] = {m.layer_idx: m for m in modules if any(hasattr(m, name) for name in names)}  # type: ignore[misc]
    return _found[model]


def projection_of(model: nn.Module, site: Site) -> Projection:
    """The projection of one layer. Raises ModelError where its weights are not plain matrices of a known layout."""
    module: Any = attentions(model).get(site.layer)
    h, widths = site.kv_heads, (site.key_dim, site.value_dim)
    norm = next((getattr(module, n) for n in ("k_norm", "k_layernorm") if getattr(module, n, None) is not None), None)
    if isinstance(getattr(module, "k_proj", None), nn.Linear) and isinstance(
        getattr(module, "v_proj", None), nn.Linear
    ):
        parts = [(each.weight, each.bias) for each in (module.k_proj, module.v_proj)]
        if [len(weight) for weight, _ in parts] == [h * d for d in widths]:
            (k, kb), (v, vb) = (
                (w.detach().unflatten(0, (h, d)), None if b is None else b.detach().view(h, d))
                for (w, b), d in zip(parts, widths, strict=True)
            )
            return Projection(k, v, kb, vb, norm)
    for name in BOTH:
        linear = getattr(module, name, None)
        if isinstance(linear, nn.Linear) and len(linear.weight) == (site.q_heads + 2 * h) * site.key_dim:
            k, v = _parted(linear.weight.detach(), name == "qkv_proj", h, site.key_dim)
            bias: Tensor | None = linear.bias
            if bias is None:
                return Projection(k, v, None, None, norm)
            return Projection(k, v, *_parted(bias.detach(), name == "qkv_proj", h, site.key_dim), norm)
    raise ModelError(
        f"layer {site.layer}: how {type(module).__name__} makes keys of its input is not known here, or its weights are not "
        "plain matrices. Use a recipe that stores keys, such as kivi."
    )


def _parted(x: Tensor, blocks: bool, h: int, dim: int) -> tuple[Tensor, Tensor]:
    """Rows of a joint matrix that make keys and values, [h, D, ...] each."""
    if blocks:
        k, v = x[-2 * h * dim :].unflatten(0, (2, h, dim))
        return k, v
    grouped = x.unflatten(0, (h, -1, dim))
    return grouped[:, -2], grouped[:, -1]
