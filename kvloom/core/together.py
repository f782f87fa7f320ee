"""Forwards of several sequences side by side."""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor

from kvloom.kernels import dispatch

__all__ = ["Steps", "together"]

Steps = Generator[list[dispatch.Job], None, Tensor]  # a forward that stops where kernels are to work


def together(forwards: list[Steps]) -> list[Tensor]:
    """Runs one forward of each of several sequences; kernels get the work of all of them in one call."""
    done: list[Tensor | None] = [None] * len(forwards)
    jobs: list[dispatch.Job] = []
    for i, forward in enumerate(forwards):
        try:
            jobs += next(forward)
        except StopIteration as end:
            done[i] = end.value
    if jobs:
        dispatch.run(jobs)
    for i, forward in enumerate(forwards):
        if done[i] is None:
            try:
                next(forward)
            except StopIteration as end:
                done[i] = end.value
    return [x for x in done if x is not None]
