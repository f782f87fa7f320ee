"""What a model's layers cache on a text, for calibration: keys before RoPE and values, and how much each matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvloom.core.site import Site
from kvloom.core.tap import tap_of
from kvloom.core.view import sites_of, text_config
from kvloom.errors import ProfileError

__all__ = ["Sample", "managed", "rows", "samples"]


@dataclass(frozen=True)
class Sample:
    """One layer on one stretch of text. keys, values [H, n, D] fp32 and, if asked for, the squared gradients of the summed
    next-token loss by each of them (Fisher information), of the same shapes. Keys are from before RoPE if asked for.
    """

    layer: int
    keys: Tensor
    values: Tensor
    key_weight: Tensor | None = None
    value_weight: Tensor | None = None


class _Tape(DynamicCache):
    """Remembers what layers hand to the cache."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx not in self.seen:
            self.seen[layer_idx] = (key_states, value_states)
            for x in (key_states, value_states):
                if x.requires_grad:
                    x.retain_grad()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def managed(model: PreTrainedModel) -> dict[int, Site]:
    """The layers of a model that recipes manage."""
    layers = DynamicCache(config=text_config(model)).layers
    return {i: site for i, site in sites_of(model).items() if type(layers[i]) is DynamicLayer}


def rows(model: PreTrainedModel, ids: Tensor, count: int, length: int) -> list[Tensor]:
    """Stretches of a text ids [T] for calibration: at most `count`, [1, length] each, spread over the text.

    Shorter ones if the model has fewer positions or the text is short. Raises ProfileError for fewer than 64 tokens.
    """
    length = min(length, getattr(text_config(model), "max_position_embeddings", None) or length, len(ids))
    if length < 64:
        raise ProfileError(f"the text has {len(ids)} tokens, too few to calibrate on. Give a longer one with --text.")
    count = min(count, len(ids) // length)
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return [ids[None, at : at + length] for at in starts]


def samples(
    model: PreTrainedModel, texts: list[Tensor], weights: bool, pre_rope: bool, tell: Callable[[str], None]
) -> Iterator[Sample]:
    """Runs the model over each text [1, T] and yields every managed layer of each."""
    sites = managed(model)
    taps = {i: tap_of(site) if pre_rope else None for i, site in sites.items()}
    config = text_config(model)
    with _still(model, weights):
        for at, ids in enumerate(texts):
            tell(f"text {at + 1} of {len(texts)}" + (", with gradients" if weights else ""))
            tape = _Tape(config)
            with torch.set_grad_enabled(weights):
                out = model(ids.to(model.device), past_key_values=tape, use_cache=True, logits_to_keep=int(not weights))
                if weights:
                    logits, want = out.logits[0, :-1].float(), ids[0, 1:].to(model.device)
                    torch.nn.functional.cross_entropy(logits, want, reduction="sum").backward()
            place = torch.arange(ids.shape[1], device=model.device)
            for i, tap in taps.items():
                found: list[Tensor | None] = []
                for x, turned in zip(tape.seen[i], (tap, None), strict=True):
                    for y in (x.detach()[0], None if x.grad is None else x.grad[0]):
                        # a rotation's gradient turns back like a key; lengths stay but for a factor of the layer
                        held = y if y is None or turned is None else turned.off(y, place[None])
                        found.append(None if held is None else held.float())
                keys, key_weight, values, value_weight = found
                assert keys is not None and values is not None
                yield Sample(i, keys, values, *(None if w is None else w.square() for w in (key_weight, value_weight)))


@contextmanager
def _still(model: PreTrainedModel, weights: bool) -> Iterator[None]:
    """Evaluation mode, and gradients only through the embeddings; all flags come back after."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    first, training = model.get_input_embeddings().weight, model.training
    grad, first.grad = first.grad, None
    model.eval()
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        first.requires_grad_(weights)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        first.grad = grad
        model.train(training)
