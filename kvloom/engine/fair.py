"""Orders for many clients: fair shares with cheap switches, and what is cached first without letting anybody wait for good."""

from __future__ import annotations

from typing import Any

from kvloom.engine.live import Live
from kvloom.engine.scheduler import Plan, Preempt, Scheduler

__all__ = ["FastSwitch", "KVShare"]


class FastSwitch(Scheduler):
    """FastSwitch (arXiv 2411.18424): who has had least goes first; others make room, and their caches swap out in long runs.

    A client is a salt, or a request without one. What it had are tokens: those of prompts once, those of answers twice, times one
    more than its priority if that is above zero. Who comes starts level with who has had least. Priorities change every `every`
    steps, so that caches don't move all the time. Needs a swap area; without one, prompts are fed again.
    """

    switches = True

    def __init__(self, rows: int = 512, most: int = 1024, mode: Preempt = "swap", every: int = 25) -> None:
        super().__init__(rows, most, mode)
        self.every = every
        self.had: dict[str, float] = {}
        self._level: dict[str, float] = {}  # what counts until the next change
        self._open: dict[str, int] = {}  # requests of each client
        self._known: set[Live] = set()
        self._steps = 0

    def key(self, r: Live) -> tuple[Any, ...]:
        who = _client(r)
        if r not in self._known:
            self._known.add(r)
            self._open[who] = self._open.get(who, 0) + 1
            if who not in self.had:
                self.had[who] = self._level[who] = min(self.had.values(), default=0.0)
        return (self._level[who], r.request.arrival)

    def ran(self, plan: Plan, seconds: float) -> None:
        for r, rows in plan.granted.items():
            if _client(r) in self.had:
                answer = r.answered > 0 and rows == 1
                self.had[_client(r)] += rows * (1 + answer) * (1 + max(0, r.request.priority))
        self._steps += 1
        if self._steps % self.every == 0:
            self._level = dict(self.had)

    def victim(self, r: Live, plan: Plan, live: list[Live]) -> Live:
        return max(live, key=self.key)

    def displace(self, r: Live, plan: Plan, live: list[Live]) -> Live | None:
        last = max(live, key=self.key, default=None)
        return last if last is not None and self.key(last)[0] > self.key(r)[0] else None

    def ended(self, r: Live) -> int:
        who = _client(r)
        self._known.discard(r)
        if who in self._open:
            self._open[who] -= 1
            if not self._open[who] and len(self._open) > 1:  # the last one's level is where the next one starts
                for held in (self._open, self.had, self._level):
                    held.pop(who, None)
        return 0


def _client(r: Live) -> str:
    return r.request.salt or r.request.id


class KVShare(Scheduler):
    """KVShare's order (arXiv 2503.16525): of those that wait, who has most of its prompt in the cache goes first.

    The bound on waiting is ours, the paper is known to us by its abstract: nobody is overtaken by more than `patience` requests
    that came later.
    """

    def __init__(self, rows: int = 512, most: int = 1024, mode: Preempt = "recompute", patience: int = 16) -> None:
        super().__init__(rows, most, mode)
        self.patience = patience
        self._passed: dict[Live, int] = {}  # of those that wait: how many later ones went before
        self._hits: dict[Live, tuple[int, float]] = {}

    def key(self, r: Live) -> tuple[Any, ...]:
        if not r.waiting:
            self._passed.pop(r, None)
            self._hits.pop(r, None)
            return (False, r.reading, 0, 0.0, r.request.priority, r.request.arrival)
        fresh = self._passed.setdefault(r, 0) < self.patience
        return (
            True,
            True,
            fresh,
            -self._hit(r) if fresh else 0.0,
            r.request.priority if fresh else 0,
            r.request.arrival,
        )

    def _hit(self, r: Live) -> float:
        """The share of the prompt that is kept."""
        if self.prefix is None:
            return 0.0
        held = self._hits.get(r)
        if held is None or held[0] != self.prefix.changes:
            found = self.prefix.length(r.space, r.tokens[: r.prompt]) / r.prompt
            held = self._hits[r] = (self.prefix.changes, found)
        return held[1]

    def admit(self, r: Live, plan: Plan, free: int) -> bool:
        if not super().admit(r, plan, free):
            return False
        for x in self._passed:
            if x is not r and x.request.arrival < r.request.arrival:
                self._passed[x] += 1
        return True

    def ended(self, r: Live) -> int:
        self._passed.pop(r, None)
        self._hits.pop(r, None)
        return 0
