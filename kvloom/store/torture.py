"""Every fault, on every kind of tier, with every coding: what is served is what was put, bit for bit, or nothing.

`kvloom store torture` runs it; tests run it against real servers. Faults come from a seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvloom.store.faults import FaultyTier
from kvloom.store.files import FileTier
from kvloom.store.harm import CODINGS, FAULTS, TOKENS, Coded, Fault, frame_of, kill_a_writer
from kvloom.store.identity import ChunkKey, Identity, chunk_keys
from kvloom.store.memory import MemoryTier
from kvloom.store.store import Store, open_tier
from kvloom.store.tier import Deadline, Facts, Tier
from kvloom.store.variants import key_of

__all__ = ["CODINGS", "FAULTS", "Row", "run", "steps", "table"]

DEADLINE = 5.0  # seconds of each call here
SHORT = 0.15  # the same, where being slow is the fault
SLACK = 2.0  # seconds that a busy machine may add


@dataclass(frozen=True)
class Row:
    """One fault on one tier with one coding. `seconds`: of the slowest call. `broken`: the rule that did not hold, or ""."""

    tier: str
    fault: str
    coding: str
    exact: int
    misses: int
    counters: dict[str, int]
    log: str
    seconds: float
    broken: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class _Case:
    """A store over one tier, and what happens to it."""

    def __init__(self, tier: Tier, key: ChunkKey, coded: Coded, deadline: float) -> None:
        self.key, self.coded, self.deadline = key, coded, deadline
        self.store, self.tier = Store(tier, deadline=deadline, failures=9, pause=0.0), tier
        with Store(MemoryTier()) as plain:  # what a hit gives without a fault
            plain.put(key, coded.tensors, coding=coded.coding)
            self.want = plain.get(key, coding=coded.coding) or {}
        self.exact = self.missed = 0
        self.counts: dict[str, int | None] = {}
        self.slowest = 0.0
        self.broken: list[str] = []

    def _timed(self, call: Callable[[], Any]) -> Any:
        before = time.monotonic()
        found = call()
        took = time.monotonic() - before
        self.slowest = max(self.slowest, took)
        # one deadline for the tier, one for removing what is bad
        if took > 2 * self.deadline + SLACK:
            self.broken.append(f"a call took {took:.1f} s; its deadline was {self.deadline} s")
        return found

    def put(self) -> None:
        self._timed(lambda: self.store.put(self.key, self.coded.tensors, coding=self.coded.coding))

    def get(self, layers: list[int] | None = None, reuse: bool = False) -> bool:
        """Whether it is a hit; what is neither exact nor a miss is noted. `reuse`: into buffers that are there."""
        want = {place: x for place, x in self.want.items() if layers is None or place.layer in layers}
        into = {place: torch.zeros_like(x) for place, x in want.items()} if reuse else None
        got = self._timed(lambda: self.store.get(self.key, layers, into=into, coding=self.coded.coding))
        if got is None:
            self.missed += 1
            return False
        self.exact += 1
        if into is not None and any(got[place] is not x for place, x in into.items()):
            self.broken.append("the buffers were not used")
        if got.keys() != want.keys() or not all(_same(got[place], want[place]) for place in want):
            self.broken.append("something else was served")
        return True

    def well(self) -> None:
        """Afterwards, the chunk can be stored and read again."""
        before = self.exact, self.missed
        self.counts = self.counts or self.store.stat()[self.tier.name]
        for _ in range(2):  # the first may find what the fault left
            self.store.put(self.key, self.coded.tensors, coding=self.coded.coding)
            found = self.get()
        self.exact, self.missed = before
        if not found:
            self.broken.append("no hit after the fault")


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


@contextlib.contextmanager
def _lines() -> Iterator[list[str]]:
    """What the store logs meanwhile, and nobody else sees."""
    logger, found = logging.getLogger("kvloom.store"), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _killed(url: str, key: ChunkKey, coded: Coded, rng: random.Random) -> tuple[_Case, str]:
    keys = [key, *(dataclasses.replace(key, start=start) for start in (TOKENS, 2 * TOKENS))]
    kill_a_writer(url, [frame_of(k, coded) for k in keys], rng)
    tier = open_tier(url)
    case = _Case(tier, key, coded, DEADLINE)
    for k in keys:
        case.key = k
        case.get()
    if isinstance(tier, FileTier):
        tier.clock = lambda: time.time() + 3600.0  # when the writer's reservation has run out
    for k in keys:
        case.key = k
        case.well()
        tier.delete(key_of(k, coded.coding).digest, Deadline(DEADLINE))
    return case, ""


def _injected(url: str, fault: Fault, side: str, key: ChunkKey, coded: Coded, seed: int) -> tuple[_Case, str]:
    tier = FaultyTier(open_tier(url), [fault.injected], seed=seed, on=side, delay=60.0)
    name = key_of(key, coded.coding).digest
    tier.inner.delete(name, Deadline(DEADLINE))
    case = _Case(tier, key, coded, SHORT if fault.injected == "delay" else DEADLINE)
    case.put()
    case.get([1])
    case.get(reuse=seed % 2 == 0)
    silent = "" if tier.happened.get(fault.injected) else "the fault did not happen"
    tier.calm()
    case.store.deadline = DEADLINE
    case.well()
    tier.delete(name, Deadline(DEADLINE))
    return case, silent


def _other(url: str, fault: Fault, key: ChunkKey, coded: Coded, identity: Identity) -> tuple[_Case, str]:
    """Another's chunk under our key, intact, as a mistake or an attacker would put it there."""
    theirs = chunk_keys(dataclasses.replace(identity, **dict(fault.other)), key.tokens, TOKENS)[0]
    tier = open_tier(url)
    name = key_of(key, coded.coding).digest
    case = _Case(tier, key, coded, DEADLINE)
    for reuse in (False, True):
        tier.delete(name, Deadline(DEADLINE))
        tier.put(name, frame_of(theirs, coded)[1], Facts(), Deadline(DEADLINE))
        if case.store.get(theirs, coding=coded.coding) is not None:
            case.broken.append("found under another's key")
        case.get(reuse=reuse)
    case.well()
    tier.delete(name, Deadline(DEADLINE))
    return case, ""


def _row(url: str, name: str, coding: str, seed: int) -> list[Row]:
    rng = random.Random(f"{seed} {name} {coding}")
    identity = Identity(f"torture {seed}", "tokenizer", "float32", ((2, 32, 32),) * 2, recipe=coding)
    key = chunk_keys(identity, [rng.randrange(50_000) for _ in range(TOKENS)], TOKENS)[0]
    coded = CODINGS[coding](torch.Generator().manual_seed(rng.randrange(1 << 31)))
    fault, rows = FAULTS[name], []
    for side in fault.sides if fault.injected else ("",):
        with _lines() as lines:
            if fault.injected:
                case, broken = _injected(url, fault, side, key, coded, rng.randrange(1 << 31))
            elif fault.other:
                case, broken = _other(url, fault, key, coded, identity)
            else:
                case, broken = _killed(url, key, coded, rng)
            case.store.close()
        counts = {counter: n for counter, n in case.counts.items() if n}
        where = f"{name}, {'reading' if side == 'get' else 'writing'}" if len(fault.sides) > 1 and side else name
        if not any(counts.get(counter) for counter in fault.counters):
            case.broken.append(f"none of the counters {', '.join(fault.counters)} moved")
        if "hits" not in fault.counters and not lines:
            case.broken.append("no line in the log")
        moved = {k: counts[k] for k in counts if k in (*fault.counters, "damaged", "wrong", "errors", "late")}
        problems = "; ".join(filter(None, [broken, *case.broken]))
        log = lines[0] if lines else ""
        rows.append(
            Row(
                case.tier.name.removeprefix("faulty "),
                where,
                coding,
                case.exact,
                case.missed,
                moved,
                log,
                round(case.slowest, 4),
                problems,
            )
        )
    return rows


def steps(urls: Sequence[str], faults: Sequence[str], codings: Sequence[str]) -> int:
    """How often `run` tells."""
    return len(urls) * len(faults) * len(codings)


def run(
    urls: Sequence[str],
    faults: Sequence[str] = tuple(FAULTS),
    codings: Sequence[str] = tuple(CODINGS),
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Every fault on every tier with every coding. Chunks of its own come and go; others in the tiers are left alone.

    Raises TierError or StoreError for a tier that fails without a fault.
    """
    rows = []
    for url in urls:
        for name in faults:
            for coding in codings:
                tell(f"{name} on {url.partition('?')[0]}, {coding}")
                rows += _row(url, name, coding, seed)
    return rows


def table(rows: Sequence[Row]) -> Any:
    """Tier by tier and fault by fault: what was served, the counters that moved, the slowest call."""
    from rich import box
    from rich.table import Table

    out = Table(
        "tier", "fault", "codings", "served", "counted", "slowest", "", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.tier, row.fault), []).append(row)
    before = ""
    for (tier, fault), found in groups.items():
        counted = dict.fromkeys(name for row in found for name in row.counters)
        served = [f"{sum(r.exact for r in found)} exact", f"{sum(r.misses for r in found)} missed"]
        out.add_row(
            tier if tier != before else "",
            fault,
            ", ".join(row.coding for row in found),
            ", ".join(text for text in served if not text.startswith("0 ")),
            ", ".join(f"{sum(r.counters.get(name, 0) for r in found)} {name}" for name in counted),
            f"{max(row.seconds for row in found):.2f} s",
            "[green]held[/green]" if not any(row.broken for row in found) else "[red]BROKEN[/red]",
        )
        before = tier
    return out
