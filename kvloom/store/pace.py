"""CacheGen's streaming (arXiv 2310.07240, section 5.3): how each chunk of a context is fetched so that the first token is on time.

`choose` decides for one chunk from what is known; `load` fetches chunks one after another and measures as it goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvloom.errors import DamagedFrame, StoreError
from kvloom.store.frame import Place
from kvloom.store.identity import ChunkKey
from kvloom.store.store import Store
from kvloom.store.variants import key_of, opened

__all__ = ["TEXT", "Loaded", "choose", "load"]

TEXT = "text"  # the choice to compute a chunk from its tokens
Tensors = Mapping[Place, Tensor]
Recompute = Callable[[ChunkKey, "list[Loaded]"], Tensors]


@dataclass(frozen=True)
class Loaded:
    """A chunk as it came: how ("text" or a coding), bytes read, and seconds taken, decoding included."""

    key: ChunkKey
    choice: str
    tensors: Tensors
    nbytes: int
    seconds: float


def choose(
    sizes: Sequence[Mapping[str, int]],
    left: float,
    bandwidth: float | None,
    text: Sequence[float] | None = None,
) -> str:
    """How to fetch the next chunk.

    sizes: bytes of each chunk that is still to come, the next one first, by coding, the best coding first. left: seconds
    until they all have to be there. bandwidth: bytes per second; None: not known yet. text: seconds to compute each chunk;
    None: it cannot be computed.

    The best coding in which all that is to come would arrive in time; where none would, what takes the least time. Text where
    it is as quick as that coding, for it loses nothing. Without a bandwidth, the coding in the middle.
    """
    if not sizes:
        raise StoreError("sizes=[]: there is no chunk to choose for.")
    if not bandwidth or bandwidth < 0:
        names = list(sizes[0])
        unknown = bandwidth is None and names
        return names[len(names) // 2] if unknown or (names and text is None) else _text(text)
    computing = float("inf") if text is None else sum(text)
    best, least = "", float("inf")
    for name in sizes[0]:
        # a later chunk that lacks this coding comes in the smallest it has, or as text
        taken = sum(
            min(chunk.get(name, min(chunk.values(), default=float("inf"))) / bandwidth, _at(text, i, chunk))
            for i, chunk in enumerate(sizes)
        )
        if taken <= left:
            return TEXT if computing <= taken else name
        if taken < least:
            best, least = name, taken
    return best if best and least < computing else _text(text)


def _at(text: Sequence[float] | None, i: int, chunk: Mapping[str, int]) -> float:
    """Seconds to compute a chunk, where that is the only way to get it."""
    return float("inf") if chunk or text is None else text[i]


def _text(text: Sequence[float] | None) -> str:
    if text is None:
        raise StoreError("the chunk is not stored in any of the codings, and text=None: it cannot be computed either.")
    return TEXT


def load(
    store: Store,
    keys: Sequence[ChunkKey],
    codings: Sequence[str],
    ttft: float,
    *,
    recompute: Recompute | None = None,
    text: Sequence[float] | None = None,
    bandwidth: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Loaded]:
    """Fetches chunks of a text in order, in about `ttft` seconds, each in a coding that `choose` picks, best coding first.

    `recompute(key, before)` computes a chunk from its tokens, after the chunks before it as they were loaded; `text` says how
    many seconds each takes. `bandwidth`: bytes per second to begin with; from the first chunk on it is what the last one
    had, decoding included. A chunk that is lost on the way is looked for in the other codings, then computed; where that
    cannot be, the list ends before it. Raises StoreError for codings or times that do not fit.
    """
    if text is not None and len(text) != len(keys):
        raise StoreError(f"text={len(text)} times for {len(keys)} chunks; give the seconds of each.")
    if not codings or ttft <= 0:
        raise StoreError(f"codings={list(codings)}, ttft={ttft}: give one coding or more, and seconds above 0.")
    sizes: list[dict[str, int]] = []
    for key in keys:
        found = {coding: store.size(key_of(key, coding)) for coding in codings}
        sizes.append({coding: n for coding, n in found.items() if n is not None})
    costs = None if recompute is None else list(text) if text is not None else [float("inf")] * len(keys)
    end = clock() + ttft
    done: list[Loaded] = []
    for i, key in enumerate(keys):
        if not sizes[i] and costs is None:
            break
        wanted = choose(sizes[i:], end - clock(), bandwidth, None if costs is None else costs[i:])
        one = _fetch(store, key, wanted, sizes[i], end, recompute, done, clock)
        if one is None:
            break
        if one.nbytes and one.seconds > 0:
            bandwidth = one.nbytes / one.seconds
        done.append(one)
    return done


def _fetch(
    store: Store,
    key: ChunkKey,
    wanted: str,
    sizes: Mapping[str, int],
    end: float,
    recompute: Recompute | None,
    before: list[Loaded],
    clock: Callable[[], float],
) -> Loaded | None:
    """One chunk as wanted, or in the next coding that is there; smaller ones first, for time was lost."""
    others = sorted((coding for coding in sizes if coding != wanted), key=lambda coding: sizes[coding])
    tries = [] if wanted == TEXT else [wanted, *others]
    if wanted == TEXT and recompute is None:
        tries = others
    for coding in tries:
        start = clock()
        wait = None if recompute is None else max(end - start, store.deadline / 10)
        hit = store.find(key_of(key, coding), deadline=wait)
        if hit is None:
            continue
        try:
            tensors = opened(hit.tensors, coding)
        except DamagedFrame:  # a valid frame that no encoder wrote
            continue
        return Loaded(key, coding, tensors, hit.nbytes, clock() - start)
    if recompute is None:
        return None
    start = clock()
    return Loaded(key, TEXT, recompute(key, before), 0, clock() - start)
