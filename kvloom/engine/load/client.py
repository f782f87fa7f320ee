"""One streamed completion at a time, timed where its bytes arrive."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from kvloom.engine.load.http import Malformed, Parts, Pool
from kvloom.errors import KvloomError

__all__ = ["Client", "Record", "Server"]

Prompt = str | list[int]


@dataclass
class Record:
    """What became of a request. Times in seconds: `at` since the run's start, the others since the request was sent.

    `late`: behind the time it was due. `arrivals`: of what carried tokens, in turn. `tokens`, `prompt`, `cached`: as the
    server counted them; where it doesn't count, `tokens` are the arrivals and the others None. `error`: its kind.
    """

    at: float
    late: float = 0.0
    wanted: int = 0
    arrivals: list[float] = field(default_factory=list)
    took: float = 0.0
    tokens: int = 0
    prompt: int | None = None
    cached: int | None = None
    text: str = ""
    error: str = ""
    detail: str = ""

    @property
    def first(self) -> float:
        """Time to the first token."""
        return self.arrivals[0]

    @property
    def gap(self) -> float:
        """Mean time between tokens; 0 for an answer of one."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.tokens - 1)


@dataclass(frozen=True)
class Server:
    """What a server said about itself. `limit`: tokens it takes; None: it doesn't say. `ids`: takes prompts of token ids.
    `unending`: takes `ignore_eos`, so that answers have the length asked for.
    """

    model: str
    limit: int | None
    ids: bool
    unending: bool


class _Refused(Exception):
    """A request did not give a stream. The kind, and what the server said."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, " ".join(detail.split())[:300]


def _events(parts: Parts) -> Iterator[tuple[float, bytes]]:
    """Data of server-sent events, each with the time at which its line was complete."""
    rest, at = b"", 0.0
    for at, part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield from ((at, line[5:].strip()) for line in lines if line.startswith(b"data:"))
    if rest.startswith(b"data:"):
        yield at, rest[5:].strip()


def _carries(choice: dict[str, Any]) -> bool:
    """Whether an event brought a token. Its text may be empty, where it is but part of a letter."""
    return bool(choice.get("text")) or choice.get("finish_reason") is None


class Client:
    """Talks to the server at `url`; use it as an asynchronous context. `seconds`: that a request may take.

    `extra`: fields put into each request's body; None takes one out.
    """

    def __init__(
        self, url: str, *, model: str | None = None, key: str | None = None, seconds: float = 600.0,
        extra: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if (
            not valid
            or parts.query
            or parts.fragment
            or parts.username
            or not parts.path.isprintable()
            or " " in parts.path
        ):
            raise KvloomError(f"{url!r} is no address of a server. Give one such as http://127.0.0.1:8000.")
        path = parts.path.rstrip("/")
        self._path = path if path.endswith("/v1") else path + "/v1"
        self.base = f"{parts.scheme}://{parts.netloc}{self._path}"
        self.model, self.seconds, self.extra = model, seconds, extra or {}
        headers = [("Accept-Encoding", "identity"), ("User-Agent", "kvloom")]
        headers += [("Authorization", f"Bearer {key}")] if key else []
        try:
            self._pool = Pool(parts, headers)
        except ValueError as error:
            raise KvloomError(f"--api-key or the address {url!r}: {error}.") from error
        self._unending = True

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._pool.close()

    async def look(self, prompts: Sequence[Prompt]) -> Server:
        """Asks the server for its model and limit, then for one token, to see which of these prompts it takes.

        Raises KvloomError if it can't be reached, or refuses each.
        """
        limit = None
        try:
            async with asyncio.timeout(self.seconds):
                answer = await self._pool.request("GET", f"{self._path}/models")
            known = json.loads(answer.body)["data"] if answer.status == 200 else []
            chosen = next((m for m in known if m.get("id") == self.model), None) or (known[0] if known else {})
            self.model = self.model or chosen.get("id")
            limit = chosen.get("max_model_len")
        except (OSError, Malformed) as error:
            raise KvloomError(f"{self.base} does not answer ({error or type(error).__name__}). Is it up?") from error
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # its list of models is of another form
        if self.model is None:
            raise KvloomError(f"{self.base}/models names no model: give --model NAME.")
        said: dict[str, str] = {}
        for self._unending in (True, False):
            for prompt in prompts:
                record = await self.ask(prompt, 1)
                if not record.error:
                    ids = not isinstance(prompt, str)
                    return Server(self.model, limit if isinstance(limit, int) else None, ids, self._unending)
                said[f"{record.error} {record.detail}"] = ""
        raise KvloomError(f"{self.base} refuses the simplest request: {'; '.join(said)[:600]}")

    async def ask(self, prompt: Prompt, tokens: int, *, at: float = 0.0, late: float = 0.0) -> Record:
        """One streamed answer of `tokens` tokens. Never raises what a server can cause."""
        record = Record(at, late, tokens)
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        body |= {"stream_options": {"include_usage": True}} | ({"ignore_eos": True} if self._unending else {})
        body = {name: value for name, value in (body | self.extra).items() if value is not None}
        content = json.dumps(body, separators=(",", ":")).encode()
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self.seconds):
                answer = await self._pool.request("POST", f"{self._path}/completions", content)
            record.took = time.perf_counter() - start
            if answer.status != 200:
                raise _Refused(f"HTTP {answer.status}", answer.body[:4096].decode(errors="replace"))
            if "event-stream" not in (kind := answer.headers.get("content-type", "")):
                raise _Refused("no stream", f"an answer of type {kind!r}")
            self._read(record, answer.parts, start)
        except TimeoutError:
            record.error, record.detail = "timeout", f"no end within {self.seconds:g} s"
        except _Refused as refused:
            record.error, record.detail = refused.kind, refused.detail
        except (Malformed, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            record.error, record.detail = "unreadable", f"{type(error).__name__}: {error}"[:300]
        except ConnectionRefusedError as error:
            record.error, record.detail = "no connection", str(error)
        except OSError as error:
            record.error, record.detail = "broken off", f"{type(error).__name__} {error}".strip()
        record.took = record.took or time.perf_counter() - start
        return record

    @staticmethod
    def _read(record: Record, parts: Parts, start: float) -> None:
        ended, text, counted = False, [], None
        for at, data in _events(parts):
            if data == b"[DONE]":
                ended = True
                continue
            event = json.loads(data)
            if "error" in event:
                raise _Refused("error in the stream", json.dumps(event["error"]))
            if usage := event.get("usage"):
                counted, record.prompt = int(usage["completion_tokens"]), int(usage["prompt_tokens"])
                record.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            for choice in event.get("choices") or ():
                ended = ended or choice.get("finish_reason") is not None
                if _carries(choice):
                    record.arrivals.append(at - start)
                    text.append(choice.get("text") or "")
        record.text, record.tokens = "".join(text), len(record.arrivals) if counted is None else counted
        if not ended:
            raise _Refused("cut short", f"the stream ended behind {len(record.arrivals)} tokens, without saying so")
        if not record.arrivals:
            raise _Refused("no token", "the answer is empty")
