"""Decode attention alone: one token's queries over a layer's slots, compiled kernels and torch in turns."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from benchmarks import _common as common
from kvloom.core.codec import Codec, Exact
from kvloom.kernels import native
from kvloom.segments.minmax import MinMax

SHAPES = ((2, 4, 64, 8192), (2, 4, 64, 131072), (8, 4, 128, 32768))  # KV heads, queries of each, head size, slots
ROUNDS = 15
SDPA, MATMUL = "SDPA, enable_gqa", "grouped matmul"


def ours(q: Tensor, k: Tensor, v: Tensor, key: Codec, value: Codec) -> Callable[[], object]:
    """The compiled kernels over keys and values as these codecs store them."""
    h, rows, dim = q.shape
    kept: list[Tensor] = []
    described = []
    for codec, x, queries in ((key, k, q), (value, v, None)):
        block = {name: y.contiguous() for name, y in codec.encode(x, {}).items()}
        kept += block.values()
        described.append(codec.describe(block, {}, queries, kept))
    keys, values = described
    assert keys is not None and values is not None
    part = native.Part(k.shape[1], [keys], [values], kept=kept)
    return lambda: native.attend(h, rows, dim, dim, [part], dim**-0.5, None)


def contenders(h: int, rows: int, dim: int, n: int) -> dict[str, Callable[[], object]]:
    """Jobs by name; all do the same attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, m, dim, generator=generator) for m in (rows, n, n))
    jobs: dict[str, Callable[[], object]] = {
        SDPA: lambda: F.scaled_dot_product_attention(q.reshape(1, -1, 1, dim), k[None], v[None], enable_gqa=True),
        MATMUL: lambda: torch.softmax(q @ k.transpose(1, 2) * dim**-0.5, -1) @ v,
    }
    if native.ISA is not None:
        jobs["float32"] = ours(q, k, v, Exact(), Exact())
        jobs["bfloat16"] = ours(q, k.bfloat16(), v.bfloat16(), Exact(), Exact())
        for bits in (8, 4, 3, 2, 1):
            jobs[f"{bits} bits, groups of 32"] = ours(q, k, v, MinMax(bits, 32, "tokens"), MinMax(bits, 32, "channels"))
    return jobs


@torch.inference_mode()
def run() -> Table:
    """Times the contenders in turns, at every shape."""
    rows = []
    for h, queries, dim, n in SHAPES:
        jobs = contenders(h, queries, dim, n)
        taken = common.alternate(jobs, ROUNDS, warm=2)
        for name in jobs:
            seconds = median(taken[name])
            ratio = median(a / b for a, b in zip(taken[MATMUL], taken[name], strict=True))
            rows.append((
                f"{h} x {queries} x {dim}, {n:,}", name, f"{1e3 * seconds:.2f}", f"{2e-9 * h * n * dim / seconds:.1f}",
                f"{ratio:.1f}x",
            ))  # fmt: skip
    columns = ("KV heads x queries x size, slots", "stored as", "ms", "G numbers/s", "faster than grouped matmul")
    title = f"Decode attention, kernels: {native.ISA or 'torch'}"
    return common.table(title, columns, rows)
