"""Helpers for pipelines: documents that are ready before they are asked for, and agents that share what they have read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvloom.errors import StoreError
from kvloom.store.fill import Filler, Report
from kvloom.store.identity import START, ChunkKey, chunk_keys
from kvloom.store.prompt import Prompt, read_prompt
from kvloom.store.session import Attached, Reply

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Agent", "Document"]


class Document:
    """A text that prompts begin with, or hold: its chunks are computed once and kept from eviction for a while.

        manual = Document(attached, open("manual.txt").read())
        manual.prepare(pin=3600)
        session.generate([manual, "How do I reset it?"])

    At the beginning of a prompt it is a prefix hit. Anywhere else it is computed, unless a `program` is attached: that
    one gets the span of the prompt where the document stands.
    """

    def __init__(self, attached: Attached, text: Prompt, tenant: str = "") -> None:
        self.attached, self.tenant = attached, tenant
        self.tokens, _ = read_prompt(text, attached.tokenizer)
        if not self.tokens:
            raise StoreError("the document is empty; give at least one token.")
        self._lease = ""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def keys(self) -> list[ChunkKey]:
        """Of its whole blocks, as the beginning of a text."""
        return chunk_keys(self.attached.identity(self.tenant), self.tokens, self.attached.block)

    @property
    def content(self) -> ChunkKey:
        """All of it as one chunk that was computed for itself, whatever stands before it: a key for programs."""
        identity = self.attached.identity(self.tenant)
        return ChunkKey(identity.digest, START, 0, tuple(self.tokens), identity.tenant)

    def prepare(self, pin: float = 0.0) -> Report:
        """Computes and stores what the store does not have. `pin`: seconds to keep it from eviction; call again to go on.

        Raises StoreError for a recipe whose caches serve one prompt only: there is nothing to prepare.
        """
        if self.attached.mode == "whole":
            raise StoreError(
                f"caches of {self.attached.recipe.name} serve one prompt only, so a document cannot be prepared. Use a recipe "
                "that drops nothing, such as 'full' or 'kivi(bits=4)'."
            )
        done = len(self.tokens) // self.attached.block * self.attached.block
        _, report = Filler(self.attached, self.tenant).fill(self.tokens[:done], done)
        if pin > 0:
            before, self._lease = self._lease, self.attached.store.pin(self.keys, pin)
            if before:
                self.attached.store.unpin(before)
        return report

    def release(self) -> None:
        """Lets its chunks be evicted."""
        if self._lease:
            self.attached.store.unpin(self._lease)
            self._lease = ""

    def __enter__(self) -> Document:
        self.prepare(pin=3600.0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class Agent:
    """One of several that talk with one model: what it read and said is its history, and stays in the store.

    Agents that begin alike share it, and so does a `fork`. `history`: token ids of all turns.
    """

    def __init__(self, attached: Attached, system: Prompt = (), tenant: str = "") -> None:
        self.session = attached.session(tenant)
        self.history, _ = read_prompt(system, attached.tokenizer)

    def say(self, turn: Prompt, **options: Any) -> Reply:
        """Adds a turn to the history, generates the answer and adds it too. `options`: of `model.generate`."""
        parts: Any = [self.history, turn]
        new, _ = read_prompt(parts, self.session.attached.tokenizer)
        reply = self.session.generate(parts, keep=True, **options)
        self.history = new + reply.tokens
        return reply

    def fork(self) -> Agent:
        """Another agent with the same history."""
        twin = Agent(self.session.attached, tenant=self.session.tenant)
        twin.history = list(self.history)
        return twin
