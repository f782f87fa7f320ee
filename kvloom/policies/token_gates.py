"""Which tokens each KV head keeps, learned: a small network that reads the whole prompt (Attention-Gate, arXiv 2410.12876)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.group import Table
from kvloom.core.override import Attention, attending, causal, frozen
from kvloom.core.recipe import Away
from kvloom.core.rope import Rope
from kvloom.core.sample import managed, rows
from kvloom.core.step import Step
from kvloom.policies.head_gates import KEY, passkeys
from kvloom.policies.placements import Keep

__all__ = ["Gates", "Open", "Opened", "evicting", "fresh", "gate", "inputs", "shapes", "train"]

WIDTH, SMALL, BLOCK = 32, 16, 16  # of what is read, of queries and keys; tokens that are attended to as one
Gates = dict[str, Tensor]  # weights of every managed layer and KV head, [layers, H, ...]


def shapes(layers: int, heads: int, wide: int) -> dict[str, tuple[int, ...]]:
    """Of the weights, for keys and values of `wide` numbers together."""
    each: dict[str, tuple[int, ...]] = {
        "read": (wide, WIDTH),
        "query": (WIDTH, SMALL),
        "key": (WIDTH, SMALL),
        "value": (WIDTH, WIDTH),
    }
    each |= {"out": (2 * WIDTH,), "bias": ()}
    return {name: (layers, heads, *shape) for name, shape in each.items()}


def fresh(layers: int, heads: int, wide: int) -> Gates:
    """Random weights whose gates are open."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in shapes(layers, heads, wide).items():
        found[name] = torch.randn(shape, generator=draw) * (shape[2] ** -0.5 if len(shape) > 3 else 0.01)
    found["bias"] += 2.0
    return found


def inputs(k: Tensor, v: Tensor, rope: Rope | None, first: int) -> Tensor:
    """What gates read: keys before RoPE and values [H, n, D] of consecutive tokens -> [H, n, wide] fp32."""
    if rope is not None:
        k = rope.unrotate(k.float(), torch.arange(first, first + k.shape[1], device=k.device))
    return torch.cat([F.layer_norm(x.float(), x.shape[-1:]) for x in (k, v)], -1)


def gate(x: Tensor, weights: Gates) -> Tensor:
    """Logits [H, n] from x [H, n, wide], all of it; weights [H, ...]. A token is kept where they are above that of the threshold.

    Every token attends to the means of blocks of tokens, before and after it.
    """
    read = F.gelu(x @ weights["read"])
    n = x.shape[1]
    full = F.pad(read, (0, 0, 0, -n % BLOCK)).unflatten(1, (-1, BLOCK)).sum(2)
    counts = torch.full((full.shape[1],), BLOCK, device=x.device)
    counts[-1] = n - (full.shape[1] - 1) * BLOCK
    means = full / counts[:, None]
    wide = (0, WIDTH - SMALL)  # a fused kernel takes queries as wide as values only, and is four times as fast
    query, key = (F.pad(y @ weights[name], wide)[None] for y, name in ((read, "query"), (means, "key")))
    seen = F.scaled_dot_product_attention(query, key, (means @ weights["value"])[None], scale=SMALL**-0.5)[0]
    return (torch.cat([read, seen], -1) @ weights["out"][..., None])[..., 0] + weights["bias"][:, None]


@dataclass(frozen=True)
class Open:
    """Of the tokens of this forward: how far the gate is open, as a logit; older slots stay (infinite)."""

    gates: Gates
    order: tuple[int, ...]  # managed layers
    queries = 0
    columns = 0

    def __call__(self, step: Step, table: Table) -> Tensor:
        segment, m = step.group.segments["main"], step.length - step.first
        k, v = (plane.dense(segment.n - m, segment.n) for plane in (segment.key, segment.value))
        at = self.order.index(step.site.layer)
        weights = {name: step.group.pick(x[at]).to(k.device, torch.float32) for name, x in self.gates.items()}
        scores = torch.full((step.heads, table.n), torch.inf, device=k.device)
        if k.shape[-1]:  # a forecast has none
            scores[:, table.n - m :] = gate(inputs(k, v, step.rope, step.first), weights)
        return scores.masked_fill_(table.index < 1, torch.inf)


@dataclass(frozen=True)
class Opened(Keep):
    """Keeps what scores above the threshold, however much it is."""

    threshold: float = 0.0

    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Tensor | Away | int:
        assert scores is not None
        return torch.where(scores > self.threshold, step.classes.index("main"), -1)


def evicting(gates: Gates, ropes: list[Rope | None], order: list[int], prefix: int, opened: list[Tensor]) -> Attention:
    """Attention of a text whose tokens from `prefix` on see of those before only what gates keep; gradients pass straight through.

    The gates read the prefix alone. Each layer's share of open gates is appended to `opened`.
    """

    def by(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        at = order.index(layer)
        x = inputs(k[0, :, :prefix], v[0, :, :prefix], ropes[at], 0)
        p = gate(x, {name: w[at] for name, w in gates.items()}).sigmoid()
        flags = (p > 0.5).to(p.dtype) + p - p.detach()
        opened.append(flags.mean())
        first = F.pad(torch.ones_like(flags[:, :1]), (0, prefix - 1))
        shown = torch.maximum(flags, first)
        early = causal(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], scale)
        h, g, late = k.shape[1], q.shape[1] // k.shape[1], q.shape[2] - prefix
        s = q[0, :, prefix:].unflatten(0, (h, g)) @ k[0][:, None].mT * scale
        place = torch.arange(k.shape[2], device=k.device)
        s = s.masked_fill(place > place[prefix:, None], -torch.inf)
        e = (s - s.detach().amax(-1, keepdim=True)).exp()
        e = e * F.pad(shown, (0, late), value=1.0)[:, None, None]
        out = (e @ v[0][:, None]) / e.sum(-1, keepdim=True)
        return torch.cat([early, out.flatten(0, 1)[None].to(early.dtype)], 2)

    return by


def train(
    model: PreTrainedModel,
    ids: Tensor,
    tell: Callable[[str], None],
    share: float = 0.4,
    steps: int = 60,
    length: int = 512,
    rate: float = 2e-3,
    weight: float = 300.0,
) -> Gates:
    """Gates of every managed layer, of a text ids [T], the model left as it is.

    Texts end with passkeys that stood before; the loss is that of the next token there, with gates closed as they
    say, and `weight` times the squared distance of each layer's open share to a target that falls to
    `share` in the first half: gates that all shut at once hardly learn to open again.
    """
    sites = managed(model)
    site, draw = next(iter(sites.values())), torch.Generator().manual_seed(0)
    wide, ropes, order = site.key_dim + site.value_dim, [each.rope for each in sites.values()], list(sites)
    gates = {name: x.to(model.device).requires_grad_() for name, x in fresh(len(sites), site.kv_heads, wide).items()}
    optimizer = torch.optim.AdamW(gates.values(), lr=rate, weight_decay=0.0)
    texts = rows(model, ids, steps, length)
    with frozen(model):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10, (steps - step) / max(1, steps // 3))
            count = max(1, len(texts[0][0]) // (10 * KEY))
            short, answers = passkeys(texts[step % len(texts)][0], count, draw)
            prefix = len(short) - count * KEY - min(64, len(short) // 8)  # some of the plain text is asked for as well
            row = short[None].to(model.device)
            opened: list[Tensor] = []
            with torch.enable_grad(), attending(model, evicting(gates, ropes, order, prefix, opened)):
                logits = model(row, use_cache=False).logits[0, prefix - 1 : -1].float()
                lost = F.cross_entropy(logits, row[0, prefix:])
                aim = 1 - (1 - share) * min(1.0, 2 * step / steps)
                off = torch.stack([(x - aim).square() for x in opened]).mean()
                optimizer.zero_grad()
                (lost + weight * off).backward()
            torch.nn.utils.clip_grad_norm_(list(gates.values()), 1.0)
            optimizer.step()
            if step % 10 == 0 or step == steps - 1:
                mean = torch.stack(opened).mean().item()
                tell(f"step {step + 1} of {steps}: loss {lost.item():.2f}, open {mean:.2f}")
    return {name: x.detach().half().cpu() for name, x in gates.items()}
