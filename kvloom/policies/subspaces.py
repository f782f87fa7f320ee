"""Directions in which keys and values vary, from a text: principal ones, trained ones, and how many each head needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import DynamicCache, PreTrainedModel

from kvloom.core.codec import Plane
from kvloom.core.sample import managed, samples
from kvloom.core.view import text_config

__all__ = ["LEVELS", "Bases", "damages", "orthonormal", "principal", "rates", "train"]

LEVELS = 8  # ranks are eighths of a head
PLANES: tuple[Plane, Plane] = ("key", "value")
Bases = dict[
    Plane, tuple[Tensor, Tensor]
]  # basis [layers, H, D, D], columns by falling weight, and mean [layers, H, D]
Change = Callable[[int, Plane, Tensor], Tensor]


@torch.no_grad()
def principal(
    model: PreTrainedModel,
    texts: list[Tensor],
    tell: Callable[[str], None],
    join: int | None = 1,
    centred: bool = True,
    pre_rope: bool = False,
) -> Bases:
    """Principal directions of the keys and values of every managed layer, of `join` adjacent heads together (None: all).

    basis [layers, H / join, join * D, join * D], mean [layers, H / join, join * D] (zeros if not `centred`), fp32.
    """
    sums: dict[tuple[Plane, int], tuple[Tensor, Tensor]] = {}
    for sample in samples(model, texts, weights=False, pre_rope=pre_rope, tell=tell):
        for plane, x in zip(PLANES, (sample.keys, sample.values), strict=True):
            wide = x.unflatten(0, (-1, join or len(x))).transpose(1, 2).flatten(2).double()
            first, second = wide.sum(1), wide.transpose(1, 2) @ wide
            held = sums.get((plane, sample.layer))
            sums[plane, sample.layer] = (first, second) if held is None else (held[0] + first, held[1] + second)
    n, found = sum(text.shape[1] for text in texts), {}
    for plane in PLANES:
        means = torch.stack([sums[plane, layer][0] for layer in managed(model)]) / n
        seconds = torch.stack([sums[plane, layer][1] for layer in managed(model)]) / n
        means = means if centred else torch.zeros_like(means)
        basis = torch.linalg.eigh(seconds - means[..., None] * means[..., None, :]).eigenvectors.flip(-1)
        basis[..., 0] *= torch.linalg.det(basis).sign()[..., None]  # a rotation
        found[plane] = (basis.float(), means.float())
    return found


def orthonormal(basis: Tensor) -> Tensor:
    """The orthonormal columns nearest in order to those of basis [..., D, r], which rounding has moved a little. fp32."""
    q, r = torch.linalg.qr(basis.double())
    turned: Tensor = (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).float()
    return turned


class _Changed(DynamicCache):
    """A stock cache that hands on changed keys and values, with their gradients."""

    def __init__(self, model: PreTrainedModel, change: Change) -> None:
        super().__init__(config=text_config(model))
        self.change = change

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        key, value = self.change(layer_idx, "key", key_states), self.change(layer_idx, "value", value_states)
        return super().update(key, value, layer_idx, *args, **kwargs)


def _logits(model: PreTrainedModel, ids: Tensor, change: Change) -> Tensor:
    """Log-probabilities [T, vocabulary] of a model that sees changed keys and values."""
    out = model(ids.to(model.device), past_key_values=_Changed(model, change), use_cache=True)
    told: Tensor = out.logits[0].float().log_softmax(-1)
    return told


def _same(layer: int, plane: Plane, x: Tensor) -> Tensor:
    return x


def train(
    model: PreTrainedModel,
    start: Bases,
    texts: list[Tensor],
    tell: Callable[[str], None],
    rate: float = 1e-3,
    teacher: float = 0.25,
) -> tuple[Bases, list[float]]:
    """Turns the bases and moves the means so that any first columns of each serve best; one step per text.

    Every step draws a rank for each layer, head and plane. A basis is its start times the Cayley transform of a skew matrix, so
    it stays orthonormal. Loss: `teacher` of KL(model || its output with projected keys and values), the rest of the next-token
    loss. Adam, warm-up, then a cosine. Returns the bases and the loss of each step.
    """
    layers = {layer: at for at, layer in enumerate(managed(model))}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    training, losses = model.training, []
    start = {plane: (basis.to(model.device), mean.to(model.device)) for plane, (basis, mean) in start.items()}
    skew = {plane: torch.zeros_like(basis, requires_grad=True) for plane, (basis, _) in start.items()}
    means = {plane: mean.clone().requires_grad_() for plane, (_, mean) in start.items()}
    adam = torch.optim.Adam([*skew.values(), *means.values()], lr=rate, betas=(0.9, 0.95))
    warm, draw = min(100, max(1, len(texts) // 10)), torch.Generator().manual_seed(0)
    model.eval()
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        for step, ids in enumerate(texts):
            done = max(0, step - warm) / max(1, len(texts) - warm)
            adam.param_groups[0]["lr"] = rate * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * done))
            bases = {plane: _turned(start[plane][0], skew[plane]) for plane in PLANES}
            ranks = {plane: _ranks(basis, draw) for plane, basis in bases.items()}

            def change(layer: int, plane: Plane, x: Tensor, bases: Any = bases, ranks: Any = ranks) -> Tensor:
                if layer not in layers:
                    return x
                at = layers[layer]
                basis, mean = bases[plane][at], means[plane][at][:, None]
                z = (x.float() - mean) @ basis * ranks[plane][at]
                moved: Tensor = torch.matmul(z, basis.transpose(1, 2)) + mean
                return moved.to(x.dtype)

            with torch.no_grad():
                whole = _logits(model, ids, _same)
            with torch.enable_grad():
                own = _logits(model, ids, change)
                told = kl_div(own, whole, log_target=True, reduction="none").sum(-1).mean()
                loss = teacher * told + (1 - teacher) * cross_entropy(own[:-1], ids[0, 1:].to(own.device))
                adam.zero_grad()
                loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
            tell(f"training, step {step + 1} of {len(texts)}, loss {sum(losses[-20:]) / len(losses[-20:]):.3f}")
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        model.train(training)
    with torch.no_grad():
        found = {p: (_turned(start[p][0], skew[p]).cpu(), means[p].detach().cpu()) for p in PLANES}
    return found, losses


def _turned(basis: Tensor, skew: Tensor) -> Tensor:
    """basis (I - A)^-1 (I + A) with A = skew - skew^T, [..., D, D]."""
    a, one = skew - skew.transpose(-1, -2), torch.eye(skew.shape[-1], device=skew.device)
    turned: Tensor = basis @ torch.linalg.solve(one - a, one + a)
    return turned


def _ranks(basis: Tensor, draw: torch.Generator) -> Tensor:
    """Masks [layers, H, 1, D] of ranks drawn from the eighths of a head."""
    layers, heads, dim, _ = basis.shape
    rank = torch.randint(1, LEVELS + 1, (layers, heads, 1, 1), generator=draw) * dim // LEVELS
    return (torch.arange(dim) < rank).to(basis)


@torch.no_grad()
def damages(
    model: PreTrainedModel, bases: Bases, texts: list[Tensor], tell: Callable[[str], None]
) -> dict[Plane, Tensor]:
    """KL to the model, in nats per token, of one head's keys or values cut to r eighths, all others whole:
    [layers, H, LEVELS], r from 1; the last is 0.
    """
    layers = list(managed(model))
    found = {plane: torch.zeros(*basis.shape[:2], LEVELS) for plane, (basis, _) in bases.items()}
    training, whole = model.training, []
    model.eval()
    whole = [_logits(model, ids, _same) for ids in texts]
    items = [(p, at, h) for p in PLANES for at in range(len(layers)) for h in range(bases[p][0].shape[1])]
    for done, (plane, at, head) in enumerate(items):
        tell(f"damage of head {done + 1} of {len(items)}")
        basis, mean = (x[at, head].to(model.device) for x in bases[plane])
        for level in range(1, LEVELS):
            part = basis[:, : level * len(basis) // LEVELS]

            def change(
                layer: int, which: Plane, x: Tensor, part: Tensor = part, mean: Tensor = mean,
                mine: tuple[int, Plane, int] = (layers[at], plane, head),
            ) -> Tensor:  # fmt: skip
                if (layer, which) != mine[:2]:
                    return x
                x, h = x.clone(), mine[2]
                x[:, h] = ((x[:, h].float() - mean) @ part @ part.T + mean).to(x.dtype)
                return x

            told = [_logits(model, ids, change) for ids in texts]
            kl = [float((a.exp() * (a - b)).sum(-1).mean()) for a, b in zip(whole, told, strict=True)]
            found[plane][at, head, level - 1] = sum(kl) / len(kl)
    model.train(training)
    return found


def rates(damage: Tensor, keep: float) -> Tensor:
    """Eighths of each item, 1 to LEVELS, of least summed damage [items, LEVELS] where their mean is at most `keep` of all.

    The best there is for damages that add up, by dynamic programming. At least one eighth each.
    """
    items = len(damage)
    room = max(items, int(keep * items * LEVELS + 1e-9))
    best = torch.full((room + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    chosen = torch.zeros(items, room + 1, dtype=torch.long)
    for i, row in enumerate(damage.double()):
        options = torch.full((LEVELS, room + 1), torch.inf, dtype=torch.float64)
        for level in range(1, min(LEVELS, room) + 1):
            options[level - 1, level:] = best[: room + 1 - level] + row[level - 1]
        best, chosen[i] = options.min(0)
    at = int(best.argmin())
    found = torch.zeros(items, dtype=torch.long)
    for i in reversed(range(items)):
        found[i] = chosen[i, at] + 1
        at -= int(found[i])
    return found
