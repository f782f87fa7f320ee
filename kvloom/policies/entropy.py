"""How much the queries of each head vary: truncated matrix entropy (UNComp, arXiv 2410.03090)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.sample import rows
from kvloom.core.step import Step
from kvloom.core.view import kv_heads_of, text_config
from kvloom.policies.looking import look

__all__ = ["entropy", "votes"]


def entropy(x: Tensor, k: int = 32) -> Tensor:
    """Of rows x [..., T, D]: fp32 [...]. 1 where all directions are alike and k = D, 0 where there is one.

    Minus the sum of s log s over the k largest eigenvalues s of the covariance of the rows, centred and then brought to
    length one, divided by its trace; in units of log D.
    """
    z = F.normalize((x.float() - x.float().mean(-2, keepdim=True)), dim=-1)
    cov = z.mT @ z
    cov = cov / cov.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(1e-20)
    s = torch.linalg.eigvalsh(cov.double()).clamp_min(0).flip(-1)[..., :k] + 1e-10
    found: Tensor = -(s * s.log()).sum(-1) / torch.tensor(float(x.shape[-1])).log()
    return found.float()


def votes(
    model: PreTrainedModel, ids: Tensor, tell: Callable[[str], None], count: int = 16, length: int = 512
) -> dict[str, Tensor]:
    """{"votes": [layers, H], "entropy": [layers, H]} of a text ids [T]: in how many stretches of it a KV head was in the upper half.

    A KV head's entropy is the mean over the queries of its group, after RoPE.
    """
    config = text_config(model)
    shape = (config.num_hidden_layers, kv_heads_of(config))
    found = {name: torch.zeros(shape) for name in ("votes", "entropy")}
    texts = rows(model, ids, count, length)
    for i, text in enumerate(texts):
        tell(f"text {i + 1} of {len(texts)}")
        for layer, x in look(model, text, _heads)[0].items():
            found["entropy"][layer] += x / len(texts)
            found["votes"][layer, x.argsort(descending=True)[: len(x) // 2]] += 1
    return found


def _heads(step: Step) -> Tensor:
    return entropy(step.q).mean(1).cpu()
