"""Runs of keys or values as the GPU's kernels see them, and the stretches of a part that have one run of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvloom.kernels.gpu.serving import DTYPES

__all__ = ["Dense", "Packed", "PartLike", "Run", "Stretch", "cut", "dense", "packed", "tile"]


@dataclass(frozen=True, eq=False)
class Dense:
    """Slots x [h, n, D], each head's contiguous; q [h, R, D], contiguous: their queries, if they are keys."""

    x: Tensor
    q: Tensor | None
    unit = 1  # slots of one row of the tensors

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.x,)

    @property
    def n(self) -> int:
        return self.x.shape[1]


@dataclass(frozen=True, eq=False)
class Packed:
    """Packed codes, 16-bit scales and minima, laid out as in `segments.minmax`, each head's contiguous."""

    along: str
    bits: int
    group: int
    codes: Tensor
    scale: Tensor
    zero: Tensor
    q: Tensor | None

    @property
    def unit(self) -> int:
        return self.group if self.along == "tokens" else 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale, self.zero

    @property
    def n(self) -> int:
        return self.codes.shape[1] * self.unit


Run = Dense | Packed


class PartLike(Protocol):
    """What is read of a `native.Part` whose runs are described by this module."""

    @property
    def n(self) -> int: ...
    @property
    def keys(self) -> Sequence[Run]: ...
    @property
    def values(self) -> Sequence[Run]: ...
    @property
    def logw(self) -> Tensor | None: ...
    @property
    def scores(self) -> Tensor | None: ...


@dataclass(frozen=True, eq=False)
class Stretch:
    """The n slots from `start` on of a part: from slot `key_at` of one run of keys, `value_at` of one of values."""

    key: Run
    key_at: int
    value: Run
    value_at: int
    start: int
    n: int


def dense(x: Tensor, q: Tensor | None = None) -> Dense | None:
    """Describes a dense run x [h, n, D]; q [h, R, D], contiguous: its queries, if it holds keys."""
    if x.dtype not in DTYPES or x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != x.shape[2]):
        return None
    return Dense(x, q)


def tile(n: int, terms: Sequence[object], kept: Sequence[Tensor]) -> None:
    """Triton's kernels decode no tiles: plain torch does what is not dense or min-max."""


def packed(
    along: str, bits: int, group: int, codes: Tensor, scale: Tensor, zero: Tensor, q: Tensor | None = None
) -> Packed | None:
    """Describes a run of packed codes and its scales and zeros, laid out as in `segments.minmax`."""
    if (
        scale.dtype not in DTYPES
        or scale.dtype != zero.dtype
        or any(not x[0].is_contiguous() for x in (codes, scale, zero))
    ):
        return None
    return Packed(along, bits, group, codes, scale, zero, q)


def cut(part: PartLike) -> Iterator[Stretch]:
    """A part, cut wherever a run of either plane ends."""
    keys, values = ([run for run in runs if run.n] for runs in (part.keys, part.values))
    i = j = key_at = value_at = start = 0
    while start < part.n:
        n = min(keys[i].n - key_at, values[j].n - value_at)
        yield Stretch(keys[i], key_at, values[j], value_at, start, n)
        start, key_at, value_at = start + n, key_at + n, value_at + n
        if key_at == keys[i].n:
            i, key_at = i + 1, 0
        if value_at == values[j].n:
            j, value_at = j + 1, 0
