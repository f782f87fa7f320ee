"""Plain re-implementations of the methods, one KV head at a time with dense masks, written from the papers.

They share nothing with kvloom but the model's weights: `run` is a decoder of the Llama family in a few lines whose
attention is one of the classes below. What a cache of kvloom holds is read out by `held`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom import KVCache


@dataclass
class Slots:
    """What one KV head of one layer holds, in text order: keys, values [n, D], text index and score [n]."""

    k: Tensor
    v: Tensor
    index: Tensor
    score: Tensor

    def keep(self, which: Tensor) -> None:
        self.k, self.v, self.index, self.score = (x[which] for x in (self.k, self.v, self.index, self.score))


def rope(model: Any, x: Tensor, position: Tensor) -> Tensor:
    """Rotates x [..., n, D] to the positions [n], channels i and i + D/2 together."""
    angle = position[:, None].float() * torch.cat([model.model.rotary_emb.inv_freq] * 2)
    a, b = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()


class Full:
    """Ordinary attention; the base of the others. `after` is called once the output of a forward is computed."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.slots: dict[tuple[int, int], Slots] = {}
        self.prompt = 0  # tokens that came in the first forward or in one of several tokens

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """q [Hq, m, D], k, v [H, m, D] before RoPE -> [Hq, m, D]."""
        g, m = len(q) // len(k), q.shape[1]
        place = torch.arange(start, start + m)
        self.prompt += m if layer == 0 and (start == 0 or m > 1) else 0
        outs = []
        for h in range(len(k)):
            new = Slots(self.store(k[h], place), v[h], place, torch.zeros(m))
            s = self.slots.get((layer, h))
            if s is not None:
                new = Slots(*(torch.cat(x) for x in zip(vars(s).values(), vars(new).values(), strict=True)))
            s = self.slots[layer, h] = new
            logits = self.logits(layer, h, q[h * g : (h + 1) * g], s, place) * q.shape[-1] ** -0.5
            p = (logits + self.bias(layer, h, s)).masked_fill(s.index > place[:, None], -torch.inf).softmax(-1)
            outs.append(p @ self.values(layer, h, s))
            self.after(layer, h, s, rope(self.model, q[h * g : (h + 1) * g], place), p)
        return torch.cat(outs)

    def store(self, k: Tensor, place: Tensor) -> Tensor:
        return rope(self.model, k, place)

    def logits(self, layer: int, head: int, q: Tensor, s: Slots, place: Tensor) -> Tensor:
        return rope(self.model, q, place) @ s.k.T

    def bias(self, layer: int, head: int, s: Slots) -> Tensor:
        return torch.zeros(len(s.k))

    def values(self, layer: int, head: int, s: Slots) -> Tensor:
        return s.v

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        """q [g, m, D] after RoPE, p [g, m, n] the attention of this forward."""


@torch.no_grad()
def run(method: Full, ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """Logits [sum(sizes), vocabulary] of ids [1, T], read in forwards of these sizes."""
    model, start, out = method.model, 0, []
    dim = method.config.head_dim
    for size in sizes:
        x = model.model.embed_tokens(ids[0, start : start + size])
        for i, layer in enumerate(model.model.layers):
            at, y = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (p(y).unflatten(-1, (-1, dim)).transpose(0, 1) for p in (at.q_proj, at.k_proj, at.v_proj))
            x = x + at.o_proj(method.attend(i, q, k, v, start).transpose(0, 1).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        out.append(model.lm_head(model.model.norm(x)))
        start += size
    return torch.cat(out)


@torch.no_grad()
def run_cache(
    model: PreTrainedModel, cache: Any, ids: Tensor, sizes: Sequence[int], watch: Callable[[int], None] | None = None
) -> Tensor:
    """The same through the model with a cache; `watch` is told the tokens read so far, after every forward."""
    out, start = [], cache.get_seq_length()
    for size in sizes:
        out.append(model(ids[:, start : start + size], past_key_values=cache).logits[0])
        start += size
        if watch is not None:
            watch(start)
    return torch.cat(out)


def layers_of(cache: KVCache, row: int = 0) -> list[Any]:
    return [layer.rows[row].layer for layer in cache.managed()]


def held(cache: KVCache, row: int = 0) -> list[list[dict[str, list[int]]]]:
    """Text indices by layer, KV head and class, in ascending order."""
    found = []
    for layer in layers_of(cache, row):
        heads: list[dict[str, list[int]]] = [defaultdict(list) for _ in range(layer.site.kv_heads)]
        for group in layer.groups:
            numbers = range(layer.site.kv_heads) if group.heads is None else group.heads.tolist()
            for name, segment in group.segments.items():
                if segment.n:
                    index = segment.index.expand(len(numbers), -1)
                    for at, head in enumerate(numbers):
                        heads[head][name] = sorted(index[at].tolist())
        found.append(heads)
    return found


def kept(cache: KVCache, classes: Sequence[str] | None = None) -> list[list[list[int]]]:
    """Text indices by layer and KV head, of some classes together."""
    return [
        [
            sorted(i for name, index in head.items() if classes is None or name in classes for i in index)
            for head in layer
        ]
        for layer in held(cache)
    ]


class Streaming(Full):
    """StreamingLLM: keys before RoPE, rotated at every forward by their slot; the query by its own slot."""

    def __init__(self, model: Any, sinks: int, window: int) -> None:
        super().__init__(model)
        self.sinks, self.window = sinks, window

    def store(self, k: Tensor, place: Tensor) -> Tensor:
        return k

    def logits(self, layer: int, head: int, q: Tensor, s: Slots, place: Tensor) -> Tensor:
        n, m = len(s.k), len(place)
        slot = torch.arange(n)
        return rope(self.model, q, slot[n - m :]) @ rope(self.model, s.k, slot).T

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        n = len(s.k)
        if n > self.sinks + self.window:
            s.keep(torch.tensor([i for i in range(n) if i < self.sinks or i >= n - self.window]))


class H2O(Full):
    """Accumulated attention, summed over the query heads of a KV head; `heavy` best of the older ones and `recent`."""

    def __init__(self, model: Any, heavy: int, recent: int) -> None:
        super().__init__(model)
        self.heavy, self.recent = heavy, recent

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        s.score = s.score + p.sum((0, 1))
        n = len(s.k)
        if n > self.heavy + self.recent:
            best = s.score[: n - self.recent].topk(self.heavy).indices.sort().values
            s.keep(torch.cat([best, torch.arange(n - self.recent, n)]))


class Snap(Full):
    """SnapKV at the end of the prompt; scores averaged over the query heads of a KV head. Decode never drops."""

    def __init__(self, model: Any, capacity: int, window: int, kernel: int, pool: str) -> None:
        super().__init__(model)
        self.capacity, self.window, self.kernel, self.pool = capacity, window, kernel, pool

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        n, w, half = len(s.k), self.window, self.kernel // 2
        if p.shape[1] == 1 or n <= self.capacity:
            return
        score = p[:, -w:, : n - w].sum(1)
        padded = torch.nn.functional.pad(score, (half, half))  # zeros count in the average, and never win a maximum
        neighbours = padded.unfold(-1, self.kernel, 1)
        pooled = (neighbours.amax(-1) if self.pool == "max" else neighbours.sum(-1) / self.kernel).mean(0)
        s.keep(torch.cat([self.choose(layer, head, s, pooled), torch.arange(n - w, n)]))

    def choose(self, layer: int, head: int, s: Slots, pooled: Tensor) -> Tensor:
        """The slots before the window that stay, ascending."""
        return pooled.topk(self.capacity - self.window).indices.sort().values


class Razor(Full):
    """RazorAttention: local heads attend sinks, newest tokens and log(Nd) + q.mean(k) for the mean of what was dropped.

    Nothing is thrown away here: `away` says which tokens the mean is taken over. `every`: tokens folded at a time.
    """

    def __init__(self, model: Any, retrieval: Tensor, sinks: int, window: int, share: int, every: int) -> None:
        super().__init__(model)
        self.retrieval, self.sinks, self.window, self.share, self.every = retrieval, sinks, window, share, every
        self.away: dict[tuple[int, int], Tensor] = {}
        self.compensate = True

    def gone(self, layer: int, head: int, n: int) -> Tensor:
        away = self.away.get((layer, head), torch.zeros(0, dtype=torch.bool))
        return torch.nn.functional.pad(away, (0, n - len(away)))

    def logits(self, layer: int, head: int, q: Tensor, s: Slots, place: Tensor) -> Tensor:
        logits = super().logits(layer, head, q, s, place)
        gone = self.gone(layer, head, len(s.k))
        if gone.any():  # every dropped token scores as the mean key does: Nd * exp(q.khat) in all
            logits[..., gone] = rope(self.model, q, place) @ s.k[gone].mean(0)[:, None]
        return logits

    def bias(self, layer: int, head: int, s: Slots) -> Tensor:
        gone = self.gone(layer, head, len(s.k))
        return torch.zeros(len(gone)).masked_fill(gone & (not self.compensate), -torch.inf)

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        if self.retrieval[layer, head]:
            return
        n = len(s.k)
        local = max(self.window, self.prompt // self.share)
        free = n - int(self.gone(layer, head, n).sum())
        if free - self.sinks - local >= (1 if p.shape[1] > 1 else self.every):
            index = torch.arange(n)
            self.away[layer, head] = (index >= self.sinks) & (index < n - local)


def quantize(x: Tensor, bits: int) -> Tensor:
    """x [..., G] as asymmetric min-max codes of one group and back; scale and minimum in fp16."""
    low = x.amin(-1, keepdim=True).half().float()
    scale = ((x.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float()
    codes = torch.where(scale > 0, (x - low) / scale, torch.zeros(())).round().clamp(0, 2**bits - 1)
    return codes * scale + low


def per_token(x: Tensor, bits: int, group: int | None) -> Tensor:
    """Groups of channels inside each token of x [n, D]."""
    return quantize(x.unflatten(-1, (-1, group or x.shape[-1])), bits).flatten(-2)


def per_channel(x: Tensor, bits: int, group: int) -> Tensor:
    """Groups of tokens inside each channel of x [n, D]."""
    return per_token(x.T.contiguous(), bits, group).T


class Kivi(Full):
    """KIVI: after a forward, keys beyond a multiple of R are still exact, and the newest R values."""

    def __init__(self, model: Any, bits: int, group: int, residual: int) -> None:
        super().__init__(model)
        self.bits, self.group, self.residual = bits, group, residual
        self.done: dict[tuple[int, int], tuple[int, int]] = {}

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        n, r = len(s.k), self.residual
        a, b = self.done.get((layer, head), (0, 0))
        keys, values = n // r * r, max(0, n - r)
        s.k[a:keys] = per_channel(s.k[a:keys], self.bits, self.group)
        s.v[b:values] = per_token(s.v[b:values], self.bits, self.group)
        self.done[layer, head] = keys, values


class Mikv(Full):
    """MiKV: H2O decides what is important; the rest is kept in few bits, keys balanced by b. Demotion is final."""

    def __init__(
        self, model: Any, budget: float, bits: int, group: int | None, window: float = 0.5, interval: int = 1
    ) -> None:
        super().__init__(model)
        self.budget, self.bits, self.group, self.window, self.interval = budget, bits, group, window, interval
        self.low: dict[tuple[int, int], set[int]] = defaultdict(set)
        self.balance: dict[tuple[int, int], Tensor] = {}

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        low, n = self.low[layer, head], len(s.k)
        if (layer, head) not in self.balance:
            self.balance[layer, head] = (q.abs().amax((0, 1)) / s.k.abs().amax(0)).sqrt()
        b = self.balance[layer, head]
        s.score = s.score + p.sum((0, 1))
        budget = math.floor(self.budget * self.prompt + 1e-9)
        recent = int(self.window * budget)
        old = [i for i in range(n - recent) if i not in low]
        over = n - len(low) - budget
        if over < (1 if p.shape[1] > 1 else self.interval):
            return
        for i in sorted(old, key=lambda i: float(s.score[i]))[:over]:
            s.k[i] = per_token(s.k[i : i + 1] * b, self.bits, self.group)[0] / b
            s.v[i] = per_token(s.v[i : i + 1], self.bits, self.group)[0]
            low.add(i)
