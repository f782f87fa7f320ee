"""One server, from a model's name to its end."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import transformers
import uvicorn

from kvloom.core.registry import parse
from kvloom.engine.ask import Served
from kvloom.engine.engine import Engine
from kvloom.engine.runner import Runner
from kvloom.engine.scheduler import Sarathi
from kvloom.engine.server import create_app
from kvloom.lab.chat import stops_of
from kvloom.lab.measure import load_model
from kvloom.store import Store
from kvloom.store.tier import Address

__all__ = ["Draining", "Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """What `kvloom serve` was asked for. `memory`, `body`: bytes; `note`: why so much memory; `line`: it listens already."""

    model: str
    cache: str
    allowed: Sequence[str]
    memory: int
    note: str
    context: int | None
    names: Sequence[str]
    key: str
    most: int
    body: int
    chunk: int
    part: int
    drain: float
    adapters: Mapping[str, str]
    store: Sequence[str]
    line: socket.socket
    tell: Callable[[str], None]


class Draining(uvicorn.Server):
    """Lets the engine finish when it is stopped, and tells the clients of what it could not."""

    def __init__(self, config: uvicorn.Config, runner: Runner, seconds: float) -> None:
        super().__init__(config)
        self._runner, self._seconds = runner, seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drained = asyncio.ensure_future(self._runner.drain(self._seconds))
        await super().shutdown(sockets)
        await drained


def run(settings: Settings) -> None:
    """Loads the model, serves it, and returns when it was stopped. Raises KvloomError for what can't be served."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for recipe in (settings.cache, *settings.allowed):
        parse(recipe)  # before a model is loaded
    with Store.open(*settings.store) if settings.store else nullcontext() as store:
        _serve(settings, store)


def _serve(settings: Settings, store: Store | None) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load_model(settings.model)
    engine = Engine(
        model,
        settings.cache,
        memory=settings.memory,
        context=settings.context,
        part=settings.part,
        scheduler=Sarathi(rows=settings.chunk),
        allowed=settings.allowed,
        adapters=settings.adapters,
        store=store,
    )
    served = Served(
        names=settings.names,
        tokenizer=tokenizer,
        vocabulary=engine.vocabulary,
        context=engine.context,
        ends=stops_of(model, tokenizer),
        recipe=settings.cache,
        allowed=settings.allowed,
        adapters=settings.adapters,
    )
    runner = Runner(engine, settings.names[0])
    app = create_app(
        runner,
        served,
        key=settings.key,
        most=settings.most,
        body=settings.body,
        drain=settings.drain,
        tiers=None if store is None else partial(_tiers, store),
    )
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=int(settings.drain) + 5
    )
    _greet(settings, served)
    try:
        Draining(config, runner, settings.drain).run(sockets=[settings.line])
    finally:
        engine.close()


def _tiers(store: Store) -> dict[str, int]:
    """Bytes that each tier holds, of those that answer."""
    return {name: held["nbytes"] or 0 for name, held in store.stat().items() if "nbytes" in held}


def _greet(settings: Settings, served: Served) -> None:
    host, port = settings.line.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    more = f", on demand {', '.join(settings.allowed)}" if settings.allowed else ""
    try:
        settings.tell(f"kvloom {version('kvloom')}: {settings.names[0]}, context {served.context:,} tokens")
    except PackageNotFoundError:
        settings.tell(f"kvloom: {settings.names[0]}, context {served.context:,} tokens")
    if settings.adapters:
        settings.tell(f"{len(settings.adapters):,} adapters")
    if settings.store:
        settings.tell(f"beginnings are kept in {', '.join(Address.parse(url).shown for url in settings.store)}")
    settings.tell(f"cache {settings.cache}{more}; KV memory {settings.memory / 2**30:.2f} GiB ({settings.note})")
    if host not in ("127.0.0.1", "::1") and not settings.key:
        settings.tell(f"Whoever reaches {host} can use it: there is no --api-key.")
    settings.tell(f"{url}/v1 for OpenAI clients, {url}/ to watch, {url}/metrics for Prometheus")
