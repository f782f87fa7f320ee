"""Calls that end on time: a guard for each tier, and a queue for work that nobody waits for."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import TypeVar

from kvloom.errors import TierError
from kvloom.store.tier import Deadline, Tier, TierFull, TierTimeout

__all__ = ["Background", "Guard", "TierDown"]

T = TypeVar("T")
Job = tuple[Callable[[], object], "Future[object]"]


class TierDown(TierError):
    """A tier that failed several times in a row is left alone for a while."""


class Guard:
    """Calls a tier so that the caller is back by the deadline, whatever the tier does.

    Quick tiers are called at once, others by a few threads that may get stuck without harm. After `failures` errors or late
    answers in a row the tier is not called for `pause` seconds; then one call tries whether it is back.
    """

    def __init__(
        self,
        tier: Tier,
        failures: int = 3,
        pause: float = 5.0,
        workers: int = 4,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tier, self.failures, self.pause, self.clock = tier, failures, pause, clock
        self._lock = threading.Lock()
        self._failed, self._until = 0, 0.0
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._workers = workers

    def call(self, do: Callable[[Deadline], T], deadline: Deadline) -> T:
        """Raises TierError: what the tier raised, TierTimeout, or TierDown without having called it."""
        with self._lock:
            if self._failed >= self.failures:
                if self.clock() < self._until:
                    raise TierDown(f"{self.tier.name} failed {self._failed} times; not asked for {self.pause} s.")
                self._until = self.clock() + self.pause  # one caller tries, the others go on without
        try:
            result = do(deadline) if self.tier.quick else self._elsewhere(do, deadline)
        except TierFull:
            self._count(True)
            raise
        except TierError:
            self._count(False)
            raise
        except Exception as error:  # a tier that breaks must not break generation
            self._count(False)
            raise TierError(f"{self.tier.name}: {type(error).__name__}: {error}") from error
        self._count(True)
        return result

    def _count(self, good: bool) -> None:
        with self._lock:
            self._failed = 0 if good else self._failed + 1
            if self._failed == self.failures:
                self._until = self.clock() + self.pause

    def _elsewhere(self, do: Callable[[Deadline], T], deadline: Deadline) -> T:
        future: Future[T] = Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(do(deadline))
                except BaseException as error:
                    future.set_exception(error)

        with self._lock:
            if len(self._threads) < self._workers:
                thread = threading.Thread(target=self._work, name=f"kvloom {self.tier.name}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._jobs.put((job, future))  # type: ignore[arg-type]
        try:
            return future.result(deadline.left())
        except Late:
            future.cancel()
            raise TierTimeout(f"{self.tier.name}: no answer in time.") from None

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job[0]()

    def close(self) -> None:
        """Lets the threads go and closes the tier. One that is stuck stays so, and does not keep the process alive."""
        with self._lock:  # else one might be seen that is not started yet
            threads = list(self._threads)
        for _ in threads:
            self._jobs.put(None)
        for thread in threads:
            thread.join(0.5)
        self.tier.close()


class Background:
    """One thread that does jobs in order. A job that would be more than `size` waiting is refused."""

    def __init__(self, name: str, size: int) -> None:
        self.size = size
        self._jobs: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._busy = self._closed = False
        self._thread: threading.Thread | None = None
        self._name = name

    def offer(self, job: Callable[[], object]) -> bool:
        """False if the queue is full or closed. A job deals with its own errors."""
        with self._changed:
            if self._closed or len(self._jobs) >= self.size:
                return False
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return True

    def flush(self, seconds: float) -> bool:
        """Waits until nothing is left to do; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, seconds)

    def close(self, seconds: float) -> bool:
        """Flushes, then ends the thread; what is left after that time is not done."""
        done = self.flush(seconds)
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
        return done

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job, self._busy = self._jobs.popleft(), True
            try:
                job()
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
