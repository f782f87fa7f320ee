"""The thread that owns the engine, and the streams through which a server's event loop hears from it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kvloom.engine.metrics import Clock, Meter
from kvloom.engine.request import Finish, Output, Request
from kvloom.errors import KvloomError, RequestError

__all__ = ["Closed", "Engine", "Runner", "Stream"]

log = logging.getLogger("kvloom.engine")
FRESH = 0.1  # seconds between looks at the engine's numbers


class Closed(KvloomError):
    """Nothing is taken any more: the server shuts down, or the engine has failed."""


class Engine(Protocol):
    """What the runner asks of an engine. One thread calls it."""

    @property
    def busy(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, id: str) -> None: ...
    def step(self) -> list[Output]: ...
    def stats(self) -> dict[str, Any]: ...


class Stream:
    """What comes for some requests, for one reader: `async for outputs in stream`, each time all that came since."""

    def __init__(self, runner: Runner, requests: Sequence[Request]) -> None:
        self._runner = runner
        self.clocks = {request.id: Clock(request.arrival) for request in requests}
        self.open = set(self.clocks)
        self._came: list[Output] = []
        self._reader: asyncio.Future[None] | None = None

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[Output]:
        while not self._came:
            if not self.open:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        came, self._came = self._came, []
        return came

    def put(self, outputs: Sequence[Output]) -> None:
        """Called in the event loop."""
        self._came += [output for output in outputs if output.id in self.open]
        self.open -= {output.id for output in outputs if output.finish is not None}
        self._wake()

    def close(self) -> None:
        """Ends what is open: nobody wants it any more. Its memory is free after the step that runs. Harmless when done."""
        self._end(set(self.open), "abort")

    def enough(self, id: str) -> None:
        """Ends one request whose answer is complete."""
        self._end({id} & self.open, "stop")

    def _end(self, ids: set[str], finish: Finish) -> None:
        if ids:
            self.open -= ids
            self._runner.abort(self, ids, finish)
            self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Runner:
    """Steps the engine while there is something to do, and sleeps otherwise.

    Args:
        engine: nobody else may call it from `start` on.
        name: the model's, for the metrics.
    """

    def __init__(self, engine: Engine, name: str = "") -> None:
        self.engine = engine
        self.meter = Meter(name, self.stats)
        self.open: dict[str, Stream] = {}  # the loop's
        self.closing = False
        self.failed = ""  # why, if the thread ended by itself
        self._owners: dict[str, Stream] = {}  # the thread's
        self._jobs: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._stop = False
        self._stats, self._looked = engine.stats(), time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="kvloom-engine", daemon=True)

    def start(self) -> None:
        """Called in the event loop whose streams it feeds."""
        self._loop, self._idle = asyncio.get_running_loop(), asyncio.Event()
        self._idle.set()
        self._thread.start()

    def stats(self) -> Mapping[str, Any]:
        """The engine's numbers, at most a step old while it runs."""
        return self._stats

    async def submit(self, requests: Sequence[Request]) -> Stream:
        """Queues all of these, or none. Raises what the engine's `add` raises."""
        if self.closing or self.failed:
            raise Closed(self._why())
        assert self._loop is not None, "start() comes first"
        stream = Stream(self, requests)
        for request in requests:
            self.open[request.id] = stream
        self._watch()
        taken: asyncio.Future[None] = self._loop.create_future()
        self._post(lambda: self._add(stream, requests, taken))
        try:
            await taken
        except BaseException:
            if not taken.done() or taken.cancelled():  # the reader is gone, the engine may have them
                stream.close()
            self._forget(stream.clocks)
            raise
        return stream

    def abort(self, stream: Stream, ids: set[str], finish: Finish) -> None:
        """Ends requests of a stream; `finish` is what is counted. Called in the event loop."""
        now = time.monotonic()
        for id in ids:
            self.meter.saw(Output(id, finish=finish), stream.clocks[id], now)
        self._forget(ids)
        self._post(lambda: self._abort(ids))

    async def drain(self, seconds: float) -> bool:
        """Takes nothing new, waits for what runs, ends what is left then, and stops the thread. Whether all was answered."""
        self.closing = True
        done = True
        try:
            if self._idle is not None:
                await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            done = False
            for stream in set(self.open.values()):
                left = [Output(id, finish="abort", error="the server is shutting down") for id in stream.open]
                self._deliver([(stream, left)], time.monotonic())
        with self._wake:
            self._stop = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        return done

    # in the event loop

    def _post(self, job: Callable[[], None]) -> None:
        with self._wake:
            if not self.failed:
                self._jobs.append(job)
                self._wake.notify()
                return
        job()  # the thread has ended, nobody else calls the engine

    def _why(self) -> str:
        return f"the engine has failed: {self.failed}" if self.failed else "the server is shutting down"

    def _forget(self, ids: set[str] | Mapping[str, Any]) -> None:
        for id in ids:
            self.open.pop(id, None)
        self._watch()

    def _watch(self) -> None:
        if self._idle is not None:
            self._idle.clear() if self.open else self._idle.set()

    def _deliver(self, batch: list[tuple[Stream, list[Output]]], now: float) -> None:
        for stream, outputs in batch:
            for output in outputs:
                if output.id in stream.open:
                    self.meter.saw(output, stream.clocks[output.id], now)
                    if output.finish is not None:
                        self.open.pop(output.id, None)
            stream.put(outputs)
        self._watch()

    # in the thread

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._jobs or self._stop or self.engine.busy):
                        self._look()
                        self._wake.wait()
                    jobs, self._jobs = self._jobs, []
                    stop = self._stop
                for job in jobs:
                    job()
                if stop:
                    break
                if self.engine.busy:
                    self._step()
        except BaseException as error:
            log.exception("the engine's thread ended")
            with self._wake:
                self.failed = f"{type(error).__name__}: {error}"
                jobs, self._jobs = self._jobs, []
            for job in jobs:
                job()
            self._end(self.failed)
        else:
            self._abort(set(self._owners))
            self._look()

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            # What runs is lost, the server isn't: those that come next begin anew.
            log.exception("a step failed; the requests in it are ended")
            for id in list(self._owners):
                self.engine.abort(id)
            self._end(f"{type(error).__name__}: {error}")
            return
        now = time.monotonic()
        if now - self._looked > FRESH:
            self._look()
        batches: dict[Stream, list[Output]] = {}
        for output in outputs:
            stream = self._owners.get(output.id)
            if stream is not None:
                batches.setdefault(stream, []).append(output)
                if output.finish is not None:
                    del self._owners[output.id]
        if batches:
            self._call(self._deliver, list(batches.items()), now)

    def _end(self, why: str) -> None:
        """Tells all readers that there was an error."""
        ended = [(stream, [Output(id, finish="error", error=why)]) for id, stream in self._owners.items()]
        self._owners.clear()
        self._call(self._deliver, ended, time.monotonic())

    def _add(self, stream: Stream, requests: Sequence[Request], taken: asyncio.Future[None]) -> None:
        added = []
        try:
            if self.failed:
                raise Closed(self._why())
            for request in requests:
                self.engine.add(request)
                added.append(request.id)
                self._owners[request.id] = stream
        except Exception as error:
            self._abort(set(added))
            if not isinstance(error, (RequestError, Closed)):
                log.exception("a request could not be queued")
            self._call(_settle, taken, error)
        else:
            self._call(_settle, taken, None)

    def _abort(self, ids: set[str]) -> None:
        for id in ids:
            if self._owners.pop(id, None) is not None:
                self.engine.abort(id)

    def _look(self) -> None:
        self._stats, self._looked = self.engine.stats(), time.monotonic()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if not future.done():
        future.set_result(None) if error is None else future.set_exception(error)
