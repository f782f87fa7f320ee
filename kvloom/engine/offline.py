"""Files of requests in OpenAI's batch format: read, answered in the order that shares most, written line by line."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import ValidationError

from kvloom.engine.answers import Answer, Entry
from kvloom.engine.ask import Desk, Order, Problem
from kvloom.engine.batch import BatchLLM
from kvloom.engine.engine import Engine
from kvloom.engine.protocol import Chat, Completion
from kvloom.errors import KvloomError, RequestError

__all__ = ["Line", "Results", "answered", "lines"]

WAITING = 256  # requests that the engine is told of ahead
URLS: dict[str, type[Chat | Completion]] = {"/v1/chat/completions": Chat, "/v1/completions": Completion}


@dataclass
class Line:
    """One request of a file. `texts`, `entries`: what its choices have said so far."""

    id: str
    order: Order
    answer: Answer
    texts: dict[str, str] = field(default_factory=dict)
    entries: dict[str, list[Entry]] = field(default_factory=dict)


class Results:
    """A file of results, one line for each request, each written at once. Opened again, it goes on behind what is whole."""

    def __init__(self, path: Path) -> None:
        self.done: set[str] = set()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1  # a line that was cut off is asked again
        os.ftruncate(self._file, whole)
        for number, text in enumerate(data[:whole].splitlines(), 1):
            try:
                self.done.add(json.loads(text)["custom_id"])
            except (ValueError, KeyError, TypeError) as error:
                os.close(self._file)
                raise KvloomError(f"{path}, line {number}, is no result of a batch. Give another --out.") from error

    def write(self, id: str, status: int, body: dict[str, Any]) -> None:
        """One request is done."""
        response = {"status_code": status, "request_id": uuid4().hex, "body": body}
        found = {"id": f"batch_req_{uuid4().hex}", "custom_id": id, "response": response, "error": None}
        os.write(self._file, (json.dumps(found) + "\n").encode())
        self.done.add(id)

    def close(self) -> None:
        os.close(self._file)


def lines(path: Path, desk: Desk, results: Results) -> Iterator[Line]:
    """Requests of a file that have no result yet; those that can't be served get theirs at once. KvloomError for a file of another format."""
    seen: set[str] = set()
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            given = json.loads(text)
            id, url, method, body = (given[name] for name in ("custom_id", "url", "method", "body"))
        except (ValueError, KeyError, TypeError) as error:
            raise KvloomError(
                f"{path}, line {number}: not of OpenAI's batch format, a JSON object with custom_id, method, url and body."
            ) from error
        if not isinstance(id, str) or id in seen:
            raise KvloomError(f"{path}, line {number}: custom_id={id!r} must be a text of its own.")
        seen.add(id)
        if id in results.done:
            continue
        try:
            if method != "POST" or url not in URLS:
                raise Problem(f"{method} {url} is not offered; POST to {' or '.join(URLS)}.", 404, "url")
            asked = URLS[url].model_validate(body)
            order = asyncio.run(desk.chat(asked) if isinstance(asked, Chat) else desk.completion(asked))
            yield Line(id, order, Answer(order, desk.words, url.endswith("chat/completions")))
        except Problem as error:
            results.write(id, error.status, _error(error.message, error.param, error.code))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            results.write(id, 400, _error(f"{where}: {first['msg']}", where))
        except RequestError as error:
            results.write(id, 400, _error(str(error)))


def answered(engine: Engine, todo: list[Line], results: Results, tell: Callable[[int], None]) -> None:
    """Answers all lines and writes what came of each. `tell` is told how many tokens came."""
    of: dict[str, Line] = {}
    for line in todo:
        for request in line.order.requests:
            of[request.id] = line
            line.texts[request.id], line.entries[request.id] = "", []
    requests = [request for line in todo for request in line.order.requests]
    if isinstance(engine.scheduler, BatchLLM):
        requests = engine.scheduler.plan(requests, engine.part)
    at = 0
    while at < len(requests) or engine.busy:
        while at < len(requests) and sum(r.waiting for r in engine.live.values()) < WAITING:
            request, at = requests[at], at + 1
            line = of[request.id]
            try:
                if line.id not in results.done:
                    engine.add(request)
            except RequestError as error:
                results.write(line.id, 400, _error(str(error)))
        tokens = 0
        for out in engine.step():
            tokens += out.token is not None
            line = of[out.id]
            choice = line.answer.choices[out.id]
            if not choice.open or line.id in results.done:
                continue
            text, entries = choice.push(out)
            line.texts[out.id] += text
            line.entries[out.id] += entries
            if out.finish is None and choice.finish is not None:
                engine.abort(out.id)  # a stop string came
            if not any(choice.open for choice in line.answer.choices.values()):
                failed = next((choice.error for choice in line.answer.choices.values() if choice.error), "")
                ids = [request.id for request in line.order.requests]
                body = line.answer.whole([line.texts[i] for i in ids], [line.entries[i] for i in ids])
                results.write(line.id, 500 if failed else 200, _error(failed, kind="server_error") if failed else body)
        tell(tokens)


def _error(
    message: str, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error"
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
