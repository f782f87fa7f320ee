"""How far a recipe's predictions and attention move from the full cache's, on the full cache's own continuation."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom import KVCache
from kvloom.core.attention import Logits
from kvloom.core.update import watched
from kvloom.lab.clock import Clock

__all__ = ["Reference", "compare", "read"]


@dataclass
class Reference:
    """What one cache made of a continuation of n tokens.

    logp [n + 1, V] fp32: after the prompt and after each token; outputs and queries per layer [Hq, n, D]; `cache` as it was
    right after the prompt.
    """

    tokens: list[int]
    logp: Tensor
    outputs: dict[int, Tensor]
    queries: dict[int, Tensor]
    logits: dict[int, Logits]
    cache: KVCache


@torch.no_grad()
def read(
    model: PreTrainedModel, cache: KVCache, logits: Tensor, limit: int, reference: Reference | None, times: list[float]
) -> Reference:
    """Decodes `limit` tokens into a copy of the cache, token by token: the reference's, or without one its own likeliest
    (an end of text does not end it). logits [V]: those after the prompt. Seconds of each step are added to `times`.
    """
    twin, rows, tokens = copy.deepcopy(cache), [logits], []
    outputs: dict[int, list[Tensor]] = {}
    queries: dict[int, list[Tensor]] = {}
    forms: dict[int, Logits] = {}

    def note(layer: int, query: Tensor, output: Tensor, form: Logits, *_: object) -> None:
        outputs.setdefault(layer, []).append(output[0, -1].float())
        queries.setdefault(layer, []).append(query[0, :, -1].float())
        forms[layer] = form

    for at in range(limit):
        token = int(rows[-1].argmax(-1)) if reference is None else reference.tokens[at]
        tokens.append(token)
        clock = Clock()
        with watched(note):
            out = model(torch.tensor([[token]], device=model.device), past_key_values=twin)
        times.append(clock.seconds())
        rows.append(out.logits[0, -1])
    return Reference(
        tokens,
        torch.stack(rows).float().log_softmax(-1).cpu(),
        {layer: torch.stack(x, 1) for layer, x in outputs.items()},
        {layer: torch.stack(x, 1) for layer, x in queries.items()},
        forms,
        cache,
    )


def compare(full: Reference, own: Reference) -> dict[str, Any]:
    """Figures for JSON.

    kl: nats per token, full to own. top1, top5: share of places where the likeliest token agrees, and where the full
    cache's likeliest is among the own five. diverges: first place where greedy decoding would take another token, or None.
    error [layers][query heads]: ||own - full|| / ||full|| of attention outputs over the continuation; inputs of a layer carry
    the error of those below. mass [layers][KV heads]: share of the full cache's attention to the prompt that falls on
    slots which this cache kept; tokens that were merged into another count as lost.
    """
    base, mine = full.logp, own.logp
    best = base.argmax(-1)
    same = mine.argmax(-1) == best
    five = (mine.topk(min(5, mine.shape[-1]), -1).indices == best[:, None]).any(-1)
    error, mass = {}, {}
    for layer, output in full.outputs.items():
        gap = (own.outputs[layer] - output).flatten(1) if layer in own.outputs else output.new_zeros(0)
        if gap.numel():
            size = torch.linalg.vector_norm(output, dim=(1, 2)).clamp_min(1e-12)
            error[layer] = (torch.linalg.vector_norm(gap, dim=1) / size).tolist()
        mass[layer] = _mass(full, own.cache, layer)
    return {
        "kl": max(0.0, float((base.exp() * (base - mine)).sum(-1).mean())),
        "top1": float(same.float().mean()),
        "top5": float(five.float().mean()),
        "diverges": None if bool(same.all()) else int((~same).nonzero()[0]),
        "layers": sorted(full.outputs),
        "error": [[round(x, 6) for x in error[layer]] for layer in sorted(error)],
        "mass": [[round(x, 6) for x in mass[layer]] for layer in sorted(mass)],
    }


def _mass(full: Reference, cache: KVCache, layer: int) -> list[float]:
    """Per KV head of a layer: the share of the full cache's attention on what `cache` kept."""
    held = next(x for x in full.cache.managed() if x.site.layer == layer).rows[0].layer
    keys = torch.cat([segment.key.dense(0, segment.n) for group in held.groups for segment in group], 1)
    heads, n = keys.shape[:2]
    kept = kept_slots(cache, layer, heads, n).to(keys.device)
    if bool(kept.all()):
        return [1.0] * heads
    form = full.logits[layer]
    q = full.queries[layer].view(heads, -1, keys.shape[-1])
    s = form.cap(q @ keys.float().transpose(1, 2) * form.scale)
    share = s.softmax(-1).masked_fill(~kept[:, None], 0).sum(-1)
    return [float(x) for x in share.mean(-1)]


def kept_slots(cache: KVCache, layer: int, heads: int, n: int) -> Tensor:
    """Which of the first n tokens each KV head of a layer still holds on their own, bool [H, n]."""
    kept = torch.zeros(heads, n, dtype=torch.bool)
    found = next(x for x in cache.managed() if x.site.layer == layer).rows[0].layer
    for group in found.groups:
        at = torch.arange(heads) if group.heads is None else group.heads.cpu()
        for segment in group:
            if not segment.kind.fold:
                index = segment.index.long().cpu().expand(len(at), -1)
                kept[at[:, None], index.clamp_max(n - 1)] = True
    return kept
