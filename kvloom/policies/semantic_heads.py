"""Which heads find what the text asks for, and which layers miss most when slots leave (CompressKV, arXiv 2508.02401)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.sample import rows
from kvloom.core.step import Step
from kvloom.core.view import text_config
from kvloom.policies.looking import look

__all__ = ["measure"]

NEEDLE, CUE = 32, 8  # tokens of a needle, and those of them that are given
LENGTHS, DEPTHS = (256, 512, 1024, 2048), (0.1, 0.3, 0.5, 0.7, 0.9)
SMALL, WINDOW, LATE = 32, 8, 32  # slots of the small cache, its window, and the rows that read from it
FINDERS, KERNEL = 4, 5


def measure(model: PreTrainedModel, ids: Tensor, tell: Callable[[str], None]) -> dict[str, Tensor]:
    """{"heads": [layers, Hq], "layers": [layers]} fp32, of a text ids [T].

    A head's score is the attention it gives to a whole needle while the model repeats that needle rightly. A needle is
    random tokens of the text at some depth of it, and its first tokens come again at the end. A layer's score is how far attention over
    a small cache, chosen by its best heads, is off from attention over all; they sum to one.
    """
    config = text_config(model)
    shape = (config.num_hidden_layers, config.num_attention_heads)
    scores, counted = [torch.zeros(shape) for _ in range(2)], 0
    draw = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        if length > LENGTHS[0] and len(ids) < length:
            break
        (hay,) = rows(model, ids, 1, length)
        tell(f"needles in {hay.shape[1]} tokens")
        for depth in DEPTHS:
            needle = ids[torch.randint(len(ids), (NEEDLE,), generator=draw)]
            room = hay.shape[1] - 2 * NEEDLE
            if room < 1:
                continue
            at = int(depth * room)
            text = torch.cat([hay[0, :at], needle, hay[0, at:room], needle])[None]
            found, logits = look(model, text, partial(_on_span, at=at), logits=True)
            assert logits is not None
            right = logits[-NEEDLE + CUE - 1 : -1].argmax(-1).cpu() == needle[CUE:]
            for kind, hits in enumerate((right, torch.ones_like(right))):
                if kind == 0 and float(right.float().mean()) <= 0.5:
                    continue
                counted += kind == 0
                for layer, mass in found.items():
                    scores[kind][layer] += mass[:, hits].sum(-1)
    heads = scores[0] if counted else scores[1]  # a model that repeats nothing still has heads that look there
    tell("layers")
    (text,) = rows(model, ids, 1, 1024)
    off, _ = look(model, text, lambda step: _off(step, heads[step.site.layer]))
    layers = torch.zeros(shape[0])
    for layer, error in off.items():
        layers[layer] = error
    return {"heads": heads / max(1, counted), "layers": layers / layers.sum().clamp_min(1e-9)}


def _dense(step: Step) -> tuple[Tensor, Tensor]:
    segment = step.group.segments["main"]
    return segment.key.dense(0, segment.n).float(), segment.value.dense(0, segment.n).float()


def _on_span(step: Step, at: int) -> Tensor:
    """Attention of the rows that bring the needle's rest on the whole needle: [Hq, rows]."""
    keys, _ = _dense(step)
    late = slice(-NEEDLE + CUE - 1, -1)
    s = step.logits.cap(step.q[:, :, late].float() @ keys[:, None, at : at + NEEDLE].mT * step.logits.scale)
    return (s - step.lse[:, :, late, None]).exp().sum(-1).flatten(0, 1).cpu()


def _off(step: Step, ranks: Tensor) -> Tensor:
    """How far attention of the last rows over a small cache is off, relative to all of it, summed over the rows."""
    keys, values = _dense(step)
    n = keys.shape[1]
    end = n - min(LATE, n // 4)
    s = step.logits.cap(step.q[:, :, end - WINDOW :].float() @ keys[:, None].mT * step.logits.scale)
    place = torch.arange(end - WINDOW, n, device=s.device)
    s = s.masked_fill(torch.arange(n, device=s.device) > place[:, None], -torch.inf)
    seen = s[:, :, :WINDOW, :end].softmax(-1)[..., : end - WINDOW].sum(2)
    pooled = F.avg_pool1d(seen.flatten(0, 1)[:, None], KERNEL, 1, KERNEL // 2)[:, 0]
    best = pooled[ranks.topk(min(FINDERS, len(ranks))).indices].mean(0).topk(min(SMALL - WINDOW, end - WINDOW)).indices
    kept = torch.zeros(n, dtype=torch.bool, device=s.device)
    kept[best] = kept[end - WINDOW :] = True
    late = s[:, :, WINDOW:]
    full, small = (x.softmax(-1) @ values[:, None] for x in (late, late.masked_fill(~kept, -torch.inf)))
    full, small = (x.transpose(0, 2).flatten(1) for x in (full, small))
    off: Tensor = ((small - full).norm(dim=-1) / (full.norm(dim=-1) + 1e-5)).sum().cpu()
    return off
