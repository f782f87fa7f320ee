"""How the engine gives requests memory, and takes it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvloom.engine.adapters import Adapters
from kvloom.engine.live import Live
from kvloom.engine.pool import Pool
from kvloom.engine.prefix import Prefix
from kvloom.engine.request import Finish, Output
from kvloom.engine.scheduler import Plan, Scheduler
from kvloom.engine.sequence import Outline, Sequence
from kvloom.engine.swap import Swap, buffers
from kvloom.errors import KvloomError

if TYPE_CHECKING:
    from kvloom.engine.shelf import Shelf

__all__ = ["Memory"]

QUANTUM = 64  # decoded tokens for which memory is promised at once


class Memory:
    """The part of an engine that begins requests, lets them grow and puts them out."""

    pool: Pool
    prefix: Prefix | None
    adapters: Adapters
    scheduler: Scheduler
    swap: Swap | None
    live: dict[str, Live]
    usual: Outline  # of requests that ask for no recipe
    harder: Outline | None
    shelf: Shelf | None
    part: int
    _ready: list[Output]
    _counts: dict[str, Any]

    def _end(self, r: Live, finish: Finish, error: str = "") -> Output:
        raise NotImplementedError

    def _begin(self, r: Live, plan: Plan) -> bool:
        """Gives a request a sequence, which holds what is kept of its prompt, if there is memory for all that it will be fed."""
        if plan.out and not self.scheduler.switches:
            return False
        tokens, sequence = r.tokens[: r.prompt], r.parked
        if sequence is not None and self.swap is not None:
            length, back = sequence.length, self.swap.nbytes(x for x, _ in buffers(sequence))
        else:
            length, sequence = self.prefix.find(r.space, tokens) if self.prefix is not None else (0, None)
            back = 0
        if sequence is not None:
            self.pool.hold(r, sequence.storages())  # so that no other one's leaving takes it away
        r.shares = length > 0 and r.parked is None
        more = r.growth(length if r.parked or r.outline.chains else 0, len(r.tokens))
        r.needs = back + more + self.adapters.needs(r.request.adapter)
        while not self.scheduler.admit(r, plan, self.pool.free):
            kept = self.scheduler.offline and plan.running
            if r.needs > self.pool.free and not kept and self._spare(r):
                continue
            others = [x for x in self.live.values() if not x.waiting and x not in plan.granted]
            victim = self.scheduler.displace(r, plan, others)
            if victim is None:
                if sequence is not None and r.parked is None:
                    self.pool.drop(r)
                return False
            self._preempt(victim, plan)
        if r.request.adapter:
            try:
                r.adapter = self.adapters.load(r.request.adapter).digest
            except KvloomError as error:
                self._ready.append(self._end(r, "error", error=str(error)))
                return False
        if r.parked is not None and self.swap is not None:
            self.swap.back(x for x, _ in buffers(r.parked))
        r.sequence, r.parked = sequence or Sequence(r.outline), None
        r.covered = len(r.tokens)
        if self.prefix is not None:
            found = self.prefix.borders(r.space, tokens, r.outline.chains)
            r.marks = frozenset() if r.squeezed else self.scheduler.borders(r, found)
        self.pool.hold(r, r.sequence.storages(), more)
        plan.running += 1
        if r.cached is None:
            r.cached = length
            self._counts["prefix_queries"] += r.prompt
            self._counts["prefix_hits"] += length
        if self.shelf is not None and not back and not r.squeezed:
            self.shelf.fetch(r, (len(tokens) - 1) // self.part * self.part)
        return True

    def _spare(self, r: Live) -> bool:
        """Frees something that no running request needs: adapters, which are read again sooner than a beginning is computed, then
        kept beginnings, then what others that wait have in memory still.
        """
        busy = {r.request.adapter, *(x.request.adapter for x in self.live.values() if not x.waiting)}
        if self.adapters.evict(busy) or (self.prefix is not None and self.prefix.evict()):
            return True
        for x in sorted(self.live.values(), key=self.scheduler.key, reverse=True):
            if x.parked is not None and x is not r and self.pool.alone(x):
                free = self.pool.free
                if self._park(x) and self.pool.free > free:
                    return True
        others = [x for x in self.live.values() if x is not r and not (x.waiting and x.parked is None)]
        if not others or any(not x.waiting for x in others):
            return False
        self._forget(max(others, key=self.scheduler.key))  # nobody runs who would make room
        return True

    def _room(self, r: Live, rows: int, plan: Plan) -> bool:
        """Makes sure that memory for these rows is promised; others, or `r` itself, give up theirs if need be."""
        assert r.sequence is not None
        if r.length + rows <= r.covered:
            return True
        upto = min(r.length + QUANTUM, r.prompt + r.limit)
        self.pool.hold(r, r.sequence.storages())
        while self.pool.free < (needs := r.growth(r.length, upto)):
            if self._spare(r):
                continue
            others = [x for x in self.live.values() if not x.waiting and x not in plan.granted]
            victim = self.scheduler.victim(r, plan, others)
            if victim is r and self.shelf is not None and self.shelf.jobs:
                return False  # what is being written will give its memory back
            how = self._preempt(victim, plan)
            if victim is r and how != "squeeze":
                if len(others) == 1 and not plan.granted:
                    why = f"out of KV memory at {r.length} tokens, with {self.pool.limit:,} bytes for all caches."
                    self._ready.append(self._end(r, "error", error=why))
                return False
        self.pool.promise(r, needs)
        r.covered = upto
        return True

    def _preempt(self, r: Live, plan: Plan) -> str:
        """Takes memory from a request that runs, in the way that the scheduler wants, or in one that is possible. Returns which."""
        how = self.scheduler.preempt(r)
        r.preempted += 1
        self._counts["preempted"] += 1
        idle = r.loading is None  # else somebody reads what it holds
        if idle and how == "squeeze" and self._squeeze(r):
            return how
        plan.out.add(r)
        plan.running -= 1
        r.parked, r.sequence, r.covered = r.sequence, None, 0
        if self.shelf is not None:
            self.shelf.leave(r)
        if idle and how == "swap" and self._park(r):
            self._counts["swapped"] += 1
            return how
        self._forget(r)
        return "recompute"

    def _park(self, r: Live) -> bool:
        """What a waiting request alone has in memory leaves for the swap area. False if there is no room."""
        assert r.parked is not None
        if self.swap is None:
            return False
        self.pool.hold(r, r.parked.storages())
        alone = self.pool.alone(r)
        done = self.swap.out(x for x in buffers(r.parked) if x[0].data.untyped_storage().data_ptr() in alone)
        self.pool.hold(r, r.parked.storages())
        return done

    def _forget(self, r: Live) -> None:
        """A waiting request will be fed from its beginning again."""
        r.parked = None
        self.pool.drop(r)

    def _squeeze(self, r: Live) -> bool:
        """Compresses what a running request holds harder, once. False if that can't be."""
        if self.harder is None or r.squeezed or r.outline is not self.usual or not r.length:
            return False
        assert r.sequence is not None
        r.sequence, r.outline, r.squeezed = r.sequence.squeezed(self.harder), self.harder, True
        r.marks, r.covered = frozenset(), r.length
        self.pool.hold(r, r.sequence.storages())
        self._counts["squeezed"] += 1
        return True
