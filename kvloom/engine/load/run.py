"""Sends requests: each when it is due, whatever became of the others, or so many at a time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Sequence

from kvloom.engine.load.client import Client, Prompt, Record
from kvloom.engine.load.work import Ask

__all__ = ["closed_loop", "open_files", "open_loop"]

Render = Callable[[Ask], Prompt]
Tell = Callable[[int, Record | None], None]


def _quiet(_: int, __: Record | None) -> None:
    pass


def open_files(streams: int) -> None:
    """Lets this process have as many connections, if the system does."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows; not beyond what is allowed
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = streams + 256
        if soft != resource.RLIM_INFINITY and soft < wanted:
            allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


async def closed_loop(
    client: Client, asks: Sequence[Ask], render: Render, together: int, tell: Tell = _quiet
) -> list[Record]:
    """`together` streams; each sends its next request when its last one has ended. `tell` gets how many run, and the
    record of one that ended. Interrupted, it gives the records that are there.
    """
    records: list[Record] = []
    left, running, start = iter(asks), 0, time.perf_counter()

    async def worker() -> None:
        nonlocal running
        for ask in left:
            running += 1
            tell(running, None)
            prompt = render(ask)
            record = await client.ask(prompt, ask.output, at=time.perf_counter() - start)
            running -= 1
            records.append(record)
            tell(running, record)

    tasks = [asyncio.create_task(worker()) for _ in range(min(together, len(asks)))]
    await _all(tasks)
    return records


async def open_loop(client: Client, asks: Sequence[Ask], render: Render, tell: Tell = _quiet) -> list[Record]:
    """Each request at its time. A record's `late` says how far behind it this process was: its server's times are off
    by as much. For the rest see `closed_loop`.
    """
    records: list[Record] = []
    tasks: set[asyncio.Task[None]] = set()
    start = time.perf_counter() + 0.01

    async def one(ask: Ask) -> None:
        prompt = render(ask)
        at = time.perf_counter() - start
        record = await client.ask(prompt, ask.output, at=at, late=max(0.0, at - ask.at))
        records.append(record)
        tell(len(tasks) - 1, record)

    async def all_of_them() -> None:
        for i, ask in enumerate(asks):
            wait = start + ask.at - time.perf_counter()
            if wait > 0 or i % 16 == 0:  # arrivals that are due together don't keep streams from being read
                await asyncio.sleep(max(0.0, wait))
            task = asyncio.create_task(one(ask))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            tell(len(tasks), None)

    await _all([asyncio.create_task(all_of_them())], tasks)
    await _all(tasks)
    return records


async def _all(tasks: Collection[asyncio.Task[None]], others: Collection[asyncio.Task[None]] = ()) -> None:
    """Waits for the tasks. Interrupted, ends them and the others."""
    try:
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        for task in (*tasks, *others):
            task.cancel()
        await asyncio.gather(*tasks, *others, return_exceptions=True)
