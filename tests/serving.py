"""A server for tests: uvicorn in a thread, over the engine or over a toy that answers by a rule."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from kvloom.engine.ask import Served
from kvloom.engine.request import Output, Request
from kvloom.engine.runner import Runner
from kvloom.engine.server import create_app
from kvloom.errors import Full, RequestError
from tests.servers import free_port

TOY = 4099  # tokens of its vocabulary


class Toy:
    """Answers with the prompt, again and again. A step takes `pause` seconds, and none is made while `go` is cleared."""

    def __init__(self, pause: float = 0.0, queue: int = 10_000, fails: int = 0) -> None:
        self.pause, self.queue, self.fails = pause, queue, fails
        self.live: dict[str, tuple[Request, int]] = {}
        self.aborted: list[str] = []
        self.go = threading.Event()
        self.go.set()
        self.steps = self.told = 0

    @property
    def busy(self) -> bool:
        return bool(self.live)

    def add(self, request: Request) -> None:
        if request.salt == "refuse":
            raise RequestError("this salt is refused")
        if len(self.live) >= self.queue:
            raise Full("the queue is full")
        self.live[request.id] = (request, 0)

    def abort(self, id: str) -> None:
        self.aborted.append(id)
        self.live.pop(id, None)

    def step(self) -> list[Output]:
        self.go.wait(20)
        time.sleep(self.pause)
        self.steps += 1
        if self.steps == self.fails:
            raise RuntimeError("out of luck")
        out = []
        for id, (request, n) in list(self.live.items()):
            s = request.sampling
            token = request.tokens[n % len(request.tokens)]
            finish = "stop" if token in s.stop and n >= s.min_tokens else "length" if n + 1 == s.max_tokens else None
            logprob = None if s.logprobs is None else -0.5
            top = () if s.logprobs is None else tuple((token + i, -0.5 - i) for i in range(s.logprobs))
            out.append(Output(id, token, logprob, top, finish, cached=len(request.tokens) // 2))
            self.live[id] = (request, n + 1)
            if finish:
                del self.live[id]
        self.told += len(out)
        return out

    def stats(self) -> dict[str, Any]:
        return {
            "running": len(self.live), "waiting": 0, "preempted": 0, "kv_bytes": 100 * len(self.live), "kv_limit": 1000,
            "bytes_by_kind": {"full": 100 * len(self.live)}, "prefix_queries": 8, "prefix_hits": 4,
            "prompt_tokens": 5, "generated_tokens": self.told, "steps": self.steps,
        }  # fmt: skip


@dataclass
class Site:
    """Where a server listens, and what it runs."""

    url: str
    runner: Runner
    server: uvicorn.Server
    thread: threading.Thread = field(repr=False)

    def until(self, true: Any, seconds: float = 10) -> None:
        """Waits for something that another thread does."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.005)


@contextlib.contextmanager
def serving(engine: Any, served: Served, **options: Any) -> Iterator[Site]:
    """A server on a port of this machine."""
    port = free_port()
    runner = Runner(engine, served.names[0])
    app = create_app(runner, served, **options)
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=20)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    site = Site(f"http://127.0.0.1:{port}", runner, server, thread)
    site.until(lambda: server.started or not thread.is_alive(), 30)
    try:
        yield site
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
