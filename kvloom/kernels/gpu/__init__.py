"""The GPU's kernels, in Triton: the calls of `native`, and what encoding, scoring and prefill need.

`tiles` reads stored slots, `split` attends over them and `decode` plans its launches; `quantize`, `mass` and `flash` are the
kernels behind `launch`. Triton is imported when a kernel first runs.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from kvloom.kernels.gpu.decode import Job, attend, attend_many
from kvloom.kernels.gpu.launch import column_mass, encode_minmax, prefill, window_lse, window_mass
from kvloom.kernels.gpu.runs import DTYPES, Dense, Packed, dense, packed

__all__ = [
    "Dense", "Job", "Packed", "attend", "attend_many", "available", "column_mass", "dense", "encode_minmax", "packed",
    "prefill", "serves", "window_lse", "window_mass",
]  # fmt: skip

available = find_spec("triton") is not None and os.environ.get("KVLOOM_KERNELS") != "torch"
MOST = 256  # channels of a head


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
