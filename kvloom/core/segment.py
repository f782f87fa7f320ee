"""A segment: one class of slots of a group of KV heads that hold equally many, as a key plane and a value plane.

The two planes may freeze at different times (KIVI freezes keys 128 at a time and values one by one), so each is a list of
runs: frozen ones first, the exact tail last. Slot i is the i-th of both planes and of every column.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.core.codec import of_heads
from kvloom.core.kind import EXACT, Kind, Tail
from kvloom.core.plane import Mirror, Plane
from kvloom.core.rows import Rows
from kvloom.core.run import Buffer, Run, gather
from kvloom.errors import CacheError

if TYPE_CHECKING:
    from kvloom.core.select import Digest

__all__ = ["EXACT", "Kind", "Segment", "Tail"]


class Segment:
    """Slots of one class of one head group. `start` is the text index of slot 0 while the slots are consecutive."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.key = Plane(kind, "key")
        self.value = Plane(kind, "value") if kind.value_tap is None else Mirror(self.key, kind.value_tap)
        self.cols: dict[str, Buffer] = {}
        self.n, self.start = 0, 0
        self.moves = 0  # how often slots have left or changed places
        self.digest: Digest | None = None
        self._late = 0  # newest slots that the index column does not have yet: consecutive, the last before `_next`
        self._next = 0

    @classmethod
    def of(cls, rows: Rows) -> Segment:
        """An exact segment of these rows, which are not copied: only to be read."""
        found = cls(Kind())
        for plane, x in ((found.key, rows.k), (found.value, rows.v)):
            plane.runs = [Run(EXACT, {}, {})]
            plane.runs[0].fields["x"] = Buffer.over(x)
        found.cols = {name: Buffer.over(x) for name, x in {**rows.cols, "index": rows.where}.items()}
        found.n = rows.n
        return found

    @property
    def frozen(self) -> int:
        """Slots of which at least one plane is encoded."""
        return max(self.key.frozen, self.value.frozen)

    @property
    def index(self) -> Tensor:
        """Text index of every slot, [h, n] or [1, n] int32."""
        if "index" in self.cols:
            self._catch_up()
            return self.cols["index"].view
        return torch.arange(self.start, self.start + self.n, dtype=torch.int32, device=self._store.device)[None]

    def _catch_up(self) -> None:
        if self._late:
            late, self._late = self._late, 0
            at = torch.arange(self._next - late, self._next, dtype=torch.int32, device=self._store.device)
            self._extend("index", at[None])

    @property
    def _store(self) -> Tensor:
        return next(iter(self.key.runs[0].fields.values())).data

    @property
    def heads(self) -> int:
        """KV heads that the segment holds; it must hold slots."""
        runs = (*self.key.runs, *self.value.runs)  # fields that heads share have one row for all
        return max(buffer.data.shape[0] for run in runs for buffer in run.fields.values())

    def column(self, name: str) -> Tensor | None:
        return self.cols[name].view if name in self.cols else None

    def append(self, rows: Rows, settled: bool = False) -> None:
        """Adds slots, exact until the next `settle`; with `settled`, those that are due are encoded as they come."""
        m = rows.n
        if m == 0:
            return
        if self.kind.fold:
            rows = self._folded(rows)
            m = 1
        self._place(rows)
        for name in (self.cols.keys() | rows.cols.keys()) - {"index"}:
            if name not in self.cols:
                self._column(name, rows.cols[name].new_zeros((rows.cols[name].shape[0], self.n)))
            self._extend(name, rows.cols.get(name, self.cols[name].data.new_zeros((1, m))))
        for plane, x in ((self.key, rows.hidden if self.key.inputs else rows.k), (self.value, rows.v)):
            assert x is not None
            alone = not plane.codec.exact and not plane.codec.joint
            whole = settled and alone and plane.frozen == self.n and plane.rule.due(m) == m
            at = rows.index if plane.inputs or (whole and plane.tap) else 0
            plane.append(plane.codec.sized(m) if whole else EXACT, x, at)
        self.n += m

    @property
    def room(self) -> int:
        """How many slots can be added, one by one, before something has to be moved or encoded: 0 if a tail is shared or a column grows."""
        if self.cols.keys() - {"index"} or self.kind.fold or self.kind.turn or self.kind.merge:
            return 0
        return min(self.key.room, self.value.room)

    def grown(self, n: int, at: int) -> None:
        """Takes notice of n slots that were written behind the last ones: the tokens from `at` on."""
        for plane in (self.key, self.value):
            plane.grown(n)
        if "index" in self.cols:
            self._next, self._late = at + n, self._late + n
        self.n += n

    def _place(self, rows: Rows) -> None:
        """Notes where in the text the slots stand; consecutive ones only as a number."""
        if isinstance(rows.index, int):
            if "index" not in self.cols and self.n in (0, rows.index - self.start):
                self.start = rows.index - self.n
                return
            if "index" in self.cols and (self._late == 0 or self._next == rows.index):
                self._next, self._late = rows.index + rows.n, self._late + rows.n
                return
        self._column("index", self.index if self.n else rows.where[:, :0])
        self._extend("index", rows.where)

    def _column(self, name: str, first: Tensor) -> None:
        if name not in self.cols:
            self.cols[name] = Buffer(first)

    def _extend(self, name: str, x: Tensor) -> None:
        held = self.cols[name]
        if held.data.shape[0] == 1 and x.shape[0] > 1:
            held = self.cols[name] = Buffer(held.view.expand(x.shape[0], -1))
        held.append(x.to(held.data.dtype).expand(held.data.shape[0], -1))

    def _folded(self, rows: Rows) -> Rows:
        if self.n:
            held = self.read(torch.zeros(rows.k.shape[0], 1, dtype=torch.long, device=rows.k.device))
            rows = held.cat(rows)
            self.clear()
        return rows.mean()

    def clear(self) -> None:
        """Drops all slots and frees their bytes."""
        self.key.runs, self.value.runs, self.cols, self.n, self._late = [], [], {}, 0, 0
        self.moves += 1

    def read(self, slots: Tensor) -> Rows:
        """The slots [h, r] as rows, keys and values decoded."""
        index = self.index
        cols = {c: gather(b.view, slots) for c, b in self.cols.items() if c != "index"}
        return Rows(self.key.rows(slots), self.value.rows(slots), gather(index, slots), cols)

    def write(self, slots: Tensor, rows: Rows) -> None:
        """Puts rows in the place of the slots [h, r] of an exact segment; columns that they lack stay as they are.

        Raises CacheError if some slots are encoded: nothing is encoded twice.
        """
        if self.frozen:
            raise CacheError(
                f"slots would be merged into {self.frozen} that are encoded already, and nothing is encoded twice. With a codec, "
                "feed the prompt in one forward and one turn, or use the merging recipe alone."
            )
        self.own()
        self.key.write(slots, rows.k)
        self.value.write(slots, rows.v)
        for name, x in rows.cols.items():
            if name not in self.cols:
                self._column(name, x.new_zeros((len(x), self.n)))
            held = self.cols[name]
            if held.data.shape[0] < len(slots):
                held = self.cols[name] = Buffer(held.view.expand(len(slots), -1))
            held.view.scatter_(1, slots, x.to(held.data.dtype))

    def keep(self, slots: Tensor) -> None:
        """Drops all but the slots [h, r] (ascending; whole units where frozen) and frees their bytes."""
        if slots.shape[1] == self.n:
            return
        if slots.shape[1] == 0:
            self.clear()
            return
        gone = self.n - slots.shape[1]
        # elsewhere than on a CPU, looking would mean to wait for the device
        if self.consecutive and slots.device.type == "cpu" and bool((slots[:, 0] == gone).all()):
            self.drop_front(gone)
            return
        if gone * 8 <= self.n and self._free:
            self._fill_holes(_others(slots, self.n))
            return
        self.moves += 1
        self._column("index", self.index)
        for name, buffer in self.cols.items():
            self.cols[name] = Buffer(gather(buffer.view, slots))
        self.key.take(slots)
        self.value.take(slots)
        self.n = slots.shape[1]

    def drop(self, slots: Tensor) -> None:
        """Drops the slots [h, r] (ascending; whole units where frozen) and frees their bytes."""
        r = slots.shape[1]
        if r * 8 > self.n or self.consecutive or not self._free:
            self.keep(_others(slots, self.n))
        elif r:
            self._fill_holes(slots)

    @property
    def _free(self) -> bool:
        """Whether slots may change places."""
        return self.key.writable and self.value.writable and self.kind.select is None

    @property
    def consecutive(self) -> bool:
        """Whether the slots are consecutive in the text and exact, so that the first ones can be dropped at no cost."""
        return "index" not in self.cols and self.key.writable and self.value.writable

    def drop_front(self, count: int) -> None:
        """Drops the first slots of a `consecutive` segment."""
        for buffer in (self.key.runs[0].fields["x"], self.value.runs[0].fields["x"], *self.cols.values()):
            buffer.drop_front(count)
        self.start, self.n, self.moves = self.start + count, self.n - count, self.moves + 1

    def own(self) -> None:
        """Before slots leave: what a fork shares and is exact is copied, once."""
        self.key.own()
        self.value.own()

    def _fill_holes(self, gone: Tensor) -> None:
        """Few slots [h, r] leave an exact segment: the last ones move into the holes, O(dropped) instead of O(held)."""
        h, r = gone.shape
        left = self.n - r
        self.moves += 1
        self._column("index", self.index)
        late = torch.arange(left, self.n, device=gone.device).expand(h, -1)
        if r > 1:  # of the last ones those that stay come first, as many as there are holes in front of them
            leaving = torch.zeros(h, self.n, dtype=torch.bool, device=gone.device).scatter_(1, gone, True)
            late = late.gather(1, leaving[:, left:].byte().argsort(dim=-1, stable=True))
        for buffer in (self.key.runs[0].fields["x"], self.value.runs[0].fields["x"]):
            _put(buffer, gone, late, left)
        for name, buffer in self.cols.items():
            if buffer.data.shape[0] != h:
                buffer = self.cols[name] = Buffer(buffer.view.expand(h, -1))
            _put(buffer, gone, late, left)
        self.n = left

    def settle(self, decoding: bool = False) -> None:
        """Freezes what is due in both planes."""
        self.key.settle(self.places, decoding)
        self.value.settle(self.places, decoding)

    def places(self, start: int, stop: int) -> int | Tensor:
        """Text index of the slots [start, stop): of the first where they are consecutive, else of each, [h or 1, n]."""
        return self.start + start if "index" not in self.cols else self.index[:, start:stop]

    def units(self) -> list[tuple[int, int, int]]:
        """(start, stop, unit) of the stretches of encoded slots that are freed `unit` at a time, unit > 1."""
        keys, values = ([x for x in plane.stretches() if x[2] > 1] for plane in (self.key, self.value))
        if not keys or not values:
            return keys or values
        if [x[:2] for x in keys] == [x[:2] for x in values]:
            return [max(a, b) for a, b in zip(keys, values, strict=True)]
        return [(0, max(keys[-1][1], values[-1][1]), self.kind.unit)]

    def _staying(self, length: int) -> Tensor:
        """Which slots are left of the first `length` tokens, [h or 1, n] bool: all of a unit that is cut in half."""
        stay = self.index < length
        for start, stop, unit in self.units():
            part = stay[:, start:stop].unflatten(1, (-1, unit)).any(-1)
            stay[:, start:stop] = part.repeat_interleave(unit, 1)
        return stay

    def marks(self, length: int) -> Tensor:
        """How many slots of each stretch `truncate` would leave each head, [h or 1, stretches]."""
        ends = sorted({stop for plane in (self.key, self.value) for _, stop, _ in plane.stretches()})
        return self._staying(length).cumsum(-1)[:, [end - 1 for end in ends]]

    def truncate(self, length: int) -> None:
        """Drops slots whose text index is `length` or more, equally many of each head's in each stretch.

        A unit that is cut in half keeps its dead slots, hidden.
        """
        index, stay = self.index, self._staying(length)
        dead = stay & (index >= length)
        if bool(dead.any()):
            logw = self.column("logw")
            logw = torch.zeros(index.shape[0], self.n, device=index.device) if logw is None else logw
            self.cols["logw"] = Buffer(logw.masked_fill(dead, -torch.inf))
        if bool(stay.all()):
            return
        stay = stay.expand(self.heads, -1)
        self.keep(stay.nonzero()[:, 1].unflatten(0, (self.heads, -1)))

    def of_heads(self, at: Tensor) -> Segment:
        """A new segment of some of the heads."""
        self._catch_up()
        twin = Segment(self.kind)
        twin.n, twin.start = self.n, self.start
        for mine, its in ((self.key, twin.key), (self.value, twin.value)):
            its.runs = [run.heads(at) for run in mine.runs]
            its.const, its.fitted = {name: of_heads(x, at) for name, x in mine.const.items()}, mine.fitted
        twin.cols = {c: Buffer(b.view if b.data.shape[0] == 1 else b.view[at]) for c, b in self.cols.items()}
        return twin

    def fork(self) -> Segment:
        """A segment that shares the stored slots: both sides go on in runs of their own."""
        self._catch_up()
        twin = Segment(self.kind)
        twin.n, twin.start = self.n, self.start
        for mine, its in ((self.key, twin.key), (self.value, twin.value)):
            for run in mine.runs:
                run.sealed = True
            its.runs, its.const, its.fitted = list(mine.runs), mine.const, mine.fitted
        twin.cols = {name: Buffer(buffer.view) for name, buffer in self.cols.items()}
        return twin


def _others(slots: Tensor, n: int) -> Tensor:
    """The other ones of n slots than these [h, r], both ascending: [h, n - r]."""
    h, r = slots.shape
    before = slots - torch.arange(r, device=slots.device)  # others in front of each
    at = torch.arange(n - r, device=slots.device).expand(h, -1).contiguous()
    return at + torch.searchsorted(before, at, right=True)


def _put(buffer: Buffer, holes: Tensor, late: Tensor, left: int) -> None:
    """Rows `late` move into `holes` [h, r]; then all but the first `left` rows are forgotten."""
    x = buffer.view
    beside = (*holes.shape, *(1,) * (x.dim() - 2))
    holes, late = (at.reshape(beside).expand(*at.shape, *x.shape[2:]) for at in (holes, late))
    x.scatter_(1, holes, x.gather(1, late))
    buffer.cut(left)
