"""A server with OpenAI's completions API and no model: each token comes when it should, so that what measures can be measured.

    python -m tests.openai_like PORT [--first 0.05] [--gap 0.01] [--faults NAME ...] [--limit 8192]

Faults: `text` takes no token ids, `strict` knows no `ignore_eos`, `busy` answers every third request with 429, `cut` ends
each stream in its middle, `inside` puts an error into it, `halves` sends events in halves, `pairs` two tokens at a time,
`plain` sends no stream, `hangs` never sends anything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


def build(first: float, gap: float, limit: int | None, faults: frozenset[str]) -> FastAPI:
    app = FastAPI()
    seen: list[dict[str, Any]] = []

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        told = {} if limit is None else {"max_model_len": limit}
        return {"object": "list", "data": [{"id": "none", "object": "model"} | told]}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {}

    @app.get("/seen")
    def asked() -> list[dict[str, Any]]:
        return seen

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        prompt, tokens = body["prompt"], body["max_tokens"]
        if "text" in faults and not isinstance(prompt, str):
            return JSONResponse({"detail": "prompt must be a string."}, 400)
        if "strict" in faults and "ignore_eos" in body:
            return JSONResponse({"detail": "Unexpected fields in the request: {'ignore_eos'}"}, 422)
        probe = tokens == 1 and len(prompt) < 40
        if not probe:
            seen.append(body)
            if "busy" in faults and len(seen) % 3 == 0:
                return JSONResponse({"error": {"message": "too many requests"}}, 429)
            if "plain" in faults:
                return JSONResponse({"choices": []})
            if "hangs" in faults:
                await asyncio.sleep(60)

        async def stream() -> AsyncIterator[bytes]:
            size = 2 if "pairs" in faults else 1
            for i in range(0, tokens, size):
                await asyncio.sleep(first if i == 0 else gap)
                event = _event({"choices": [{"index": 0, "text": f" {i}", "finish_reason": None}]})
                if "halves" in faults:
                    yield event[:7]
                    await asyncio.sleep(0.002)
                    event = event[7:]
                yield event
                if not probe and 2 * i >= tokens:
                    if "cut" in faults:
                        return
                    if "inside" in faults:
                        yield _event({"error": {"message": "out of memory"}})
                        return
            yield _event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
            count = len(prompt) if not isinstance(prompt, str) else len(prompt.split())
            usage = {
                "prompt_tokens": count,
                "completion_tokens": tokens,
                "prompt_tokens_details": {"cached_tokens": count // 2},
            }
            if (body.get("stream_options") or {}).get("include_usage"):
                yield _event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    return app


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps({"id": "x", "object": "text_completion", "model": "none"} | data).encode() + b"\n\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--first", type=float, default=0.05)
    parser.add_argument("--gap", type=float, default=0.01)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--faults", nargs="*", default=[])
    given = parser.parse_args()
    app = build(given.first, given.gap, given.limit, frozenset(given.faults))
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning", backlog=4096)
