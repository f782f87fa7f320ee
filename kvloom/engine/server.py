"""The HTTP server: OpenAI's API, vLLM's additions, and a live page, over an engine that runs in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.types import Receive, Scope, Send

from kvloom.engine.answers import Answer
from kvloom.engine.ask import Desk, Problem, Served
from kvloom.engine.gate import Gate, handle_errors
from kvloom.engine.metrics import CONTENT_TYPE
from kvloom.engine.protocol import Chat, Completion, Detokenize, Failure, Tokenize
from kvloom.engine.runner import Runner, Stream
from kvloom.errors import Full, KvloomError

__all__ = ["create_app"]

PAGE = Path(__file__).parent / "static" / "index.html"
LOOK = 5.0  # seconds between looks at the store's tiers
BODY = 32 * 2**20  # bytes of a body at most
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def create_app(
    runner: Runner,
    served: Served,
    *,
    key: str = "",
    most: int = 2048,
    body: int = BODY,
    drain: float = 30.0,
    tiers: Callable[[], Mapping[str, int]] | None = None,
) -> FastAPI:
    """The application; starts the runner and drains it at its end.

    Args:
        key: what clients must send as `Authorization: Bearer`; "": nothing.
        most: answers in work at once, those that wait included; beyond it, 429.
        body: bytes of a request's body at most.
        drain: seconds for answers in work when the server is stopped.
        tiers: bytes that each tier of a store holds; may take its time.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        runner.start()
        yield
        await runner.drain(drain)

    desk = Desk(served)
    born = int(time.time())
    app = FastAPI(
        title="kvloom", version=_version(), lifespan=lifespan, redoc_url=None, responses={"4XX": {"model": Failure}}
    )
    handle_errors(app, runner.meter)
    app.add_middleware(Gate, key=key, body=body)

    @app.post("/v1/chat/completions")
    async def chat(asked: Chat, request: Request) -> Response:
        """An answer to a chat."""
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        _stream_options(asked)
        return await answer(Answer(await desk.chat(asked), desk.words, True), bool(asked.stream), usage, request)

    @app.post("/v1/completions")
    async def completions(asked: Completion, request: Request) -> Response:
        """A text that goes on."""
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        _stream_options(asked)
        reply = Answer(await desk.completion(asked), desk.words, False)
        return await answer(reply, bool(asked.stream), usage, request, only_echo=asked.max_tokens == 0)

    async def answer(reply: Answer, stream: bool, usage: bool, request: Request, only_echo: bool = False) -> Response:
        requests = reply.order.requests
        if only_echo:
            for choice in reply.choices.values():
                choice.finish = "length"
            if stream:
                whole = [
                    reply.begin(usage),
                    *(reply.event(c, "", []) for c in reply.choices.values()),
                    reply.end(usage),
                ]
                return Response(b"".join(whole), media_type="text/event-stream")
            return JSONResponse(reply.whole([""] * len(requests), [[] for _ in requests]))
        if len(runner.open) + len(requests) > most:
            raise Full(f"{len(runner.open)} answers are in work, {most} may be at once. Try again later.")
        came = await runner.submit(requests)
        if stream:
            return Events(reply, came, usage)
        with _leaving(request.receive, came):
            return await _whole(reply, came)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model under each of its names, and its adapters."""
        found = [_model(name, born, served) for name in (*served.names, *served.adapters)]
        return {"object": "list", "data": found}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        desk.adapter(name)
        return _model(name, born, served)

    @app.post("/tokenize")
    async def tokenize(asked: Tokenize) -> dict[str, Any]:
        """Tokens of a text or a chat."""
        tokens = await desk.tokenize(asked)
        names = served.tokenizer.convert_ids_to_tokens(tokens) if asked.return_token_strs else None
        return {"count": len(tokens), "max_model_len": served.context, "tokens": tokens, "token_strs": names}

    @app.post("/detokenize")
    async def detokenize(asked: Detokenize) -> dict[str, Any]:
        """The text of tokens."""
        desk.adapter(asked.model)
        if max(asked.tokens, default=0) >= served.vocabulary:
            raise Problem(f"token {max(asked.tokens)} is not one of {served.vocabulary}.", param="tokens")
        return {"prompt": desk.words.decode(asked.tokens, skip=False)}

    @app.get("/health")
    @app.get("/ping", include_in_schema=False)
    async def health() -> Response:
        """200 while requests are taken."""
        return Response(status_code=503 if runner.closing or runner.failed else 200)

    @app.get("/version")
    async def version_() -> dict[str, str]:
        """Of kvloom."""
        return {"version": app.version}

    looked = 0.0

    async def look() -> None:
        nonlocal looked
        if tiers is not None and time.monotonic() - looked > LOOK:
            looked = time.monotonic()
            with contextlib.suppress(KvloomError):
                runner.meter.tiers = await asyncio.to_thread(tiers)

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        await look()
        return Response(runner.meter.text(), media_type=CONTENT_TYPE)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        """The same numbers for the live page."""
        await look()
        about = {"model": served.names[0], "recipe": served.recipe, "context": served.context, "version": app.version}
        return about | runner.meter.page()

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    return app


class Events(Response):
    """An answer as server-sent events. Sends what came since it last could, so that a slow reader costs no more than a fast one."""

    media_type = "text/event-stream"

    def __init__(self, reply: Answer, stream: Stream, usage: bool) -> None:
        self.reply, self.stream, self.usage = reply, stream, usage
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        reply = self.reply
        with _leaving(receive, self.stream):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await tell(reply.begin(self.usage))
            async for outputs in self.stream:
                events, failed = [], ""
                for output in outputs:
                    choice = reply.choices[output.id]
                    if choice.open:
                        text, entries = choice.push(output)
                        if choice.error:
                            failed = choice.error
                            continue
                        if choice.finish is not None:
                            self.stream.enough(output.id)
                        events.append(reply.event(choice, text, entries))
                if failed:
                    why = {"error": {"message": failed, "type": "server_error", "param": None, "code": None}}
                    events.append(f"data: {json.dumps(why)}\n\n".encode())
                    self.stream.close()
                if events := [event for event in events if event]:
                    await tell(b"".join(events))
            await tell(reply.end(self.usage), more=False)


async def _whole(reply: Answer, stream: Stream) -> Response:
    texts: list[list[str]] = [[] for _ in reply.choices]
    held: list[list[Any]] = [[] for _ in reply.choices]
    async for outputs in stream:
        for output in outputs:
            choice = reply.choices[output.id]
            if choice.open:
                text, entries = choice.push(output)
                if choice.error:
                    raise Problem(choice.error, 503 if choice.finish == "abort" else 500)
                texts[choice.index].append(text)
                held[choice.index] += entries
                if choice.finish is not None:
                    stream.enough(output.id)
    if any(choice.open for choice in reply.choices.values()):
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(reply.whole(["".join(parts) for parts in texts], held))


@contextlib.contextmanager
def _leaving(receive: Receive, stream: Stream) -> Iterator[None]:
    """Ends a stream's requests when its reader leaves, or when whoever reads it is done with it in any way."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        stream.close()

    task = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        task.cancel()
        stream.close()


def _stream_options(asked: Chat | Completion) -> None:
    if asked.stream_options is not None and not asked.stream:
        raise Problem("stream_options are for stream: true.", param="stream_options")


def _model(name: str, born: int, served: Served) -> dict[str, Any]:
    adapter = name in served.adapters
    return {
        "id": name, "object": "model", "created": born, "owned_by": "kvloom", "root": served.adapters.get(name, served.names[0]),
        "parent": served.names[0] if adapter else None, "max_model_len": served.context,
    }  # fmt: skip


def _version() -> str:
    try:
        return version("kvloom")
    except PackageNotFoundError:
        return "0"
