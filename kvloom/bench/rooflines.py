"""What the machine can do at most: bytes read and numbers multiplied per second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from kvloom.bench.timing import Tell, alternate, silent

__all__ = ["Roofline", "measure"]

VECTOR = 512 << 20  # bytes that are summed: more than any cache of a CPU holds
SIDE = 2048  # of the square matrices that are multiplied


@dataclass(frozen=True)
class Roofline:
    """Bytes per second of a vector sum, fp32 multiply-adds per second of a matrix product."""

    threads: int
    bandwidth: float
    rate: float

    def __str__(self) -> str:
        return (
            f"{self.threads} thread{'s' * (self.threads > 1)}: reads {self.bandwidth / 1e9:.1f} GB/s, "
            f"does {self.rate / 1e9:.1f} G multiply-adds/s"
        )

    def seconds(self, nbytes: int, multiply_adds: float) -> float:
        """The least time for reading that much and multiplying that much at once."""
        return max(nbytes / self.bandwidth, multiply_adds / self.rate)


def measure(rounds: int, tell: Tell = silent) -> Roofline:
    """Medians, on as many threads as torch uses now."""
    vector = torch.ones(VECTOR // 4)
    a, b = torch.randn(2, SIDE, SIDE)
    jobs: dict[str, Callable[[], object]] = {
        f"sum of {VECTOR >> 20} MiB": vector.sum,
        f"matmul of {SIDE}": lambda: a @ b,
    }
    read, multiply = alternate(jobs, rounds, tell=tell).values()
    return Roofline(torch.get_num_threads(), vector.nbytes / median(read), SIDE**3 / median(multiply))
