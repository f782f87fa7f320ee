"""Another attention for a while, with gradients: how gates of heads and of tokens are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvloom.core.view import text_config
from kvloom.errors import ModelError

__all__ = ["Attention", "attending", "causal", "frozen"]

NAME = "kvloom-override"
# (layer, q [B, Hq, m, D], k [B, H, m, D], v [B, H, m, Dv], scale) -> [B, Hq, m, Dv]; rows of one whole text
Attention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
_by: ContextVar[Attention | None] = ContextVar("attention", default=None)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float, shown: Tensor | None = None) -> Tensor:
    """Ordinary attention, or with what `shown` (bool or added to the logits, broadcastable to [B, Hq, m, m]) leaves."""
    out: Tensor = F.scaled_dot_product_attention(
        q, k, v, attn_mask=shown, is_causal=shown is None, scale=scale, enable_gqa=True
    )
    return out


@contextmanager
def attending(model: PreTrainedModel, by: Attention) -> Iterator[None]:
    """The model's layers that see the whole text attend by `by`; others as ever. Whole texts only, without a cache or padding.

    Raises ModelError for models that call another attention, or that do more to logits than scale them.
    """
    config = text_config(model)
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(
            f"model {type(model).__name__} calls its own attention, which cannot be changed to train gates."
        )
    before, token = config._attn_implementation, _by.set(by)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _by.reset(token)


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and no gradient for any weight; flags come back after."""
    flags, training = [(p, p.requires_grad) for p in model.parameters()], model.training
    model.eval()
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        model.train(training)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    by = _by.get()
    assert by is not None
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise ModelError("gates cannot be trained for models that soft-cap logits or have learned sinks.")
    scale, window = query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("sliding_window")
    if window:
        at = torch.arange(query.shape[2], device=query.device)
        back = at[:, None] - at
        return causal(query, key, value, scale, (back >= 0) & (back < window)).transpose(1, 2), None
    return by(int(module.layer_idx), query, key, value, scale).transpose(1, 2), None  # type: ignore[arg-type]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda **arguments: None)
