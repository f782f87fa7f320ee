"""Who goes next, with how many rows, and who makes room. A policy is a class with five hooks; the engine runs the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kvloom.engine.live import Live

__all__ = ["FCFS", "Plan", "Sarathi", "Scheduler"]

Preempt = Literal["recompute", "swap"]


@dataclass
class Plan:
    """A step in the making: `granted` rows of each request, `rows` in all, those of prompts among them."""

    granted: dict[Live, int] = field(default_factory=dict)
    rows: int = 0
    prompt_rows: int = 0
    running: int = 0  # requests that hold a sequence
    out: set[Live] = field(default_factory=set)  # who gave its sequence up in this step

    def grant(self, r: Live, rows: int) -> None:
        """Gives a request rows of this step."""
        self.granted[r] = rows
        self.rows += rows
        self.prompt_rows += rows if r.reading else 0


class Scheduler:
    """The hooks, first come first served: a request that was begun goes before one that waits.

    Args:
        rows: new tokens of a step, of all requests together.
        most: requests that hold a sequence at once.
    """

    def __init__(self, rows: int = 512, most: int = 1024) -> None:
        self.rows, self.most = rows, most

    def key(self, r: Live) -> tuple[Any, ...]:
        """The order in which requests are asked what they want; less goes first."""
        return (r.waiting, r.request.priority, r.request.arrival)

    def want(self, r: Live, plan: Plan) -> int:
        """Rows for this request in this step: 0, if it must wait for the next."""
        rows = r.rows(self.rows - plan.rows)
        if plan.rows + rows <= self.rows or not plan.rows:
            return rows
        return rows if not r.reading else 0

    def admit(self, r: Live, plan: Plan, free: int) -> bool:
        """Whether a waiting request may begin, with so many bytes free."""
        return plan.running < self.most and r.needs <= free

    def victim(self, r: Live, plan: Plan, live: list[Live]) -> Live:
        """Who gives up its sequence so that `r` can go on; may be `r`. `live`: those that hold one and are not in the plan."""
        return max(live, key=lambda x: (x.request.priority, x.request.arrival))

    def preempt(self, r: Live) -> Preempt:
        """How."""
        return "recompute"


class FCFS(Scheduler):
    """Whole prompts first, as early engines did: decoding stalls while a prompt is read."""

    def key(self, r: Live) -> tuple[Any, ...]:
        return (not r.reading, *super().key(r))


class Sarathi(Scheduler):
    """Sarathi-Serve (arXiv 2403.02310): every step decodes for all that can, then fills up with parts of prompts.

    Args:
        rows: tokens of a step at most.
        stall: a step with prompts in it may take so many times as long as one without; prompts get fewer rows then. None: no bound.
    """

    def __init__(self, rows: int = 512, most: int = 1024, stall: float | None = None) -> None:
        super().__init__(rows, most)
        self.stall = stall

    def key(self, r: Live) -> tuple[Any, ...]:
        return (r.waiting, r.reading, r.request.priority, r.request.arrival)
