"""Tokens to text as they come: characters that are split over tokens, and strings that end an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Detokenizer", "Stops", "Vocabulary"]

BROKEN = "\N{REPLACEMENT CHARACTER}"
LONGEST = 16  # a character has 4 bytes, so at most 4 tokens; more than this many broken ones are no character


def _bytes_of_letters() -> dict[str, int]:
    """The letters in which byte-level vocabularies write bytes: printable ones as they are, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


LETTERS = _bytes_of_letters()


class Vocabulary:
    """What a tokenizer's tokens are as text and as bytes.

    Args:
        tokenizer: of transformers.
        size: of the model's vocabulary, which may be larger.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.special = frozenset(tokenizer.all_special_ids)
        self.added = {i: text for text, i in tokenizer.get_added_vocab().items()}
        rust = getattr(tokenizer, "backend_tokenizer", None)
        self.letters = rust is not None and "ByteLevel" in repr(rust.decoder)
        self._rust: Any = rust

    def decode(self, tokens: Sequence[int], skip: bool = True) -> str:
        """Text of tokens, without special ones if `skip`."""
        if self._rust is not None:  # five times as fast as through transformers
            return str(self._rust.decode(tokens, skip_special_tokens=skip))
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    def piece(self, token: int) -> bytes:
        """The bytes of one token, which may be a part of a character."""
        if token in self.added:
            return self.added[token].encode()
        name = self.tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return b""  # a row of the model's vocabulary that the tokenizer doesn't use
        if self.letters and all(letter in LETTERS for letter in name):
            return bytes(LETTERS[letter] for letter in name)
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        if "\u2581" in name:
            return str(name).replace("\u2581", " ").encode()
        return self.decode([token], skip=False).encode()


class Detokenizer:
    """Text of an answer, a token at a time. Decodes only tokens since the last whole character, and a few before them,
    since some tokenizers write a token otherwise at the beginning of a text.

    Args:
        before: the prompt; its end is what the answer is joined to.
        skip: leave special tokens out.
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int] = (), skip: bool = True) -> None:
        self.decode: Callable[[Sequence[int], bool], str] = vocabulary.decode
        self.skip = skip
        self.tokens = list(before[-4:])
        self.sent = self.decode(self.tokens, skip)  # the text of these that was given out
        self.old = len(self.tokens)

    def push(self, token: int) -> str:
        """Text that is certain now; "" in the middle of a character."""
        self.tokens.append(token)
        text = self.decode(self.tokens, self.skip)
        if text.endswith(BROKEN) and len(self.tokens) - self.old < LONGEST:
            return ""
        new = text[len(self.sent) :]
        fresh = self.tokens[self.old :]
        rest = self.decode(fresh, self.skip)
        if rest:  # enough for what comes to be joined to
            self.tokens, self.sent = fresh, rest
        else:
            self.sent = text
        self.old = len(self.tokens)
        return new

    def end(self) -> str:
        """What was held back, with a mark for what never became a character."""
        new = self.decode(self.tokens, self.skip)[len(self.sent) :]
        self.tokens, self.sent, self.old = [], "", 0
        return new


class Stops:
    """Finds strings that end an answer, wherever pieces of text are cut. What may be the beginning of one is held back.

    Args:
        stops: none of them empty.
        include: leave the string that was found in the answer.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self.stops, self.include = tuple(stops), include
        self.held = ""
        self.longest = max(map(len, stops), default=0)

    def push(self, text: str, last: bool = False) -> tuple[str, bool]:
        """Text that may go out, and whether the answer ends here. `last`: nothing more comes."""
        if not self.stops:
            return text, False
        self.held += text
        found = [(at, -len(stop)) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            at, size = min(found)  # the first one, of several there the longest
            return self.held[: at - size if self.include else at], True
        keep = 0 if last else self._beginning()
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out, False

    def _beginning(self) -> int:
        """Letters at the end of what is held that a stop begins with."""
        for n in range(min(self.longest - 1, len(self.held)), 0, -1):
            end = self.held[-n:]
            if any(stop.startswith(end) for stop in self.stops):
                return n
        return 0
