"""One plane of a segment, its keys or its values: a list of runs, the frozen ones first, the exact tail last."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const
from kvloom.core.codec import Plane as Which
from kvloom.core.kind import EXACT, Kind, Tail
from kvloom.core.run import Run, gather
from kvloom.core.tap import Inputs, InputValues

__all__ = ["SMALL", "Mirror", "Plane"]

SMALL = 256  # a sealed run below this many slots is copied when it grows again; a longer one is left shared


class Plane:
    """The runs of keys or of values."""

    mirrors: ClassVar[bool] = False  # whether another plane holds what is read here

    def __init__(self, kind: Kind, which: Which) -> None:
        self.which, key = which, which == "key"
        self.codec, self.rule = (kind.key, kind.key_tail) if key else (kind.value, kind.value_tail)
        self.const: Const = kind.key_const if key else kind.value_const
        self.tap = kind.tap if key else None
        self.fitted = False
        self.runs: list[Run] = []

    @property
    def n(self) -> int:
        return sum(run.n for run in self.runs)

    @property
    def frozen(self) -> int:
        return sum(run.n for run in self.runs if not run.codec.exact)

    def stretches(self) -> list[tuple[int, int, int]]:
        """(start, stop, unit) of every run."""
        found, at = [], 0
        for run in self.runs:
            found.append((at, at + run.n, run.codec.unit))
            at += run.n
        return found

    @property
    def inputs(self) -> bool:
        """Whether the plane holds a layer's inputs, exact ones too: what is read is made of them."""
        return isinstance(self.tap, Inputs)

    def dense(self, start: int, stop: int) -> Tensor:
        """The slots [start, stop), decoded; a view where they lie in one exact run."""
        if len(self.runs) == 1 and self.runs[0].codec.exact and not self.inputs:
            return self.runs[0].fields["x"].rows(start, stop)
        parts, at = [], 0
        for run in self.runs:
            a, b = max(start - at, 0), min(stop - at, run.n)
            if a < b:
                unit = run.codec.unit
                x = run.read(a // unit * unit, -(-b // unit) * unit)
                parts.append(x[:, a % unit : a % unit + b - a])
            at += run.n
        return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[-1].dtype) for part in parts], 1)

    @property
    def flow(self) -> Run | None:
        """The run that takes a row of the exact tail for each one that comes, if kernels can do that."""
        if not (
            self.codec.flows and self.rule.every == 1 and self.rule.decode and self.tap is None and len(self.runs) > 1
        ):
            return None
        last, run = self.runs[-1], self.runs[-2]
        ready = (
            last.codec is EXACT
            and last.n == self.rule.keep
            and run.codec is self.codec
            and run.grows
            and not run.sealed
        )
        return run if ready else None

    @property
    def room(self) -> int:
        """How many slots the exact tail takes, one by one, before something has to move, or to be encoded other than in `flow`."""
        last, flow = self.runs[-1] if self.runs else None, self.flow
        if last is None or last.codec is not EXACT or last.sealed or last.tap is not None:
            return 0
        free = last.fields["x"].free
        if self.codec.exact:
            return free
        if flow is not None:
            return min(free, *(buffer.free for buffer in flow.fields.values()))
        tail = self.n - self.frozen
        return next((i for i in range(free) if self.rule.due(tail + i + 1, True)), free)

    def grown(self, n: int) -> None:
        """Takes notice of n slots that kernels have added."""
        x, flow = self.runs[-1].fields["x"], self.flow
        x.n += n
        if flow is not None:
            for buffer in flow.fields.values():
                buffer.n += n
            x.drop_front(n)

    @property
    def unfit(self) -> bool:
        """Whether the codec still has to take constants from the rows at hand."""
        return self.codec.fits and not self.fitted

    def append(self, codec: Codec, x: Tensor, at: int | Tensor = 0) -> None:
        """Encodes x [h, m, D] and puts it behind the last run of that codec. `at`: places in the text, for a tap."""
        if codec is EXACT and self.runs and self.runs[-1].codec is EXACT and not self.runs[-1].sealed:
            self.runs[-1].append({"x": x}, at)
            return
        tap = None if codec.exact and not self.inputs else self.tap
        if tap is not None:
            where = at if isinstance(at, Tensor) else torch.arange(at, at + x.shape[1], device=x.device)[None]
            x = tap.off(x, where)
        block = codec.encode(x, self.const)
        run = self.growing(codec)
        if run is None:
            self.insert(codec, block, at)
        else:
            run.append(block, at)

    def growing(self, codec: Codec) -> Run | None:
        """The last run of that codec, if slots can be added to it."""
        last = next((i for i in reversed(range(len(self.runs))) if self.runs[i].codec is codec), None)
        if last is None or not self.runs[last].grows:
            return None
        if self.runs[last].sealed and self.runs[last].n < SMALL:
            self.runs[last] = self.runs[last].copy()  # short and shared by a fork: cheaper than to attend apart
        return None if self.runs[last].sealed else self.runs[last]

    def insert(self, codec: Codec, block: Block, at: int | Tensor = 0) -> Run:
        """A new run behind the last encoded one; behind all, if it is exact."""
        tap = self.tap if self.inputs or not codec.exact else None
        run = Run(codec, block, {} if codec.exact else self.const, tap, at)
        frozen = sum(not run.codec.exact for run in self.runs)
        self.runs.insert(len(self.runs) if codec is EXACT else frozen, run)
        return run

    def settle(self, index: Callable[[int, int], int | Tensor], decoding: bool) -> None:
        """Freezes what is due. Nothing is ever encoded twice. `index` gives the places in the text of slots [a, b)."""
        if self.codec.exact or self.codec.joint:
            return
        done = self.frozen
        due = self.rule.due(self.n - done, decoding)
        if due and self.codec.pays([self.oldest(due)]):
            at = 0 if self.tap is None else index(done, done + due)
            self.append(self.codec.sized(due), self.oldest(due), at)
            self.freed(due)

    def oldest(self, count: int) -> Tensor:
        """The first exact slots, [h, count, D]; a view."""
        tail = [run for run in self.runs if run.codec.exact]
        if len(tail) > 1 or tail[0].sealed:
            exact = torch.cat([run.fields["x"].view for run in tail], 1)
            moved = any(run.at is not None for run in tail)
            at = torch.cat([run.places(0, run.n) for run in tail], 1) if moved else tail[0].start
            self.runs = [run for run in self.runs if not run.codec.exact]
            self.append(EXACT, exact, at)
        return self.runs[-1].fields["x"].view[:, :count]

    def freed(self, count: int) -> None:
        """Forgets the `oldest` exact slots, which have been encoded."""
        if count == self.runs[-1].n:
            self.runs.pop()
        else:
            self.runs[-1].drop_front(count)

    def take(self, slots: Tensor) -> None:
        """Keeps the slots [h, r], ascending and, in frozen runs, in whole units; heads keep equally many per run."""
        if len(self.runs) == 1:  # nothing to count, so no wait for a GPU
            self.runs = [self.runs[0].take(slots)]
            return
        kept, start = [], 0
        for run in self.runs:
            here = (slots >= start) & (slots < start + run.n)
            count = int(here[0].sum())
            if count == run.n:
                kept.append(run)
            elif count:
                kept.append(run.take(slots[here].unflatten(0, (len(slots), count)) - start))
            start += run.n
        self.runs = kept

    def rows(self, slots: Tensor) -> Tensor:
        """The slots [h, r], decoded: [h, r, D]."""
        if len(self.runs) == 1 and self.runs[0].codec.exact:
            x = self.runs[0].decode()
            return gather(x, slots.expand(len(x), -1))
        parts, start = [], 0
        for run in self.runs:
            here = (slots >= start) & (slots < start + run.n)
            if run.codec.exact:
                x = gather(run.decode(), (slots - start).clamp(0, run.n - 1))
            else:  # decode only the units that are asked for
                unit = run.codec.unit
                span = ((slots - start).clamp(0, run.n - 1) // unit)[..., None] * unit
                whole = (span + torch.arange(unit, device=slots.device)).flatten(1)
                x = run.take(whole).decode().unflatten(1, (-1, unit))
                offset = (slots - start).clamp(0, run.n - 1) % unit
                x = x.gather(2, offset[..., None, None].expand(-1, -1, 1, x.shape[-1]))[:, :, 0]
            parts.append((here, x))
            start += run.n
        out = parts[0][1]
        for here, x in parts[1:]:
            out = torch.where(here[..., None], x, out)
        return out

    def own(self) -> None:
        """Copies exact slots that a fork shares into a run of one's own, once, so that what leaves costs no copy each time."""
        if self.runs and not self.frozen and (len(self.runs) > 1 or self.runs[0].sealed):
            self.runs = [Run(EXACT, {"x": self.dense(0, self.n)}, {})]

    def write(self, slots: Tensor, x: Tensor) -> None:
        """Puts x [h, r, D] in the place of the slots [h, r] of an exact run of one's own."""
        held = self.runs[0].fields["x"].view
        held.scatter_(1, slots[..., None].expand_as(x), x.to(held.dtype))

    @property
    def writable(self) -> bool:
        """Whether slots may change places: what is encoded later must stay in order."""
        return self.codec.exact and len(self.runs) == 1 and not self.runs[0].sealed and not self.inputs


class Mirror(Plane):
    """The values of a segment whose key plane holds a layer's inputs: read from there, nothing is stored."""

    mirrors = True

    def __init__(self, key: Plane, tap: InputValues) -> None:
        self.which, self.key, self.reader = "value", key, tap
        self.codec, self.rule, self.const, self.tap, self.fitted = EXACT, Tail(), {}, tap, True

    @property
    def runs(self) -> list[Run]:
        return [run.seen_by(self.reader) for run in self.key.runs]

    @runs.setter
    def runs(self, runs: list[Run]) -> None:
        """They are the key plane's, whatever becomes of them there."""

    def append(self, codec: Codec, x: Tensor, at: int | Tensor = 0) -> None:
        """The key plane has taken the slots."""

    def settle(self, index: Callable[[int, int], int | Tensor], decoding: bool) -> None:
        """The key plane freezes."""

    def take(self, slots: Tensor) -> None:
        """The key plane gives up slots."""

    def own(self) -> None:
        """Nothing is held here."""

    @property
    def writable(self) -> bool:
        return False
