"""What stands before every route: keys, limits of bodies, ids of requests; and every error in OpenAI's shape."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvloom.engine.ask import Problem
from kvloom.engine.metrics import Meter
from kvloom.engine.protocol import Chat, Completion, Detokenize, Tokenize
from kvloom.engine.runner import Closed
from kvloom.errors import Full, RequestError, unknown

__all__ = ["Gate", "failure", "handle_errors"]

log = logging.getLogger("kvloom.engine")
GUARDED = re.compile("/(v1|tokenize|detokenize)(/|$)")
BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completion,
    "/tokenize": Tokenize,
    "/detokenize": Detokenize,
}


def failure(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    text = message.encode(errors="replace").decode()
    body = {"error": {"message": text, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers=dict(headers or {}))


class Gate:
    """Middleware. Not starlette's own base class, which costs a task and a queue for each request.

    Args:
        key: what clients of guarded routes must send; "": nothing.
        body: bytes of a body at most.
    """

    def __init__(self, app: ASGIApp, key: str, body: int) -> None:
        self.app, self.key, self.body = app, key.encode(), body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, read = Headers(scope=scope), 0
        id = headers.get("x-request-id") or uuid4().hex

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = id[:256]
            await send(message)

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.body:
                raise HTTPException(413, self._large())
            return message

        size = headers.get("content-length", "0")
        if GUARDED.match(scope["path"]) and not self._known(headers):
            why = "the key is missing or wrong; send it as 'Authorization: Bearer KEY'."
            refusal = failure(401, why, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            await refusal(scope, receive, tell)
        elif size.isdigit() and len(size) < 20 and int(size) > self.body:
            await failure(413, self._large())(scope, receive, tell)
        else:
            await self.app(scope, bounded, tell)

    def _known(self, headers: Headers) -> bool:
        if not self.key:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return hmac.compare_digest(given.encode("latin-1", "replace"), self.key) and scheme.lower() == "bearer"

    def _large(self) -> str:
        return f"the body is larger than {self.body:,} bytes."


def handle_errors(app: FastAPI, meter: Meter) -> None:
    """Turns everything that can be raised into an error of OpenAI's shape, and counts it."""

    def refuse(status: int, message: str, *more: Any, **named: Any) -> Response:
        meter.refused[str(status)] += 1
        return failure(status, message, *more, **named)

    @app.exception_handler(Problem)
    async def problem(_: Request, error: Problem) -> Response:
        return refuse(error.status, error.message, error.param, error.code)

    @app.exception_handler(RequestError)
    async def request(_: Request, error: RequestError) -> Response:
        return refuse(400, str(error))

    @app.exception_handler(Full)
    async def full(_: Request, error: Full) -> Response:
        return refuse(429, str(error), code="rate_limit_exceeded", headers={"Retry-After": "1"})

    @app.exception_handler(Closed)
    async def closed(_: Request, error: Closed) -> Response:
        return refuse(503, str(error), headers={"Retry-After": "5"})

    @app.exception_handler(UnicodeError)
    async def text(_: Request, error: UnicodeError) -> Response:
        return refuse(400, f"the text is no Unicode: {error}")

    @app.exception_handler(RequestValidationError)
    async def body(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid":
            return refuse(400, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}")
        if first["type"] in ("missing", "model_attributes_type", "dict_type") and not place:
            return refuse(400, "the body must be a JSON object, sent as 'Content-Type: application/json'.")
        if first["type"] == "extra_forbidden" and len(place) == 1 and (known := BODIES.get(request.url.path)):
            return refuse(400, unknown("field", place[0][:100], known.model_fields), place[0][:100])
        param = ".".join(place)[:200]
        return refuse(400, f"{param}: {first['msg']}", param)

    @app.exception_handler(AnyHTTPException)
    async def http(request: Request, error: AnyHTTPException) -> Response:
        what = f"{request.method} {request.url.path[:200]}"
        known = {404: f"there is no {what}.", 405: f"{what} is not allowed; it takes another method."}
        return refuse(error.status_code, known.get(error.status_code, str(error.detail)), headers=error.headers)

    @app.exception_handler(Exception)
    async def other(_: Request, error: Exception) -> Response:
        return refuse(500, f"an error of the server ({type(error).__name__}); its log says more.")
