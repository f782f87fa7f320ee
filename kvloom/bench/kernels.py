"""Decode attention alone: every way to do it, over every shape and number of slots, against the machine's rooflines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table

from kvloom.bench import rooflines, show
from kvloom.bench.attention import BITS, FP32, Shape, Way, ways
from kvloom.bench.caches import BACKENDS
from kvloom.bench.rooflines import Roofline
from kvloom.bench.timing import Taken, Tell, alternate, ratio, silent, threads
from kvloom.kernels import native

__all__ = ["Kernels", "Row", "run", "steps"]

WARM = 2


@dataclass(frozen=True)
class Row:
    """`way` over `slots` slots. `of_roofline`: the least time that the machine needs, over the time taken (above 1: it
    was read from a core's cache); `ratio`: time over that of `against`, the fastest of torch's fp32 ways here.
    """

    threads: int
    shape: str
    slots: int
    way: str
    stored: str
    ms: float
    numbers_per_second: float
    bytes_per_second: float
    of_roofline: float
    bound: str
    ratio: float
    against: str


@dataclass(frozen=True)
class Kernels:
    """All rows, the rooflines they stand against, and who could not take part, with the reason."""

    rows: list[Row]
    rooflines: list[Roofline]
    left_out: list[str]

    def table(self) -> Table:
        """A section for every number of threads, shape and number of slots."""
        columns = ("cores", "shape", "slots", "way", "stored as", "ms", "G num/s", "GB/s", "of roof", "ratio")
        cells = [
            (
                str(r.threads), r.shape, f"{r.slots:,}", r.way, r.stored, f"{r.ms:.2f}",
                f"{r.numbers_per_second / 1e9:.1f}", f"{r.bytes_per_second / 1e9:.1f}", f"{r.of_roofline:.0%}",
                f"{r.ratio:.2f}x",
            )
            for r in self.rows
        ]  # fmt: skip
        return show.table(f"Decode attention, kernels: {native.ISA or 'torch'}", columns, cells, text=5, group=3)

    def notes(self) -> list[str]:
        """The rooflines, what the ratios are against, and who is missing."""
        ratios = "ratio: time over that of torch's fastest fp32 way there; smaller is better"
        return [*map(str, self.rooflines), ratios, *(f"left out: {line}" for line in self.left_out)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return show.about() | asdict(self)


def steps(shapes: int, slots: int, counts: int, rounds: int) -> int:
    """How often `run` tells of a step, unless somebody is left out."""
    jobs = 5 + (2 + len(BITS) if native.ISA else 0) + len(BACKENDS) + 1
    return counts * 2 * (rounds + 1) + shapes * slots * (1 + counts * jobs * (rounds + WARM))


@torch.inference_mode()
def run(
    shapes: Sequence[Shape], slots: Sequence[int], counts: Sequence[int], rounds: int, tell: Tell = silent
) -> Kernels:
    """Times all ways in turns, `rounds` times, on each of the numbers of threads."""
    roofs = []
    for count in counts:
        with threads(count):
            roofs.append(rooflines.measure(rounds, tell))
    rows: list[Row] = []
    left_out: list[str] = []
    for shape in shapes:
        for n in slots:
            tell(f"{shape}, {n:,} slots: packing")
            found, missing = ways(shape, n)
            left_out += [line for line in missing if line not in left_out]
            for roof in roofs:
                with threads(roof.threads):
                    taken = alternate({str(way): way.run for way in found}, rounds, WARM, tell)
                rows += _rows(shape, n, roof, found, taken)
    return Kernels(rows, roofs, left_out)


def _rows(shape: Shape, n: int, roof: Roofline, found: list[Way], taken: Taken) -> list[Row]:
    best = min(FP32, key=lambda name: median(taken[name]))
    rows = []
    for way in found:
        seconds = median(taken[str(way)])
        numbers = 2 * shape.heads * n * shape.dim * way.part
        products = numbers * shape.queries
        rows.append(
            Row(
                roof.threads, str(shape), n, way.name, way.stored, 1e3 * seconds, numbers / seconds,
                way.nbytes / seconds, roof.seconds(way.nbytes, products) / seconds,
                "reading" if way.nbytes / roof.bandwidth > products / roof.rate else "multiply-adds",
                ratio(taken, str(way), best), best,
            )
        )  # fmt: skip
    return rows
