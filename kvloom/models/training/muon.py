"""Muon in float32: momentum whose update matrices are orthogonalised (Newton-Schulz).

``torch.optim.Muon`` iterates in bfloat16, which CPUs without bfloat16 units run a hundred times slower.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of the singular value decomposition of ``matrix`` [rows, columns]."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):  # quintic iteration: singular values go to about 1
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled so that updates have the size of AdamW's (RMS 0.2 x rate)."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight)

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """Update one matrix (of the first group); different matrices may be updated in different threads."""
        group, state = self.param_groups[0], self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        mean = state["momentum"]
        mean.lerp_(weight.grad, 1 - group["momentum"])
        update = orthogonalise(torch.lerp(weight.grad, mean, group["momentum"]))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)
