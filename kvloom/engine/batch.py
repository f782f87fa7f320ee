"""BatchLLM (arXiv 2412.03594): a batch that is known beforehand, in the order that shares most.

All prompts form one tree. Of its nodes those are chosen that save most tokens if every prompt shares at most one beginning; the
members of such a group run together, its beginning is kept for as long as some wait for it, and groups that decode much for what
they read come first, so that what later ones read fills their steps.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from kvloom.engine.live import Live
from kvloom.engine.request import Request
from kvloom.engine.scheduler import Plan, Preempt, Scheduler

__all__ = ["BatchLLM", "Family", "families"]

GUESS = 256  # tokens of an answer without a limit, until some have ended


@dataclass
class Family:
    """Prompts, by their number, that share a beginning of `length` tokens; 0: a prompt by itself."""

    members: list[int]
    length: int = 0

    @property
    def saved(self) -> int:
        """Tokens that need not be computed again."""
        return (len(self.members) - 1) * self.length


@dataclass
class _Node:
    depth: int  # tokens from the root to its end
    first: int
    last: int  # its prompts, in sorted order: [first, last)
    children: list[_Node] = field(default_factory=list)


def families(prompts: List[List[int]], part: int = 1) -> list[Family]:
    """Groups of prompts with one shared beginning each, a multiple of `part` tokens, that save most tokens together.

    best(node) = max((prompts below - 1) * depth, sum of best(child)), on the tree of all prompts.
    """
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    texts = [prompts[i] for i in order]
    # what neighbours in sorted order share; the last token of a prompt is always computed
    shared = [min(_common(a, b), len(a) - 1, len(b) - 1) // part * part for a, b in pairwise(texts)]
    root = _tree(shared, len(texts))
    found = [Family([order[i] for i in range(a, b)], depth) for a, b, depth in _best(root)[1]]
    single = set(range(len(prompts))) - {i for family in found for i in family.members}
    return found + [Family([i]) for i in sorted(single)]


def _common(a: List[int], b: List[int]) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:  # as lists compare fast
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _tree(shared: list[int], n: int) -> _Node:
    """The inner nodes over n sorted prompts of which neighbours share so much."""
    root = _Node(0, 0, n)
    stack = [root]  # from the root to where we are
    for i, depth in enumerate(shared):
        last: _Node | None = None
        while stack[-1].depth > depth:
            last = stack.pop()
            last.last = i + 1
            if stack[-1].depth >= depth:
                stack[-1].children.append(last)
                last = None
        if stack[-1].depth < depth:
            stack.append(_Node(depth, i if last is None else last.first, n, [] if last is None else [last]))
    while len(stack) > 1:
        last = stack.pop()
        last.last = n
        stack[-1].children.append(last)
    return root


def _best(node: _Node) -> tuple[int, list[tuple[int, int, int]]]:
    """Tokens saved below a node, and the groups (first, last, depth) that save them."""
    parts = [_best(child) for child in node.children]
    apart, own = sum(saved for saved, _ in parts), (node.last - node.first - 1) * node.depth
    if own >= apart and own:
        return own, [(node.first, node.last, node.depth)]
    return apart, [group for _, groups in parts for group in groups]


class BatchLLM(Scheduler):
    """Runs requests that it was told of beforehand, in the order of `plan`.

    Args:
        rows: tokens of a step at most.
        most: requests that hold a sequence at once; memory is the bound that counts: one begins when its whole answer fits.
    """

    offline = True

    def __init__(self, rows: int = 1024, most: int = 1 << 20, mode: Preempt = "recompute") -> None:
        super().__init__(rows, most, mode)
        self.families: list[Family] = []
        self.shared: dict[str, int] = {}  # by id: tokens of its family's beginning
        self._at: dict[str, tuple[int, int]] = {}  # family and place in it
        self._left: list[int] = []
        self._leaders: dict[int, str] = {}  # of a family, who computes its beginning; "": it is there
        self._owed: dict[str, int] = {}  # bytes that those who run will still ask for
        self._answered = self._ended = 0

    def plan(self, requests: List[Request], part: int) -> list[Request]:
        """Takes a batch. Returns it in the order in which it will run."""
        found = families([request.tokens for request in requests], part)

        def ratio(family: Family) -> float:
            read = family.length + sum(len(requests[i].tokens) - family.length for i in family.members)
            return sum(requests[i].sampling.max_tokens or GUESS for i in family.members) / read

        found.sort(key=ratio, reverse=True)
        order: list[Request] = []
        for family in found:
            for i in family.members:
                self._at[requests[i].id] = (len(self.families), len(order))
                self.shared[requests[i].id] = family.length
                order.append(requests[i])
            self.families.append(family)
            self._left.append(len(family.members))
        return order

    def key(self, r: Live) -> tuple[Any, ...]:
        return (r.waiting, r.reading, self._at.get(r.request.id, (1 << 60, 0)), r.request.arrival)

    def want(self, r: Live, plan: Plan) -> int:
        family, place = self._at.get(r.request.id, (-1, 0))
        shared = self.shared.get(r.request.id, 0)
        if not r.waiting:
            self._owed[r.request.id] = r.outline.more(max(r.length, r.covered), r.prompt + self._expected(r))
            if shared and r.length >= shared:
                self._leaders[family] = ""
        rows = super().want(r, plan)
        if rows and shared and r.length < shared:
            leader = self._leaders.setdefault(family, r.request.id)
            if leader and leader != r.request.id and r.waiting:
                return 0  # somebody is computing the beginning
        return rows

    def admit(self, r: Live, plan: Plan, free: int) -> bool:
        """Memory is the bound, also for the rest of its answer and of those of all that run."""
        grows = r.outline.more(len(r.tokens), r.prompt + self._expected(r)) + sum(self._owed.values())
        return super().admit(r, plan, free) and (not plan.running or r.needs + grows <= free)

    def borders(self, r: Live, borders: frozenset[int]) -> frozenset[int]:
        """The beginning of its family; nothing else will be asked for again."""
        shared = self.shared.get(r.request.id)
        return borders if shared is None else frozenset((shared,)) if shared else frozenset()

    def ended(self, r: Live) -> int:
        id = r.request.id
        self._owed.pop(id, None)
        if id not in self._at:
            return 0
        family, _ = self._at.pop(id)
        self._answered += r.answered
        self._ended += 1
        self._left[family] -= 1
        if self._leaders.get(family) == id:
            del self._leaders[family]
        return self.shared.pop(id) if not self._left[family] else 0

    def _expected(self, r: Live) -> int:
        """Tokens that its answer will have: its limit, or, once some have ended, somewhat more than theirs had."""
        if self._ended < 8:
            return r.limit if r.request.sampling.max_tokens else min(r.limit, GUESS)
        return max(min(r.limit, self._answered * 5 // (4 * self._ended) + 1), min(r.limit, r.answered + 1))
