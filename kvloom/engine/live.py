"""A request in the engine: what it has been fed, what it may be fed next."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from kvloom.engine.request import Request
from kvloom.engine.sampling import Sampler
from kvloom.engine.sequence import Outline, Sequence

if TYPE_CHECKING:
    from kvloom.engine.shelf import Job
    from kvloom.store.identity import ChunkKey

__all__ = ["Live"]


class Live:
    """`tokens`: prompt and answer. `sequence`: None while it waits; `parked`: then what it held, outside the KV memory.

    `needs`: bytes to begin with. `squeezed`: what it holds was compressed harder than asked for.
    """

    def __init__(self, request: Request, outline: Outline, limit: int, part: int) -> None:
        self.request, self.outline, self.limit, self.part = request, outline, limit, part
        self.tokens = list(request.tokens)
        self.prompt = len(self.tokens)
        self.sampler = Sampler(request.sampling, self.tokens)
        self.sequence: Sequence | None = None
        self.parked: Sequence | None = None
        self.squeezed = False
        self.needs = 0
        self.cached: int | None = None  # tokens of the prompt that were found when it began
        self.marks: frozenset[int] = frozenset()  # borders at which it is to be kept
        self.shares = False  # whether it is a fork that has not grown since, or was forked
        self.covered = 0  # up to which length memory was promised
        self.preempted = 0
        self.adapter = ""  # digest of its adapter, once that was read
        self.loading: Job | None = None  # on the way from the store
        self.chain: list[ChunkKey] = []  # of the parts of its text

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def waiting(self) -> bool:
        """Whether it holds no sequence."""
        return self.sequence is None

    @property
    def length(self) -> int:
        """Tokens fed."""
        held = self.sequence or self.parked
        return 0 if held is None else held.length

    @property
    def pending(self) -> int:
        """Tokens known but not fed."""
        return len(self.tokens) - self.length

    @property
    def reading(self) -> bool:
        """Whether it is still fed what is known: its prompt, or, begun again, its answer so far."""
        return self.pending > 1 or self.length < self.prompt

    @property
    def answered(self) -> int:
        """Tokens of the answer."""
        return len(self.tokens) - self.prompt

    @property
    def space(self) -> Hashable:
        """What has to be equal, besides tokens, for what is kept to serve."""
        return (self.outline, self.request.adapter, self.request.salt)

    def growth(self, start: int, stop: int) -> int:
        """Bytes that it may take to grow from one length to another."""
        fork = (self.outline.copied(start) or self.outline.room) if self.shares else 0
        return self.outline.more(start, max(start, stop)) + fork

    def rows(self, room: int) -> int:
        """How many tokens to feed next, where `room` would be welcome.

        A prompt is cut at multiples of `part`, so that what is stored does not hang on what runs beside it; where every token is
        stored by itself it may be cut anywhere else, too. What was decoded is fed one by one again, or it would not be the same.
        """
        n = self.length
        border = min((n // self.part + 1) * self.part, self.prompt if n < self.prompt else len(self.tokens))
        if self.outline.free:
            return max(1, min(border - n, room))
        return border - n if n < self.prompt else 1
