"""Finders: which stretches of a new text stand in an old one, in the same order, and what was edited between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from typing import NamedTuple

__all__ = ["Edit", "Match", "edits", "matches"]

FEW = 300  # with more tokens inserted and deleted than this, texts are different ones, and a longest-block search takes over


class Match(NamedTuple):
    """`n` tokens that stand at `old` in the old text and at `new` in the new one."""

    old: int
    new: int
    n: int


@dataclass(frozen=True)
class Edit:
    """Tokens [start, stop) of the old text give way to `tokens`; start == stop inserts, no tokens deletes."""

    start: int
    stop: int
    tokens: tuple[int, ...] = ()


def matches(old: Sequence[int], new: Sequence[int], least: int = 1) -> list[Match]:
    """Stretches of `least` tokens or more that both texts hold, in order, none crossing another.

    With few differences they leave out as few tokens as possible (Myers, 1986, "An O(ND) difference algorithm"); otherwise
    the longest common stretch is taken first, then the longest on either side of it.
    """
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    a, b = old[head : len(old) - tail], new[head : len(new) - tail]
    found = [Match(0, 0, head)]
    if a and b:
        inner = _myers(a, b)
        if inner is None:
            inner = [Match(*x) for x in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()]
        found += [Match(head + m.old, head + m.new, m.n) for m in inner]
    found.append(Match(len(old) - tail, len(new) - tail, tail))
    return [m for m in _joined(found) if m.n >= least]


def edits(old: Sequence[int], new: Sequence[int], least: int = 4) -> list[Edit]:
    """What turns the old text into the new one, from left to right. Common stretches below `least` count as edited.

    A word that was cut in other pieces because its neighbour changed is part of the edit: tokens are compared, not text.
    """
    if list(old) == list(new):
        return []
    found = [Match(0, 0, 0), *matches(old, new, least), Match(len(old), len(new), 0)]
    return [
        Edit(a.old + a.n, b.old, tuple(new[a.new + a.n : b.new]))
        for a, b in pairwise(found)
        if (a.old + a.n, a.new + a.n) != (b.old, b.new)
    ]


def _joined(found: list[Match]) -> list[Match]:
    """Neighbours that touch in both texts as one."""
    out: list[Match] = []
    for m in found:
        if out and (out[-1].old + out[-1].n, out[-1].new + out[-1].n) == m[:2]:
            out[-1] = out[-1]._replace(n=out[-1].n + m.n)
        else:
            out.append(m)
    return [m for m in out if m.n]


def _myers(a: Sequence[int], b: Sequence[int]) -> list[Match] | None:
    """The matches that leave out fewest tokens; None if that takes more than FEW."""
    reach = {1: 0}  # diagonal x - y -> how far x got with so many differences
    trace: list[dict[int, int]] = []
    for d in range(min(FEW, len(a) + len(b)) + 1):
        trace.append(dict(reach))
        for k in range(-d, d + 1, 2):
            down = k == -d or (k != d and reach[k - 1] < reach[k + 1])
            x = reach[k + 1] if down else reach[k - 1] + 1
            while x < len(a) and x - k < len(b) and a[x] == b[x - k]:
                x += 1
            reach[k] = x
            if x >= len(a) and x - k >= len(b):
                return _path(trace, len(a), len(b))
    return None


def _path(trace: list[dict[int, int]], x: int, y: int) -> list[Match]:
    """Walks back from the ends (x, y) along the differences."""
    found = []
    for d in range(len(trace) - 1, -1, -1):
        reach, k = trace[d], x - y
        down = k == -d or (k != d and reach[k - 1] < reach[k + 1])
        start = reach[k + 1] if down else reach[k - 1] + 1  # where the diagonal was entered
        if x > start:
            found.append(Match(start, start - k, x - start))
        x, y = (start, start - k - 1) if down else (start - 1, start - k)
    return found[::-1]
