"""Who goes next, with how many rows, and who makes room. A policy is a class with a few hooks; the engine runs the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kvloom.engine.live import Live
from kvloom.engine.pace import Pace
from kvloom.engine.prefix import Prefix
from kvloom.errors import RequestError

__all__ = ["FCFS", "Plan", "Sarathi", "Scheduler"]

LEAST = 16  # rows of a prompt that are worth a step
Preempt = Literal["recompute", "swap", "squeeze"]


@dataclass
class Plan:
    """A step in the making: `granted` rows of each request, `rows` in all, those of prompts among them.

    `context`: tokens that decoding requests see; `pairs`: of a row of a prompt and what it sees.
    """

    granted: dict[Live, int] = field(default_factory=dict)
    rows: int = 0
    prompt_rows: int = 0
    context: int = 0
    pairs: int = 0
    running: int = 0  # requests that hold a sequence
    out: set[Live] = field(default_factory=set)  # who gave its sequence up in this step

    def grant(self, r: Live, rows: int) -> None:
        """Gives a request rows of this step."""
        self.granted[r] = rows
        self.rows += rows
        if r.reading:
            self.prompt_rows += rows
            self.pairs += pairs(r.length, rows)
        else:
            self.context += r.length

    @property
    def load(self) -> tuple[int, int, int, int]:
        """What the step takes its time for; see `Pace`."""
        return self.rows - self.prompt_rows, self.context, self.prompt_rows, self.pairs


def pairs(length: int, rows: int) -> int:
    """Of a row behind `length` tokens and what it sees."""
    return rows * length + rows * rows // 2


class Scheduler:
    """The hooks, first come first served: a request that was begun goes before one that waits.

    Args:
        rows: new tokens of a step, of all requests together.
        most: requests that hold a sequence at once.
        mode: what becomes of a sequence whose memory is needed: given up and fed again, swapped out, or compressed harder.
    """

    switches = False  # whether a request may begin in a step in which another one gave up its sequence
    offline = (
        False  # whether all requests are known: then nothing is kept but what `borders` says, as long as somebody runs
    )

    def __init__(self, rows: int = 512, most: int = 1024, mode: Preempt = "recompute") -> None:
        self.rows, self.most, self.mode = rows, most, mode
        self.prefix: Prefix | None = None  # the beginnings that are kept, once it is an engine's

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

    def borders(self, r: Live, borders: frozenset[int]) -> frozenset[int]:
        """At which of its borders the beginning of a prompt is kept."""
        return borders

    def ran(self, plan: Plan, seconds: float) -> None:
        """A step took so long."""

    def ended(self, r: Live) -> int:
        """A request has come to its end. Returns how long the beginning of its prompt is that nobody will ask for again; 0: none."""
        return 0

    def displace(self, r: Live, plan: Plan, live: list[Live]) -> Live | None:
        """Who gives up its sequence so that `r`, which waits, can begin; None: nobody."""
        return None

    def preempt(self, r: Live) -> Preempt:
        """How. What can't be done, such as to swap without a swap area or to squeeze twice, is "recompute"."""
        return "swap" if self.mode == "squeeze" and r.squeezed else self.mode


class FCFS(Scheduler):
    """Whole prompts first, as early engines did: decoding stalls while a prompt is read."""

    def key(self, r: Live) -> tuple[Any, ...]:
        return (not r.reading, *super().key(r))


class Sarathi(Scheduler):
    """Sarathi-Serve (arXiv 2403.02310): every step decodes for all that can, then fills up with parts of prompts.

    Args:
        rows: tokens of a step at most.
        stall: a step with prompts in it may take so many times as long as it would without; prompts get fewer rows then, as many as
            steps so far say. None: no bound. Where prompts are cut at fixed parts, one part is the least.
    """

    def __init__(
        self, rows: int = 512, most: int = 1024, mode: Preempt = "recompute", stall: float | None = None
    ) -> None:
        super().__init__(rows, most, mode)
        if stall is not None and not stall > 1:
            raise RequestError(f"stall={stall!r} must be more than 1, or None: prompts take time.")
        self.stall, self.pace = stall, Pace()

    def key(self, r: Live) -> tuple[Any, ...]:
        return (r.waiting, r.reading, r.request.priority, r.request.arrival)

    def want(self, r: Live, plan: Plan) -> int:
        rows = super().want(r, plan)
        decoding, context, *_ = plan.load
        if self.stall is None or not r.reading or not decoding or not rows:
            return rows
        if not self.pace.known:
            return min(rows, LEAST) if r.outline.free else rows
        allowed = self.stall * self.pace.seconds((decoding, context, 0, 0))
        least = 0 if plan.prompt_rows else min(rows, LEAST) if r.outline.free else rows
        while rows > least and allowed < self.pace.seconds(
            (decoding, context, plan.prompt_rows + rows, plan.pairs + pairs(r.length, rows))
        ):
            rows = max(least, rows * 7 // 8) if r.outline.free and rows > LEAST else least
        return rows

    def ran(self, plan: Plan, seconds: float) -> None:
        if self.stall is not None:
            self.pace.note(plan.load, seconds)
