"""As much of HTTP/1.1 as a load tool needs: bytes are kept with the time at which they came, and looked at afterwards.

A general client takes its parser, locks and timeouts a turn for each token. On one machine httpx spent 0.28 ms of CPU time on a
token and this 0.06 ms: with a thousand streams, and cores shared with the server, that is between measuring the tool and it.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from urllib.parse import SplitResult

__all__ = ["Answer", "Malformed", "Pool"]

MOST = 64 << 20  # bytes of an answer
Parts = list[tuple[float, bytes]]


class Malformed(Exception):
    """What came is no HTTP/1.1, or too long."""


@dataclass
class Answer:
    """`parts`: the body, with the time at which each part of it had come. `whole`: whether its end was seen."""

    status: int
    headers: dict[str, str]
    parts: Parts
    whole: bool

    @property
    def body(self) -> bytes:
        return b"".join(part for _, part in self.parts)


def _head(data: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = data.decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
        raise Malformed(f"not HTTP/1.1: {first[:80]!r}")
    named = (line.partition(":") for line in lines)
    return int(words[1]), {name.strip().lower(): value.strip() for name, _, value in named}


def _chunks(data: bytes, start: int) -> tuple[list[tuple[int, int]], bool]:
    """Where the chunks of a chunked body are, and whether the last one is there."""
    found: list[tuple[int, int]] = []
    at = start
    while (line := data.find(b"\r\n", at, at + 64)) >= 0:
        try:
            size = int(data[at:line].split(b";")[0], 16)
        except ValueError:
            raise Malformed(f"no size of a chunk: {data[at:line]!r}") from None
        if size < 0:
            raise Malformed(f"no size of a chunk: {data[at:line]!r}")
        if size == 0:
            return found, data.find(b"\r\n", line + 2) >= 0
        begin = line + 2
        if begin + size + 2 > len(data):
            if begin < len(data):
                found.append((begin, min(begin + size, len(data))))
            return found, False
        found.append((begin, begin + size))
        at = begin + size + 2
    return found, False


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.parts: Parts = []
        self.held = self.length = self.body = 0  # bytes that came, that the body has, where it begins
        self.status, self.headers = 0, dict[str, str]()
        self.done: asyncio.Future[None] | None = None
        self.transport: asyncio.Transport | None = None
        self.closed, self.used = False, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.parts.append((time.perf_counter(), data))
        self.held += len(data)
        try:
            complete = self._complete(data)
        except (Malformed, ValueError) as error:
            self._end(error if isinstance(error, Malformed) else Malformed(str(error)))
            return
        if complete:
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(error) if error is not None else self.done.set_result(None)

    def _complete(self, data: bytes) -> bool:
        if self.held > MOST:
            raise Malformed(f"more than {MOST:,} bytes")
        if not self.body:
            came = b"".join(part for _, part in self.parts)
            end = came.find(b"\r\n\r\n")
            if end < 0:
                if self.held > 1 << 16:
                    raise Malformed("headers without an end")
                return False
            self.status, self.headers = _head(came[:end])
            self.body = end + 4
            self.length = int(self.headers.get("content-length", -1))
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            return data.endswith(b"0\r\n\r\n") and _chunks(b"".join(p for _, p in self.parts), self.body)[1]
        return 0 <= self.length <= self.held - self.body

    def answer(self) -> Answer:
        data, ends = b"".join(part for _, part in self.parts), list(accumulate(len(part) for _, part in self.parts))
        if not self.body:
            raise ConnectionError("closed before an answer came" if not data else "closed within the headers")
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            spans, whole = _chunks(data, self.body)
        else:
            starts = [max(self.body, end - len(part)) for end, (_, part) in zip(ends, self.parts)]
            spans, whole = (
                [span for span in zip(starts, ends) if span[0] < span[1]],
                self.length <= self.held - self.body,
            )
        parts = [(self.parts[bisect_left(ends, end)][0], data[begin:end]) for begin, end in spans]
        return Answer(self.status, self.headers, parts, whole)


class Pool:
    """Connections to one server, used again. `headers`: sent with each request; checked here for line breaks."""

    def __init__(self, address: SplitResult, headers: Sequence[tuple[str, str]] = ()) -> None:
        self._ssl = ssl.create_default_context() if address.scheme == "https" else None
        self._host, self._port = address.hostname or "", address.port or (443 if self._ssl else 80)
        name = f"[{self._host}]" if ":" in self._host else self._host
        lines = [("Host", f"{name}:{self._port}" if address.port else name), *headers]
        if any(not text.isprintable() or not text.isascii() for line in lines for text in line):
            raise ValueError("a header has characters that it can't have")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines).encode()
        self._idle: list[_Connection] = []

    def close(self) -> None:
        for connection in self._idle:
            if connection.transport is not None:
                connection.transport.abort()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl))[1]

    async def request(self, method: str, path: str, content: bytes = b"") -> Answer:
        """Raises OSError if the connection fails, or is lost before an answer began, and Malformed."""
        size = f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n" if content else ""
        message = f"{method} {path} HTTP/1.1\r\n".encode() + self._head + f"{size}\r\n".encode() + content
        while True:
            kept = [c for c in self._idle if not c.closed] if self._idle else []
            connection = kept.pop() if kept else await self._connect()
            self._idle = kept
            again, connection.used = connection.used, True
            try:
                return await self._exchange(connection, message)
            except OSError:
                if not again or connection.parts:  # else the server had closed it: not the request's fault
                    raise

    async def _exchange(self, connection: _Connection, message: bytes) -> Answer:
        assert connection.transport is not None
        connection.parts, connection.held, connection.body = [], 0, 0
        connection.done, keep = asyncio.get_running_loop().create_future(), False
        try:
            connection.transport.write(message)
            if connection.closed:
                raise ConnectionError("closed by the server")
            await connection.done
            answer = connection.answer()
            keep = answer.whole and not connection.closed and answer.headers.get("connection", "").lower() != "close"
            return answer
        finally:
            if keep:
                self._idle.append(connection)
            else:
                connection.transport.abort()
