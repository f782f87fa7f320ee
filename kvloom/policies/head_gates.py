"""Which KV heads need the whole text, learned: a gate for each between full and streaming attention (DuoAttention)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.override import Attention, attending, causal, frozen
from kvloom.core.sample import rows
from kvloom.core.view import kv_heads_of, text_config

__all__ = ["gated", "passkeys", "streaming", "train"]

KEY, CUE = 32, 4  # tokens of a passkey, and those of them that are given when it comes again


def streaming(length: int, sinks: int, recent: int) -> Tensor:
    """bool [length, length]: what rows see that keep the first `sinks` and the newest `recent` tokens, themselves included."""
    at = torch.arange(length)
    back = at[:, None] - at
    return (back >= 0) & ((back < recent) | (at < sinks))


def gated(gates: Tensor, shown: Tensor) -> Attention:
    """Each KV head's attention over all, times its gate [layers, H], and over what is `shown`, times the rest."""

    def by(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        alpha = gates[layer].repeat_interleave(q.shape[1] // k.shape[1])[:, None, None].to(q.dtype)
        return alpha * causal(q, k, v, scale) + (1 - alpha) * causal(q, k, v, scale, shown)

    return by


def passkeys(text: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A text [T] with random passkeys hidden in it, all of them again at its end -> ids [T], the rows that answer.

    A row answers if the token after it belongs to a passkey that is repeated, but for the first of it, which are given.
    """
    keys = text[torch.randint(len(text), (count, KEY), generator=draw)]
    room = len(text) - 2 * count * KEY
    depths = (torch.linspace(0.05, 0.95, count) * room).long().tolist()
    parts, last = [], 0
    for key, at in zip(keys, depths, strict=True):
        parts += [text[last:at], key]
        last = at
    again = torch.randperm(count, generator=draw)
    ids = torch.cat([*parts, text[last:room], keys[again].flatten()])
    start = len(ids) - count * KEY
    inside = torch.arange(KEY) >= CUE
    return ids, start - 1 + inside.repeat(count).nonzero()[:, 0]


def train(
    model: PreTrainedModel,
    ids: Tensor,
    tell: Callable[[str], None],
    steps: int = 200,
    length: int = 1024,
    sinks: int = 32,
    recent: int = 128,
    rate: float = 0.02,
    weight: float = 0.05,
    lengths: Sequence[float] = (0.5, 0.75, 1.0),
) -> Tensor:
    """Gates [layers, H] from 0 to 1, of a text ids [T].

    The model stays as it is. The loss is the squared difference of its last hidden states with gated and with full attention,
    in rows that answer, and `weight` times the mean gate.
    """
    config, draw = text_config(model), torch.Generator().manual_seed(0)
    gates = torch.ones(config.num_hidden_layers, kv_heads_of(config), device=model.device, requires_grad=True)
    optimizer = torch.optim.AdamW([gates], lr=rate, weight_decay=0.0)
    texts = rows(model, ids, steps, length)
    with frozen(model):
        for step in range(steps):
            part = min(1.0, (step + 1) / max(1, steps // 5), 0.1 + 0.9 * (steps - step) / max(1, steps // 5))
            optimizer.param_groups[0]["lr"] = rate * part
            text = texts[step % len(texts)][0]
            text = text[: int(len(text) * lengths[int(torch.randint(len(lengths), (), generator=draw))])]
            short, answers = passkeys(text, max(1, min(10, len(text) // (5 * KEY))), draw)
            row, shown = short[None].to(model.device), streaming(len(short), sinks, recent).to(model.device)
            with torch.no_grad(), attending(model, lambda layer, q, k, v, scale: causal(q, k, v, scale)):
                want = model.base_model(row, use_cache=False).last_hidden_state[0, answers]
            with torch.enable_grad(), attending(model, gated(gates, shown)):
                got = model.base_model(row, use_cache=False).last_hidden_state[0, answers]
                off = (got.float() - want.float()).square().mean(-1).mean()
                optimizer.zero_grad()
                (off + weight * gates.mean()).backward()
            optimizer.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            if step % 20 == 0 or step == steps - 1:
                tell(f"step {step + 1} of {steps}: off {off.item():.4f}, mean gate {gates.mean().item():.2f}")
    return gates.detach().cpu()
