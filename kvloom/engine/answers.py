"""From what the engine says to what a client reads: choices, their log-probabilities, usage; whole or as events."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import uuid4

from kvloom.engine.ask import Order
from kvloom.engine.request import Output, Request
from kvloom.engine.text import Detokenizer, Stops, Vocabulary

__all__ = ["Answer", "Choice"]

Entry = tuple[int, float, tuple[tuple[int, float], ...]]  # a token, its log-probability, the best ones'
LEAST = -9999.0  # JSON has no infinity


class Choice:
    """One answer as it comes."""

    def __init__(self, index: int, request: Request, order: Order, words: Vocabulary) -> None:
        self.index, self.request, self.words = index, request, words
        self.include = order.include_stop
        self.reader = Detokenizer(words, request.tokens, order.skip_special)
        self.stops = Stops(order.stops, order.include_stop)
        self.count = self.cached = 0
        self.finish: str | None = None
        self.error = ""
        self.length = 0  # letters so far, for the offsets of completions' log-probabilities
        self._late: list[Entry] = []

    @property
    def open(self) -> bool:
        """Whether more may come."""
        return self.finish is None

    def push(self, output: Output) -> tuple[str, list[Entry]]:
        """New text, and the tokens that belong to it. Sets `finish` where the answer ends."""
        text = ""
        self.cached = max(self.cached, output.cached)
        if output.token is not None:
            self.count += 1
            last = output.finish == "stop" and output.token in self.request.sampling.stop
            if self.include or not last:
                text = self.reader.push(output.token)
                if output.logprob is not None:
                    self._late.append((output.token, output.logprob, output.top))
        self.finish, self.error = output.finish, output.error
        if self.finish is not None:
            text += self.reader.end()
        if self.count > self.request.sampling.min_tokens or self.finish is not None:
            text, found = self.stops.push(text, last=self.finish is not None)
            if found:
                self.finish = "stop"
        if not text and self.finish is None:
            return "", []  # tokens go out with their text
        late, self._late = self._late, []
        return text, late


class Answer:
    """All choices of one call, in the shape of chats or of completions."""

    def __init__(self, order: Order, words: Vocabulary, chat: bool) -> None:
        self.order, self.words, self.chat = order, words, chat
        self.choices = {request.id: Choice(i, request, order, words) for i, request in enumerate(order.requests)}
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}"
        self.created = int(time.time())

    # whole

    def whole(self, texts: Sequence[str], entries: Sequence[list[Entry]]) -> dict[str, Any]:
        """The body of an answer that isn't streamed; texts and entries of each choice."""
        found = []
        for choice, text, held in zip(self.choices.values(), texts, entries, strict=True):
            before = self.order.echo[choice.index] if self.order.echo else ""
            end: dict[str, Any] = {"index": choice.index}
            end |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": before + text}
            found.append(end | {"logprobs": self._logprobs(choice, held), "finish_reason": choice.finish})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": found, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of prompts and answers, and of the prompts those that were cached (of each prompt once)."""
        answer = sum(choice.count for choice in self.choices.values())
        prompts = {id(choice.request.tokens): choice.cached for choice in self.choices.values()}
        return {
            "prompt_tokens": self.order.prompt_tokens,
            "completion_tokens": answer,
            "total_tokens": self.order.prompt_tokens + answer,
            "prompt_tokens_details": {"cached_tokens": sum(prompts.values())},
        }

    # as events

    def begin(self, usage: bool) -> bytes:
        """The first event: the role of chats, the prompt where it is to be echoed. `usage`: it is asked for."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = json.dumps(self._head(kind))
        self._before = f'data: {head[:-1]}, "choices": ['
        self._after = '], "usage": null}\n\n' if usage else "]}\n\n"
        if self.chat:
            return b"".join(
                self._event(c, {"role": "assistant", "content": ""}, [], None) for c in self.choices.values()
            )
        return b"".join(
            self._event(c, self.order.echo[c.index], [], None) for c in self.choices.values() if self.order.echo
        )

    def event(self, choice: Choice, text: str, entries: list[Entry]) -> bytes:
        """What a choice has to tell now; b"" for nothing."""
        if not text and choice.finish is None:
            return b""
        if not self.chat:
            return self._event(choice, text, entries, choice.finish)
        if choice.finish is None:
            return self._event(choice, {"content": text}, entries, None)
        last = self._event(choice, {}, [], choice.finish)
        return self._event(choice, {"content": text}, entries, None) + last if text or entries else last

    def end(self, usage: bool) -> bytes:
        """The last events."""
        if not usage:
            return b"data: [DONE]\n\n"
        tail = f'], "usage": {json.dumps(self.usage())}}}\n\n'
        return f"{self._before}{tail}data: [DONE]\n\n".encode()

    def _event(self, choice: Choice, told: Any, entries: list[Entry], finish: str | None) -> bytes:
        body = {"index": choice.index, "delta" if self.chat else "text": told}
        body |= {"logprobs": self._logprobs(choice, entries) if entries else None, "finish_reason": finish}
        return f"{self._before}{json.dumps(body)}{self._after}".encode()

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.order.model}

    # log-probabilities

    def _logprobs(self, choice: Choice, entries: list[Entry]) -> dict[str, Any] | None:
        if not self.order.logprobs:
            return None
        return self._content(entries) if self.chat else self._columns(choice, entries)

    def _content(self, entries: Iterable[Entry]) -> dict[str, Any]:
        def one(token: int, value: float) -> dict[str, Any]:
            piece = self.words.piece(token)
            return {"token": piece.decode(errors="replace"), "logprob": _finite(value), "bytes": list(piece)}

        return {
            "content": [one(t, v) | {"top_logprobs": [one(*x) for x in top]} for t, v, top in entries],
            "refusal": None,
        }

    def _columns(self, choice: Choice, entries: Sequence[Entry]) -> dict[str, Any]:
        names = [self._name(token) for token, _, _ in entries]
        offsets, at = [], choice.length + (len(self.order.echo[choice.index]) if self.order.echo else 0)
        for name in names:
            offsets.append(at)
            at += len(name)
        choice.length += sum(map(len, names))
        tops = [{self._name(t): _finite(x) for t, x in (*top, (token, value))} for token, value, top in entries]
        return {
            "tokens": names,
            "token_logprobs": [_finite(value) for _, value, _ in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        return self.words.piece(token).decode(errors="replace")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else LEAST
