"""The ways to store keys and values that `kvloom bench coding` compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvloom.kernels.pack import BITS, pack
from kvloom.segments.minmax import MinMax
from kvloom.store.cachegen import BINS, FORMS, CacheGen
from kvloom.store.coding import BEST
from kvloom.store.frame import DTYPES, Place

__all__ = ["BASE", "Contender", "Planes", "contenders"]

Planes = dict[Place, Tensor]  # x [h, n, D] of every layer and plane
# what is stored, the coding of its pages, and how to get from what was read to planes
Contender = Callable[[Planes], tuple[dict[Place, Tensor], str, Callable[[dict[Place, Tensor]], Planes]]]
BASE = "zstd"  # what CacheGen has to beat: quantize, pack, zstd-1


def _cast(dtype: torch.dtype, coding: str) -> Contender:
    def encode(planes: Planes) -> Any:
        return (
            {place: x.to(dtype) for place, x in planes.items()},
            coding,
            lambda got: {p: x.float() for p, x in got.items()},
        )

    return encode


def _minmax(bits: int, group: int, coding: str) -> Contender:
    codecs = {"key": MinMax(bits, group, "tokens"), "value": MinMax(bits, group, "channels")}

    def encode(planes: Planes) -> Any:
        fields = {
            Place(place.layer, place.plane, name): field
            for place, x in planes.items()
            for name, field in codecs[place.plane].encode(x.contiguous(), {}).items()
        }

        def decode(got: dict[Place, Tensor]) -> Planes:
            return {
                place: codecs[place.plane]
                .decode({name: got[Place(place.layer, place.plane, name)] for name in ("codes", "scale", "zero")}, {})
                .float()
                for place in planes
            }

        return fields, coding, decode

    return encode


def _cachegen(level: int, form: str) -> Contender:
    codec = CacheGen(level, form)
    return lambda planes: (codec.encode(planes)[0], BEST, codec.decode)


def _packed(level: int) -> Contender:
    """CacheGen's own whole numbers, packed in as few bits as the largest needs, then zstd: its quantizer without its coder."""
    codec = CacheGen(level)

    def encode(planes: Planes) -> Any:
        tensors = codec.encode(planes)[0]
        small = {
            place: _fewest(x) if place.field in ("symbols", "anchors") and x.dtype == torch.uint8 else x
            for place, x in tensors.items()
        }
        return small, "zstd", lambda got: codec.decode(tensors)

    return encode


def _fewest(symbols: Tensor) -> Tensor:
    bits = next(b for b in BITS if int(symbols.max()) < 1 << b)
    flat = symbols.flatten()
    return pack(torch.nn.functional.pad(flat, (0, -len(flat) % 8)), bits)


def contenders() -> dict[str, Contender]:
    """All ways, by name."""
    ways: dict[str, Contender] = {"float32": _cast(torch.float32, "raw")}
    for name in ("float16", "bfloat16"):
        ways[name] = _cast(DTYPES[name], "raw")
    ways["bfloat16, rans"] = _cast(torch.bfloat16, "rans")
    for group in (32, 64):
        for bits in (8, 4, 3, 2):
            for coding in ("raw", BASE):
                ways[f"min-max {bits} bits/{group}" + (f", {coding}" if coding != "raw" else "")] = _minmax(
                    bits, group, coding
                )
    for level in BINS:
        ways[f"cachegen {level} packed, zstd"] = _packed(level)
    for form in FORMS:
        for level in BINS:
            ways[f"cachegen {level} {form}"] = _cachegen(level, form)
    return ways
