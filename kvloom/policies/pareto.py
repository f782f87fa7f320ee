"""Two costs at once: which points no other beats, and a search for them (NSGA-II; Deb et al., 2002)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import TypeVar

__all__ = ["Costs", "Genome", "front", "search"]

Costs = tuple[float, float]  # the smaller, the better
Genome = tuple[int, ...]
Name = TypeVar("Name")


def _better(a: Costs, b: Costs) -> bool:
    """a is nowhere worse than b, and somewhere better."""
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def front(points: Mapping[Name, Costs]) -> list[Name]:
    """The points that no other beats, by the first cost; of equal ones the first."""
    found: list[Name] = []
    best = float("inf")
    for name in sorted(points, key=lambda name: points[name]):
        if points[name][1] < best:
            best = points[name][1]
            found.append(name)
    return found


def _ranks(points: Mapping[Genome, Costs]) -> dict[Genome, tuple[int, float]]:
    """Of each: how many fronts lie before its own, and minus the room around it on its front: smaller is better."""
    left, rank = dict(points), 0
    found: dict[Genome, tuple[int, float]] = {}
    while left:
        mine = [a for a in left if not any(_better(left[b], left[a]) for b in left)]
        room = dict.fromkeys(mine, 0.0)
        for cost in (0, 1):
            order = sorted(mine, key=lambda name: left[name][cost])
            span = left[order[-1]][cost] - left[order[0]][cost] or 1.0
            room[order[0]] = room[order[-1]] = float("inf")
            for before, name, after in zip(order, order[1:], order[2:]):
                room[name] += (left[after][cost] - left[before][cost]) / span
        found |= {name: (rank, -room[name]) for name in mine}
        left = {name: costs for name, costs in left.items() if name not in room}
        rank += 1
    return found


def search(
    options: Sequence[int],
    cost: Callable[[Genome], Costs],
    first: Iterable[Genome] = (),
    trials: int = 100,
    size: int = 20,
    seed: int = 0,
) -> dict[Genome, Costs]:
    """All genomes that were tried, with their costs; gene i is one of `options[i]` numbers from 0.

    `first` are tried first. Then: children of two parents, each the better of two drawn by front and by room around it; every
    gene from either, one in `len(options)` drawn anew; the best `size` of parents and children go on. Ends after `trials`, or
    when hardly anything new comes.
    """
    draw = Random(seed)
    known: dict[Genome, Costs] = {}

    def tried(genome: Genome) -> Genome:
        if genome not in known:
            known[genome] = cost(genome)
        return genome

    people = {tried(genome) for genome in first}
    while len(people) < size and len(known) < trials and len(people) < _count(options):
        people.add(tried(tuple(draw.randrange(n) for n in options)))
    idle = 0
    while len(known) < min(trials, _count(options)) and idle < 20:
        before, ranks = len(known), _ranks({name: known[name] for name in people})
        order = sorted(ranks)

        def parent() -> Genome:
            return min(draw.choice(order), draw.choice(order), key=lambda name: ranks[name])  # noqa: B023

        for _ in range(size):
            if len(known) < trials:
                mixed = [draw.choice(pair) for pair in zip(parent(), parent(), strict=True)]
                gene = [draw.randrange(n) if draw.random() < 1 / len(options) else x for x, n in zip(mixed, options)]
                people.add(tried(tuple(gene)))
        ranks = _ranks({name: known[name] for name in people})
        people = set(sorted(ranks, key=lambda name: (ranks[name], name))[:size])
        idle = idle + 1 if len(known) == before else 0
    return known


def _count(options: Sequence[int]) -> int:
    total = 1
    for n in options:
        total *= n
    return total
