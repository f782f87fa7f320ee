"""What these kernels take."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

__all__ = ["DTYPES", "ROWS", "available", "fits", "serves"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = 64  # query rows of a KV head that one program of `split` takes
MOST = 256  # channels of a head
OLDEST = (3, 5)  # Triton: older ones multiply no fewer than 16 query rows


def _triton() -> tuple[int, ...]:
    """The version of Triton that is installed; (0,) without it."""
    for name in ("triton", "pytorch-triton"):
        try:
            return tuple(int(x) for x in version(name).split(".")[:2])
        except PackageNotFoundError:
            continue
    return (0,)


available = _triton() >= OLDEST and os.environ.get("KVLOOM_KERNELS") != "torch"


def serves(q: Tensor, value_dim: int) -> bool:
    """Whether these kernels take queries [..., D] like these, for values of that many channels."""
    return (
        available
        and q.device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and q.dtype in DTYPES
        and q.shape[-1] % 8 == value_dim % 8 == 0
        and max(q.shape[-1], value_dim) <= MOST
        and not (q.requires_grad and torch.is_grad_enabled())
    )


def fits(q: Tensor, *others: Tensor) -> bool:
    """Whether `prefill` and `observe` take queries, keys and values like these: one dtype, contiguous rows."""
    graph = torch.is_grad_enabled()
    return serves(q, others[-1].shape[-1]) and all(
        x.dtype == q.dtype and x.stride(-1) == 1 and not (graph and x.requires_grad) for x in (q, *others)
    )
