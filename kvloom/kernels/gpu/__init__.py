"""The GPU's kernels, in Triton: the calls of `native`, and what encoding, scoring and prefill need.

`tiles` reads stored slots, `split` attends over them and `decode` plans its launches; `quantize`, `mass` and `flash` are the
kernels behind `launch`. Triton is imported when a kernel first runs.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from kvloom.kernels.gpu.decode import Job, attend, attend_many
from kvloom.kernels.gpu.launch import column_mass, encode_minmax, prefill, window_lse, window_mass
from kvloom.kernels.gpu.runs import DTYPES, Dense, Packed, dense, packed

__all__ = [
    "Dense", "Job", "Packed", "attend", "attend_many", "available", "column_mass", "dense", "encode_minmax", "packed",
    "prefill", "serves", "window_lse", "window_mass",
]  # fmt: skip

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
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and q.dtype in DTYPES
        and q.shape[-1] % 8 == value_dim % 8 == 0
        and max(q.shape[-1], value_dim) <= MOST
        and not (q.requires_grad and torch.is_grad_enabled())
    )
