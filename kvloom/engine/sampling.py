"""Chooses tokens for all rows of a step at once. What is drawn depends on a request's seed and place alone."""

from __future__ import annotations

import random
from collections import Counter

import torch
from torch import Tensor

from kvloom.engine.request import Guide, Sampling

__all__ = ["Sampler", "choose"]


class Sampler:
    """What one answer needs to remember."""

    def __init__(self, sampling: Sampling, prompt: list[int]) -> None:
        self.sampling = sampling
        self.draw = random.Random(sampling.seed)
        self.counts: Counter[int] = Counter()
        self.seen = set(prompt) if sampling.repetition != 1.0 else set()
        self.guide: Guide | None = sampling.guide() if sampling.guide else None
        self.done = False  # what the guide asked for is complete

    @property
    def plain(self) -> bool:
        """Whether logits are taken as they come."""
        s = self.sampling
        return not (s.presence or s.frequency or s.repetition != 1.0 or s.bias or self.guide or s.min_tokens)

    def shape(self, logits: Tensor) -> None:
        """Applies penalties, biases and the guide to logits [vocabulary], in place."""
        s = self.sampling
        if s.repetition != 1.0 and self.seen:
            at = torch.tensor(sorted(self.seen))
            x = logits[at]
            logits[at] = torch.where(x > 0, x / s.repetition, x * s.repetition)
        if (s.presence or s.frequency) and self.counts:
            at = torch.tensor(list(self.counts))
            logits[at] -= s.presence + s.frequency * torch.tensor(list(self.counts.values()), dtype=logits.dtype)
        for token, bias in s.bias.items():
            logits[token] += bias
        if s.stop and self.counts.total() < s.min_tokens:
            logits[list(s.stop)] = -torch.inf
        if self.guide is not None:
            self.guide.mask(logits)

    def took(self, token: int) -> None:
        """Notes the token that came."""
        self.counts[token] += 1
        if self.sampling.repetition != 1.0:
            self.seen.add(token)
        if self.guide is not None and token not in self.sampling.stop:
            self.done = self.guide.accept(token)


@torch.inference_mode()
def choose(
    logits: Tensor, samplers: list[Sampler]
) -> tuple[list[int], list[tuple[float, tuple[tuple[int, float], ...]] | None]]:
    """One token for each row of logits [R, vocabulary], and its log-probability and the best ones' where they are asked for."""
    told = _told(logits, samplers)
    for row, sampler in zip(logits, samplers, strict=True):
        if not sampler.plain:
            sampler.shape(row)
    tokens = logits.argmax(-1)
    drawn = [i for i, sampler in enumerate(samplers) if sampler.sampling.temperature > 0]
    if drawn:
        tokens[drawn] = _drawn(logits[drawn], [samplers[i] for i in drawn])
    found = tokens.tolist()
    for token, sampler in zip(found, samplers, strict=True):
        sampler.took(token)
    lines = [None if x is None else (float(x[0][token]), x[1]) for token, x in zip(found, told, strict=True)]
    return found, lines


def _told(logits: Tensor, samplers: list[Sampler]) -> list[tuple[Tensor, tuple[tuple[int, float], ...]] | None]:
    found: list[tuple[Tensor, tuple[tuple[int, float], ...]] | None] = []
    for row, sampler in zip(logits, samplers, strict=True):
        most = sampler.sampling.logprobs
        if most is None:
            found.append(None)
            continue
        logs = row.log_softmax(-1)
        best = logs.topk(min(most, len(logs))) if most else None
        top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        found.append((logs, top))
    return found


def _drawn(logits: Tensor, samplers: list[Sampler]) -> Tensor:
    """Tokens [R], each at one number that its sampler drew: the smallest whose share of the best ones reaches it."""
    settings = [sampler.sampling for sampler in samplers]
    heat = torch.tensor([s.temperature for s in settings])[:, None]
    p, order = (logits / heat).softmax(-1).sort(stable=True, dim=-1, descending=True)
    below = p.cumsum(-1) - p  # the share of those that are better
    keep = below < torch.tensor([s.top_p for s in settings])[:, None]
    ranks = torch.arange(p.shape[1])
    keep &= ranks < torch.tensor([s.top_k or p.shape[1] for s in settings])[:, None]
    keep &= p >= torch.tensor([s.min_p for s in settings])[:, None] * p[:, :1]
    keep[:, 0] = True
    shares = (p * keep).double().cumsum(-1)
    at = torch.tensor([[sampler.draw.random()] for sampler in samplers], dtype=torch.double) * shares[:, -1:]
    found = torch.searchsorted(shares, at, right=True).clamp_max(p.shape[1] - 1)
    return order.gather(1, found)[:, 0]
