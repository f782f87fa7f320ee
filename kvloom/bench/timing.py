"""Jobs timed in turns, so that a busy machine is equally busy for all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median

import torch

__all__ = ["Taken", "Tell", "alternate", "ratio", "silent", "threads"]

Taken = dict[str, list[float]]  # seconds of every job in every round
Tell = Callable[[str], None]  # is told of every step before it begins


def silent(text: str) -> None:
    """Tells nobody."""


def alternate(jobs: Mapping[str, Callable[[], object]], rounds: int, warm: int = 1, tell: Tell = silent) -> Taken:
    """Runs every job once per round; the first `warm` rounds are not counted."""
    taken: Taken = {name: [] for name in jobs}
    for at in range(-warm, rounds):
        for name, job in jobs.items():
            tell(name)
            _finish()
            start = time.perf_counter()
            job()
            _finish()
            if at >= 0:
                taken[name].append(time.perf_counter() - start)
    return taken


def ratio(taken: Taken, name: str, base: str) -> float:
    """Median over the rounds of a job's time against the base's in the same round."""
    return median(mine / theirs for mine, theirs in zip(taken[name], taken[base], strict=True))


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch, and kvloom's kernels with it, on that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
