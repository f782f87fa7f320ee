"""Ways to attend one token's queries to the slots of one layer: kvloom's, torch's and transformers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

from kvloom.bench.caches import BACKENDS, LeftOut, nbytes, quantized
from kvloom.core.codec import Codec, Exact
from kvloom.kernels import native
from kvloom.kernels.pack import unpack
from kvloom.segments.minmax import MinMax

__all__ = ["FP32", "GROUP", "Shape", "Way", "ways"]

GROUP = 32  # numbers that share scale and minimum in every packed form of ours
BITS = (8, 4, 3, 2, 1)
FP32 = ("SDPA, fp32", "SDPA rows, fp32", "matmul, fp32")  # torch's ways that ratios are against, the fastest of them
MOST = 1 << 25  # numbers that a QuantizedCache is given: it makes several dense copies, and hqq packs for minutes


@dataclass(frozen=True)
class Shape:
    """One layer's KV heads, query heads of each, and the size of a head."""

    heads: int
    queries: int
    dim: int

    def __str__(self) -> str:
        return f"{self.heads}x{self.queries}x{self.dim}"


@dataclass(frozen=True)
class Way:
    """`run` attends once and returns the output [h, g, D]; with `part` 0.5 it only multiplies keys: logits [h, g, n].

    `nbytes` of keys and values as they are stored, all of which one run reads.
    """

    name: str
    stored: str
    nbytes: int
    run: Callable[[], Tensor]
    part: float = 1.0

    def __str__(self) -> str:
        return f"{self.name}, {self.stored}"


def ways(shape: Shape, n: int) -> tuple[list[Way], list[str]]:
    """All of them over the same random slots [h, n, D], and why those that are missing cannot take part."""
    draw = torch.Generator().manual_seed(0)
    h, g, dim = shape.heads, shape.queries, shape.dim
    q, k, v = (torch.randn(h, m, dim, generator=draw) for m in (g, n, n))
    kb, vb = k.bfloat16(), v.bfloat16()
    found = _torch("fp32", q, k, v) + _torch("bf16", q.bfloat16(), kb, vb)
    left_out = []
    if native.ISA is None:
        left_out.append(f"kvloom: no compiled kernels ({native.WHY})")
    else:
        exact = Exact()
        found += [_ours("fp32", q, k, v, exact, exact), _ours("bf16", q, kb, vb, exact, exact)]
        for bits in BITS:
            key, value = MinMax(bits, GROUP, "tokens"), MinMax(bits, GROUP, "channels")
            found.append(_ours(f"{bits} bit{'s' * (bits > 1)}", q, k, v, key, value))
    others: dict[str, Callable[[], Way]] = {
        name: lambda name=name: _quantized(name, q, k, v)  # type: ignore[misc]
        for name in BACKENDS
    }
    for name, make in (others | {"int4pack": lambda: _int4pack(q, k)}).items():
        try:
            found.append(make())
        except LeftOut as why:
            left_out.append(f"{name}: {why}")
    return found, left_out


def _torch(stored: str, q: Tensor, k: Tensor, v: Tensor) -> list[Way]:
    """q [h, g, D], k and v [h, n, D], all in one dtype."""
    size = k.nbytes + v.nbytes
    flat = q.reshape(1, -1, 1, q.shape[2])

    def sdpa() -> Tensor:  # as transformers calls it
        return F.scaled_dot_product_attention(flat, k[None], v[None], enable_gqa=True).view_as(q)

    def rows() -> Tensor:
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]

    def matmul() -> Tensor:
        logits = q @ k.transpose(1, 2) * q.shape[2] ** -0.5
        return torch.softmax(logits, -1, dtype=torch.float32).to(q.dtype) @ v

    found = [Way("SDPA", stored, size, sdpa), Way("matmul", stored, size, matmul)]
    return [*found, Way("SDPA rows", stored, size, rows)] if stored == "fp32" else found


def _ours(stored: str, q: Tensor, k: Tensor, v: Tensor, key: Codec, value: Codec) -> Way:
    """The compiled kernels over keys and values as these codecs store them."""
    h, g, dim = q.shape
    kept: list[Tensor] = []
    described = []
    for codec, x, queries in ((key, k, q), (value, v, None)):
        block = {name: y.contiguous() for name, y in codec.encode(x, {}).items()}
        kept += block.values()
        described.append(codec.describe(block, {}, queries, kept))
    size = sum(x.nbytes for x in kept)
    keys, values = described
    assert keys is not None and values is not None
    part = native.Part(k.shape[1], [keys], [values], kept=[*kept, q])
    job = native.job(h, g, dim, dim, [part], dim**-0.5, None)

    def run() -> Tensor:
        native.run([job])
        return job.out

    return Way("kvloom", stored, size, run)


def _quantized(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Way:
    """A layer of transformers' QuantizedCache: a token comes, all is unpacked, SDPA reads the dense copy."""
    numbers = k.numel() + v.numel()
    if numbers > MOST:
        raise LeftOut(f"{numbers:,} numbers, more than {MOST:,}: minutes to pack, GiB to unpack")
    cache = quantized(backend, LlamaConfig(num_hidden_layers=1))
    cache.update(k[None], v[None], 0)
    size = nbytes(cache)
    flat, one = q.reshape(1, -1, 1, q.shape[2]), torch.zeros(1, k.shape[0], 1, k.shape[2])

    def run() -> Tensor:
        keys, values = cache.update(one, one, 0)
        return F.scaled_dot_product_attention(flat, keys, values, enable_gqa=True).view_as(q)

    return Way(backend, "8 bits" if backend == "fp8" else "4 bits", size, run)


def _int4pack(q: Tensor, k: Tensor) -> Way:
    """torch's matmul with weights of 4 bits, in bf16, where it is fast. Keys in groups along channels; no values."""
    op = torch.ops.aten
    block = MinMax(4, GROUP, "channels").encode(k, {})
    scale, low = block["scale"].float(), block["zero"].float()
    try:
        packed = [op._convert_weight_to_int4pack_for_cpu(x.int(), 1) for x in unpack(block["codes"], 4)]
        # [D / group, n, 2] each; read as (code - 8) * scale + zero
        zeros = [torch.stack((s, z + 8 * s), -1).transpose(0, 1).bfloat16().contiguous() for s, z in zip(scale, low)]
        queries = (q * q.shape[2] ** -0.5).bfloat16()

        def run() -> Tensor:
            rows = zip(queries, packed, zeros)
            return torch.stack([op._weight_int4pack_mm_for_cpu(x, codes, GROUP, sz) for x, codes, sz in rows])

        run()
    except (AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise LeftOut(f"this torch cannot ({reason})") from error
    return Way("int4pack", "4 bit keys", sum(x.nbytes for x in [*packed, *zeros]), run, part=0.5)
