"""How long a step will take, learned from the steps so far."""

from __future__ import annotations

import numpy as np

__all__ = ["Pace"]

SCALE = np.array([1.0, 16.0, 16384.0, 256.0, 262144.0])  # what brings the parts of a load to about one
FADE = 0.98  # what a step weighs when the next one has come


class Pace:
    """Seconds of a step: a sum of what it takes at all, and for its load. No part of it is negative.

    A load is (decoding requests, tokens that they see, rows of prompts, pairs of such a row and what it sees).
    """

    def __init__(self) -> None:
        self._cost = np.zeros(5)
        self._square, self._right = np.zeros((5, 5)), np.zeros(5)
        self.seen = [0, 0]  # steps without and with prompts

    @property
    def known(self) -> bool:
        """Whether enough steps of both sorts were seen."""
        return min(self.seen) >= 4

    def note(self, load: tuple[int, int, int, int], seconds: float) -> None:
        """A step with this load took so long."""
        x = np.array([1.0, *load]) / SCALE
        self.seen[load[2] > 0] += 1
        self._square = FADE * self._square + np.outer(x, x) / seconds**2  # relative errors count
        self._right = FADE * self._right + x / seconds
        cost = self._cost
        for _ in range(20):  # least squares with a floor at zero, from where the last step left
            for i in range(5):
                if self._square[i, i] > 0:
                    rest = self._right[i] - self._square[i] @ cost + self._square[i, i] * cost[i]
                    cost[i] = max(0.0, rest / self._square[i, i])

    def seconds(self, load: tuple[int, int, int, int]) -> float:
        """What a step with this load will take."""
        return float(self._cost @ (np.array([1.0, *load]) / SCALE))
