"""A run: consecutive slots of one plane, stored by one codec, in buffers that grow with little empty room."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const

__all__ = ["Buffer", "Run"]

ROOM = 16  # slots of empty room that a buffer has ...
SHARE = 20  # ... or one slot in this many, where that is more: 5 % of the buffer


class Buffer:
    """A tensor [h, n, ...] that grows along dim 1; one row spans `per` slots."""

    __slots__ = ("data", "n", "per", "start")

    def __init__(self, first: Tensor, per: int = 1) -> None:
        self.start, self.n, self.per = 0, 0, per
        self.data = first[:, :0]
        self.append(first)

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
        if self.data.shape[1] - n > ROOM // self.per + self._room(n):
            self._move(n, self.data)

    def _room(self, n: int) -> int:
        return max(ROOM // self.per, n // SHARE)

    def _move(self, n: int, like: Tensor) -> None:
        """Takes the rows to a new tensor with room for n and some more."""
        held = self.view
        self.data = like.new_empty((like.shape[0], n + self._room(n), *like.shape[2:]))
        self.data[:, : self.n], self.start = held, 0

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


def gather(x: Tensor, rows: Tensor) -> Tensor:
    """x [h, n, ...] (or [1, n, ...]), rows [h, r] -> [h, r, ...]; a copy."""
    heads = torch.arange(rows.shape[0], device=x.device)[:, None]
    return x.expand(rows.shape[0], *x.shape[1:])[heads, rows]


class Run:
    """Slots of one plane under one codec. A sealed run is shared by forks and never written again."""

    def __init__(self, codec: Codec, block: Block, const: Const) -> None:
        self.codec, self.const, self.sealed = codec, const, False
        self.fields = {name: Buffer(x, codec.per[name]) for name, x in block.items()}

    @property
    def n(self) -> int:
        name, per = next(iter(self.codec.per.items()))
        return self.fields[name].n * per

    @property
    def block(self) -> Block:
        return {name: buffer.view for name, buffer in self.fields.items()}

    def append(self, block: Block) -> None:
        for name, x in block.items():
            self.fields[name].append(x)

    def part(self, start: int, stop: int) -> Block:
        """Views of the slots [start, stop), which must fall on unit borders."""
        return {n: b.view[:, start // self.codec.per[n] : stop // self.codec.per[n]] for n, b in self.fields.items()}

    def decode(self) -> Tensor:
        return self.codec.decode(self.block, self.const)

    def take(self, slots: Tensor) -> Run:
        """A new run of the slots [h, r]: whole units, in ascending order."""
        block = {}
        for name, x in self.block.items():
            per = self.codec.per[name]
            block[name] = gather(x, slots[:, ::per] // per if per > 1 else slots)
        return Run(self.codec, block, self.const)

    def heads(self, heads: Tensor) -> Run:
        """A new run of some of the heads."""
        const = {name: x[heads] for name, x in self.const.items()}
        return Run(self.codec, {name: x[heads] for name, x in self.block.items()}, const)

    def copy(self) -> Run:
        return Run(self.codec, self.block, self.const)
