"""A run: consecutive slots of one plane, stored by one codec, in buffers that grow with little empty room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, gather, of_heads
from kvloom.core.tap import Inputs, InputValues, Tap
from kvloom.kernels import reference
from kvloom.kernels.dispatch import kernels_for
from kvloom.kernels.tile import Term

__all__ = ["Buffer", "Run", "gather"]

ROOM = 16  # slots of empty room that a buffer has ...
SHARE = 20  # ... or one slot in this many, where that is more: 5 % of the buffer


class Buffer:
    """A tensor [h, n, ...] that grows along dim 1; one row spans `per` slots (0: it is one row and stays so)."""

    __slots__ = ("__weakref__", "data", "n", "per", "start")

    def __init__(self, first: Tensor, per: int = 1) -> None:
        self.start, self.n, self.per = 0, 0, per
        self.data = first[:, :0]
        self.append(first)

    @classmethod
    def of(cls, pieces: Sequence[Tensor], per: int, room: int, device: torch.device | str) -> Buffer:
        """The rows of pieces that follow one another, copied once, and place for `room` rows in all before it grows."""
        buffer = cls(pieces[0][:, :0], per)
        most = max(room, sum(x.shape[1] for x in pieces))
        shape = (pieces[0].shape[0], most + buffer._room(most), *pieces[0].shape[2:])
        buffer.data = torch.empty(shape, dtype=pieces[0].dtype, device=device)
        for x in pieces:
            buffer.append(x)
        return buffer

    @classmethod
    def over(cls, x: Tensor) -> Buffer:
        """The rows of x [h, n, ...], not copied."""
        buffer = cls(x[:, :0])
        buffer.data, buffer.n = x, x.shape[1]
        return buffer

    def append(self, x: Tensor) -> None:
        """Adds x [h, m, ...] behind the last row."""
        m = x.shape[1]
        locked = self.data.is_inference() and not torch.is_inference_mode_enabled()  # torch forbids writing to it
        if locked or self.start + self.n + m > self.data.shape[1]:
            self._move(self.n + m, x)
        self.data.narrow(1, self.start + self.n, m).copy_(x)
        self.n += m

    def drop_front(self, rows: int) -> None:
        """Forgets the first rows."""
        self.start += rows
        self._shrink(self.n - rows)

    def cut(self, rows: int) -> None:
        """Forgets all but the first rows."""
        self._shrink(rows)

    def _shrink(self, n: int) -> None:
        """Frees the room of forgotten rows, once it is worth a copy."""
        self.n = n
        if self.per and self.data.shape[1] - n > ROOM // self.per + self._room(n):
            self._move(n, self.data)

    def _room(self, n: int) -> int:
        return max(ROOM // self.per, n // SHARE) if self.per else 0

    def _move(self, n: int, like: Tensor) -> None:
        """Takes the rows to a new tensor with room for n and some more."""
        held = self.view
        self.data = like.new_empty((like.shape[0], n + self._room(n), *like.shape[2:]))
        self.data[:, : self.n], self.start = held, 0

    @property
    def free(self) -> int:
        """Rows that there is room for."""
        return self.data.shape[1] - self.start - self.n

    @property
    def view(self) -> Tensor:
        return self.data.narrow(1, self.start, self.n)

    def rows(self, start: int, stop: int) -> Tensor:
        """A view of the rows [start, stop)."""
        return self.data.narrow(1, self.start + start, stop - start)

    @property
    def used(self) -> int:
        """Bytes of the rows held."""
        return self.view.nbytes


class Run:
    """Slots of one plane under one codec. A sealed run is shared by forks and never written again.

    With a `tap` the codec holds keys from before RoPE, and the run knows their places in the text: from `start` on while
    they are consecutive, else as a column. Then what goes in and comes out of a run are keys as the model caches them.
    """

    def __init__(self, codec: Codec, block: Block, const: Const, tap: Tap | None = None, at: int | Tensor = 0) -> None:
        self.codec, self.const, self.tap, self.sealed = codec, const, tap, False
        self.fields = {name: Buffer(x, codec.per[name]) for name, x in block.items()}
        self.start = at if isinstance(at, int) else 0
        self.at = Buffer(at) if isinstance(at, Tensor) else None

    @property
    def n(self) -> int:
        name, per = next((name, per) for name, per in self.codec.per.items() if per)
        return self.fields[name].n * per

    @property
    def grows(self) -> bool:
        """Whether blocks can be added: not if something of it belongs to all that was frozen at once."""
        return all(self.codec.per.values())

    @property
    def block(self) -> Block:
        return {name: buffer.view for name, buffer in self.fields.items()}

    @property
    def stored(self) -> dict[str, Buffer]:
        """All that takes bytes: the block's fields, and places in the text where they are needed."""
        return self.fields if self.at is None else {**self.fields, "at": self.at}

    def places(self, start: int, stop: int) -> Tensor:
        """Text index of the slots [start, stop), [h or 1, n]; of a run with a tap."""
        if self.at is not None:
            return self.at.rows(start, stop)
        device = next(iter(self.fields.values())).data.device
        return torch.arange(self.start + start, self.start + stop, dtype=torch.int32, device=device)[None]

    def append(self, block: Block, at: int | Tensor = 0) -> None:
        """Adds slots; `at`: their places in the text, which a run with a tap needs."""
        if self.tap is not None and not (self.at is None and at == self.start + self.n):
            m = self.codec.slots(block)
            late = at if isinstance(at, Tensor) else torch.arange(at, at + m, dtype=torch.int32)[None]
            held = self.places(0, self.n)
            heads = max(len(held), len(late))
            if self.at is None or len(held) < heads:
                self.at = Buffer(held.expand(heads, -1))
            self.at.append(late.to(held.device, held.dtype).expand(heads, -1))
        for name, x in block.items():
            self.fields[name].append(x)

    def drop_front(self, slots: int) -> None:
        """Forgets the first slots of a run that holds one row for each."""
        self.start += slots
        for buffer in self.stored.values():
            buffer.drop_front(slots)

    def part(self, start: int, stop: int) -> Block:
        """The slots [start, stop), which must fall on unit borders: views."""
        return self.codec.cut(self.block, start, stop)

    def decode(self) -> Tensor:
        """All slots, [h, n, D]."""
        return self.read(0, self.n)

    def read(self, start: int, stop: int) -> Tensor:
        """The slots [start, stop), which must fall on unit borders, decoded: [h, n, D]."""
        whole = start == 0 and stop == self.n
        x = self.codec.decode(self.block if whole else self.part(start, stop), self.const)
        return x if self.tap is None else self.tap.on(x, self.places(start, stop))

    def dot(self, q: Tensor, stop: int, scale: float) -> Tensor:
        """Scaled logits [h, R, stop] in fp32 of queries [h, R, D] against the first slots, whole units."""
        if self.tap is None:
            return self.codec.dot(q, self.part(0, stop), self.const, scale)
        spans = [slots for slots, _ in self.codec.pieces(self.part(0, stop), q.shape[0] * q.shape[2])]
        return torch.cat([reference.logits(q, self.read(s.start, s.stop), scale) for s in spans], -1)

    def mix(self, p: Tensor) -> Tensor:
        """Weighted sums [h, R, D] in fp32 of the first slots, as many as p [h, R, n] has weights, whole units."""
        if isinstance(self.tap, InputValues):
            return self.tap.mix(self, p)
        return self.codec.mix(p, self.part(0, p.shape[-1]), self.const)

    def describe(self, q: Tensor | None, kept: list[Tensor]) -> Any:
        """The run for the kernels that work where it lies; None where they can't read it."""
        block = self.block
        if isinstance(self.tap, Inputs):
            tile, kernels = self.codec.tile(block, self.const), kernels_for(next(iter(block.values())))
            term = (
                None if tile is None else self.tap.term(tile, q, None if self.at is None else self.at.view, self.start)
            )
            return None if term is None or kernels is None else kernels.tile(self.n, [term], kept)
        if self.tap is None or self.tap.rope is None or q is None:
            return self.codec.describe(block, self.const, q, kept)
        tile, kernels = self.codec.tile(block, self.const), kernels_for(q)
        if tile is None or kernels is None:
            return None
        at = None if self.at is None else self.at.view
        return kernels.tile(self.n, [Term(self.tap.tile(tile, at, self.start), q)], kept)

    def take(self, slots: Tensor) -> Run:
        """A new run of the slots [h, r]: whole units, in ascending order."""
        at = 0 if self.tap is None else gather(self.places(0, self.n), slots)
        return Run(self.codec, self.codec.take(self.block, slots), self.const, self.tap, at)

    def heads(self, heads: Tensor) -> Run:
        """A new run of some of the heads."""
        const = {name: of_heads(x, heads) for name, x in self.const.items()}
        at = self.start if self.at is None else of_heads(self.at.view, heads)
        return Run(self.codec, {name: of_heads(x, heads) for name, x in self.block.items()}, const, self.tap, at)

    def seen_by(self, tap: Tap) -> Run:
        """This very run, read through another tap."""
        twin = Run.__new__(Run)
        twin.__dict__.update(self.__dict__)
        twin.tap = tap
        return twin

    def copy(self) -> Run:
        return Run(self.codec, self.block, self.const, self.tap, self.start if self.at is None else self.at.view)
