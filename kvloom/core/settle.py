"""Settle, the one lossy act: score -> allot -> route -> move or drop -> freeze, for one layer of one sequence."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvloom.core.group import Group, Table
from kvloom.core.recipe import DROP, Away, Merger, Policy
from kvloom.core.segment import Segment
from kvloom.core.select import digested
from kvloom.core.step import Step

__all__ = ["apply", "fit", "freeze", "held", "note", "of_group", "place", "slack"]


def place(steps: list[Step], policy: Policy) -> list[list[Group]]:
    """Applies a policy to the groups of a layer. Returns what each became (one, unless its heads now hold unequally many)."""
    if policy.allot is None:
        return [_place(step, policy) for step in steps]
    budget, over = _over(steps, policy)
    due = budget is not None and over > (policy.every - 1) * steps[0].site.kv_heads
    if not due and (policy.score is None or policy.score.queries >= 0):
        return [[step.group] for step in steps]
    assert policy.score is not None
    for step in steps:
        step.budget = budget
    tables = [Table(step.group, policy.over, step.q.device) for step in steps]
    scores = [policy.score(step, table) for step, table in zip(steps, tables, strict=True)]
    if not due or budget is None:
        return [[step.group] for step in steps]
    shares = policy.allot(steps, tables, scores, budget)
    return [_share(step, policy, *each) for step, *each in zip(steps, scores, shares, strict=True)]


def note(steps: list[Step], policy: Policy) -> list[list[Group]]:
    """Where layers settle together: what is due when one of them has run. Scores stay with the slots until all are settled."""
    for step in steps:
        budget = policy.budget(step)
        if policy.spread is not None and policy.score is not None and budget is not None and step.length > budget:
            table = Table(step.group, policy.over, step.q.device)
            table.store("score", policy.score(step, table))
    return [[step.group] for step in steps]


def _place(step: Step, policy: Policy) -> list[Group]:
    n, budget = held(step, policy), policy.budget(step)
    step.budget = budget
    due = budget is not None and n > 0 and (n - budget >= policy.every or step.first < policy.sorts)
    # A score that adds up over all queries (queries < 0) is owed to every forward; others only when they decide something.
    if not due and (policy.score is None or policy.score.queries >= 0):
        return [step.group]
    table = Table(step.group, policy.over, step.q.device)
    scores = None if policy.score is None else policy.score(step, table)
    if not due or budget is None:
        return [step.group]
    return apply(step, table, scores, budget, policy)


def _share(step: Step, policy: Policy, scores: Tensor, share: Tensor) -> list[Group]:
    """Heads that may keep equally many stay together."""
    sizes = share.unique().tolist()
    lists = [(share == size).nonzero()[:, 0] for size in sizes]
    groups = [step.group] if len(sizes) == 1 else step.group.split(lists)
    found = []
    for size, at, group in zip(sizes, lists, groups, strict=True):
        part = step if len(sizes) == 1 else step.of_heads(at, group)
        table = Table(group, policy.over, step.q.device)
        found += apply(part, table, scores[at], size, policy) if table.n > size else [group]
    return found


def apply(step: Step, table: Table, scores: Tensor | None, budget: int, policy: Policy) -> list[Group]:
    """Lets the placement route the slots of one group, and moves them."""
    if table.n > budget:
        for _, segment in table.parts:
            segment.own()
    route = policy.place(step, table, scores, budget)
    if isinstance(route, int):
        table.parts[0][1].drop_front(route)
        return [step.group]
    if isinstance(route, Away):
        _, segment = table.parts[0]
        slots = route.slots.expand(step.heads, -1)
        if route.into is not None and policy.merge is not None:
            _merge(segment, slots, route.into, policy.merge)
        if route.to != DROP:
            _move(step, table, segment, slots, route.to)
        segment.drop(slots)
        return [step.group]
    if route.shape[0] != step.heads:
        route = route.expand(step.heads, -1)
    return _route(step, table, route)


def _merge(segment: Segment, gone: Tensor, into: Tensor, merge: Merger) -> None:
    """The slots `gone` [h, r] are merged into the slots `into` [h, r], which stay; -1: into none."""
    r = gone.shape[1]
    ranked, order = into.sort(-1)
    rank = (ranked != F.pad(ranked[:, :-1], (1, 0), value=-1)).cumsum(-1) - 1  # which of the distinct ones; -1 for none
    # Heads have unequally many that absorb: the rest of the rectangle are slots that leave, which nothing reads again.
    at = F.pad(gone, (0, 1)).scatter_(1, rank.masked_fill(rank < 0, r), ranked)[:, : min(r, segment.n - r)]
    kept = segment.read(at)
    segment.write(at, merge(kept, segment.read(gone), torch.empty_like(rank).scatter_(1, order, rank)))


def held(step: Step, policy: Policy) -> int:
    return sum(step.group.segments[name].n for name in policy.over)


def _over(steps: list[Step], policy: Policy) -> tuple[int | None, int]:
    """The budget of a head, and how many slots all heads of the layer hold beyond theirs."""
    budget = policy.budget(steps[0])
    return budget, 0 if budget is None else sum(s.group.heads_of(s.site) * (held(s, policy) - budget) for s in steps)


def slack(steps: list[Step], policy: Policy | None) -> float:
    """How many single decoded tokens certainly need no `place` after these steps, one for each group of a layer."""
    if policy is None:
        return math.inf
    if (policy.score is not None and policy.score.queries < 0) or steps[0].length < policy.sorts:
        return 0
    if policy.allot is not None:
        budget, over = _over(steps, policy)
        return math.inf if budget is None else policy.every - 1 - math.ceil(over / steps[0].site.kv_heads)
    budgets = [(policy.budget(step), held(step, policy)) for step in steps]
    return min(math.inf if budget is None else policy.every - (n - budget) - 1 for budget, n in budgets)


def _route(step: Step, table: Table, route: Tensor) -> list[Group]:
    marks = _signature(step, table, route)
    if len(marks) > 1 and bool((marks != marks[0]).any()):
        _, which = torch.unique(marks, dim=0, return_inverse=True)
        lists = [(which == i).nonzero()[:, 0] for i in range(int(which.max()) + 1)]
        groups = []
        for at, group in zip(lists, step.group.split(lists), strict=True):
            groups += _route(step.of_heads(at, group), Table(group, table.over, table.device), route[at])
        return groups
    start = 0
    for name, segment in table.parts:
        part = route[:, start : start + segment.n]
        start += segment.n
        own = step.classes.index(name)
        if bool((part == own).all()):
            continue
        for to in part.unique().tolist():
            if to not in (own, DROP):
                _move(step, table, segment, _where(part == to), to)
        segment.keep(_where(part == own))
    return [step.group]


def _move(step: Step, table: Table, segment: Segment, slots: Tensor, to: int) -> None:
    """Puts slots [h, r] of a segment into class `to` as well."""
    rows, name = segment.read(slots), step.classes[to]
    if name not in table.over:  # what scorers remember is of no use there
        rows = replace(rows, cols={c: x for c, x in rows.cols.items() if c == "logw"})
    step.group.segments[name].append(rows, settled=True)


def _where(mask: Tensor) -> Tensor:
    """Positions of the True entries of [h, n], equally many in each row: [h, r]."""
    return (
        mask.nonzero()[:, 1].unflatten(0, (len(mask), -1)) if bool(mask.any()) else mask.new_zeros(len(mask), 0).long()
    )


def _signature(step: Step, table: Table, route: Tensor) -> Tensor:
    """How many slots of each stretch of each class go where, by head: heads that differ cannot share a rectangle."""
    counts, start = [], 0
    for name, segment in table.parts:
        part = route[:, start : start + segment.n]
        start += segment.n
        own = step.classes.index(name)
        stay = (part == own).cumsum(-1)
        counts += [stay[:, end - 1] for end in _borders(segment)]
        counts += [(part == to).sum(-1) for to in range(len(step.classes)) if to != own]
    return torch.stack(counts, -1)


def _borders(segment: Segment) -> list[int]:
    ends = set()
    for runs in (segment.key.runs, segment.value.runs):
        at = 0
        for run in runs:
            at += run.n
            ends.add(at)
    return sorted(ends)


def of_group(step: Step, group: Group) -> Step:
    """The step of one of the groups that its group became."""
    if step.group.heads_of(step.site) == group.heads_of(step.site):
        return replace(step, group=group)
    assert group.heads is not None
    held = step.group.heads
    return step.of_heads(group.heads if held is None else torch.searchsorted(held, group.heads), group)


def fit(step: Step, kept: bool = False) -> None:
    """Gives codecs the constants that they take from the first rows, before anything is encoded.

    Before anything is dropped, too, or, those that ask for it, after.
    """
    for segment in step.group.segments.values():
        for plane in (segment.key, segment.value):
            if plane.unfit and plane.codec.fits_kept == kept:
                main = step.group.segments["main"]
                x = (main.key if plane.which == "key" else main.value).dense(0, main.n).float()
                plane.const = {**plane.const, **plane.codec.fit(step, x)}
                plane.fitted = True


def freeze(group: Group, decoding: bool = False) -> None:
    """Encodes what is due in every segment, and brings what selectors remember up to date."""
    for segment in group:
        segment.settle(decoding)
        if segment.kind.select is not None:
            digested(segment, segment.kind.select)
