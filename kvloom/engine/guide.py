"""Answers of a form: JSON, JSON of a schema, a regular expression, a choice, a grammar. By llguidance."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from kvloom.engine.request import Guide
from kvloom.errors import RequestError

__all__ = ["KINDS", "Guides"]

KINDS = ("json", "json_object", "regex", "choice", "grammar")
KEPT = 64  # forms whose automata are kept
SPACE = r"[ \n\t]{0,16}"  # between parts of JSON; without a bound weak models write spaces until they are stopped


class Guides:
    """Makes guides for one tokenizer. What was asked for lately needs no compiling again.

    Args:
        tokenizer: of transformers, a fast one.
        size: of the model's vocabulary.
        ends: tokens that end an answer; they may come where the form is complete.
    """

    def __init__(self, tokenizer: Any, size: int, ends: Iterable[int]) -> None:
        self.tokenizer, self.size, self.ends = tokenizer, size, sorted(ends)
        self._words: LLTokenizer | None = None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, kind: str, form: Any) -> Callable[[], Guide]:
        """What constrains answers to a form; takes up to seconds for large ones. Called from any thread.

        Args:
            kind: one of KINDS.
            form: a schema, an expression, a list of strings, or a grammar (Lark's notation).

        Raises:
            RequestError: it is no such form, or it is too large.
        """
        grammar = _grammar(kind, form)
        with self._lock:
            matcher = self._kept.get(grammar)
            if matcher is None:
                words = self._tokenizer()
                wrong = LLMatcher.validate_grammar(grammar, words)
                matcher = LLMatcher(words, grammar, log_level=0)
                wrong = wrong or matcher.get_error()
                if wrong:
                    first = " ".join(wrong.split())[:300]
                    raise RequestError(f"the answer's form ({kind}) can't be used: {first}")
                self._kept[grammar] = matcher
            self._kept.move_to_end(grammar)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return lambda: _Guide(matcher.deep_copy(), self.size)

    def _tokenizer(self) -> LLTokenizer:
        if self._words is None:
            from llguidance.hf import from_tokenizer

            try:
                self._words = from_tokenizer(self.tokenizer, n_vocab=self.size, eos_token=self.ends or None)
            except ValueError as error:
                raise RequestError(
                    f"answers of a given form need another tokenizer than this model's: {error}"
                ) from error
        return self._words


class _Guide:
    """One answer's place in a form."""

    def __init__(self, matcher: LLMatcher, size: int) -> None:
        self.matcher, self.size = matcher, size

    def mask(self, logits: Tensor) -> None:
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        may = np.unpackbits(bits, count=self.size, bitorder="little").astype(bool)
        logits[: self.size].masked_fill_(torch.from_numpy(~may).to(logits.device), -torch.inf)
        logits[self.size :] = -torch.inf

    def accept(self, token: int) -> bool:
        return not self.matcher.consume_token(token) or bool(self.matcher.is_stopped())


def _grammar(kind: str, form: Any) -> str:
    try:
        if kind in ("json", "json_object"):
            schema = {"type": "object"} if kind == "json_object" else form
            if not isinstance(schema, (dict, str, bool)):
                raise ValueError("a JSON schema is an object, or a string that holds one")
            schema = schema if isinstance(schema, str) else json.dumps(schema)
            return str(LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": SPACE}))
        if kind == "regex":
            return str(LLMatcher.grammar_from_regex(form))
        if kind == "choice":
            if not form or not all(isinstance(text, str) and text for text in form):
                raise ValueError("a choice is a list of strings, none of them empty")
            quoted = " | ".join(json.dumps(text, ensure_ascii=False) for text in form)
            return str(LLMatcher.grammar_from_lark(f"start: {quoted}"))
        if kind == "grammar":
            return str(LLMatcher.grammar_from_lark(form))
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"the answer's form ({kind}) can't be used: {error}") from error
    raise RequestError(f"the answer's form {kind!r} is unknown; there are {', '.join(KINDS)}.")
