"""What is done to a store under torture: the faults, the codings that chunks are put with, and a writer that is killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvloom.errors import TierError
from kvloom.segments.minmax import MinMax
from kvloom.store.frame import Place, pack
from kvloom.store.identity import ChunkKey
from kvloom.store.store import open_tier
from kvloom.store.tier import Deadline, Facts
from kvloom.store.variants import stored

__all__ = ["CODINGS", "FAULTS", "TOKENS", "Coded", "Fault", "frame_of", "kill_a_writer"]

TOKENS = 32  # of a chunk
# what a process is made with: a plain fork would copy the locks of this one's threads
_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PUT = 5.0  # seconds that a put may take here


@dataclass(frozen=True)
class Fault:
    """`injected`: a fault of FaultyTier, on these sides. Else `other`: fields of another's identity. Else a killed writer."""

    counters: tuple[str, ...]
    injected: str = ""
    sides: tuple[str, ...] = ("get", "put")
    other: tuple[tuple[str, Any], ...] = ()


FAULTS = {
    "down": Fault(("errors",), "cut"),
    "slow": Fault(("late",), "delay"),
    "torn": Fault(("damaged",), "tear"),
    "flipped bit": Fault(("damaged",), "flip"),
    "zeroed page": Fault(("damaged",), "zero"),
    "truncated": Fault(("damaged",), "truncate"),
    "appended": Fault(("damaged",), "append"),
    "wrong dtype": Fault(("wrong",), other=(("dtype", "float16"),)),
    "wrong layout": Fault(("wrong",), other=(("layout", ((4, 16, 16),) * 2),)),
    "wrong model weights": Fault(("wrong",), other=(("weights", "of another model"),)),
    "wrong adapter": Fault(("wrong",), other=(("adapter", "of another user"),)),
    "wrong tenant": Fault(("wrong",), other=(("salt", "of another tenant"),)),
    "old version": Fault(("damaged",), "version"),
    "disk full": Fault(("full",), "full", ("put",)),
    "killed while writing": Fault(("hits", "misses")),
}


class Coded(NamedTuple):
    """What is put, and the coding that it is put with."""

    tensors: Mapping[Place, Tensor]
    coding: str = "raw"


def _dense(rng: torch.Generator) -> dict[Place, Tensor]:
    places = [Place(layer, plane) for layer in range(2) for plane in ("key", "value")]
    return {place: (torch.randn(2, 2 * TOKENS, 32, generator=rng) * 8).round().bfloat16() for place in places}


def _packed(rng: torch.Generator) -> dict[Place, Tensor]:
    """As `kivi(bits=4)` holds them: codes, scales and zeros."""
    codecs = {"key": MinMax(4, 32, "tokens"), "value": MinMax(4, 32, "channels")}
    blocks = {place: codecs[place.plane].encode(x, {}) for place, x in _dense(rng).items()}
    return {Place(*place[:2], name): x for place, block in blocks.items() for name, x in block.items()}


CODINGS: dict[str, Callable[[torch.Generator], Coded]] = {
    "raw": lambda rng: Coded({place: x + torch.randn(x.shape, generator=rng) for place, x in _dense(rng).items()}),
    "packed": lambda rng: Coded(_packed(rng)),
    "zstd": lambda rng: Coded(_dense(rng), "zstd"),
    "rans": lambda rng: Coded(_dense(rng), "rans"),
    "cachegen": lambda rng: Coded(_dense(rng), "cachegen(level=2)"),
}


def frame_of(key: ChunkKey, coded: Coded) -> tuple[str, bytes]:
    """The name that a chunk has in a tier, and its bytes there."""
    held, tensors, pages, notes = stored(key, coded.tensors, coded.coding, {})
    return held.digest, bytes(pack(held, tensors, notes=notes, coding=pages))


def _write(url: str, chunks: Sequence[tuple[str, bytes]], report: Any, environment: dict[str, str]) -> None:
    """What a process does until it is killed: it puts and removes chunks, and says so before each."""
    os.environ.update(environment)  # a process made from the fork server has that one's, which may be older
    tier = open_tier(url)
    while True:
        for digest, data in chunks:
            report.send(digest)
            tier.put(digest, data, Facts(), Deadline(PUT))
        for digest, _ in chunks:
            tier.delete(digest, Deadline(PUT))


def kill_a_writer(url: str, chunks: Sequence[tuple[str, bytes]], rng: random.Random) -> None:
    """A process of its own is killed while it puts and removes these chunks. Raises TierError if it does not get to that."""
    context: Any = multiprocessing.get_context(_START)
    if _START == "forkserver":
        context.set_forkserver_preload([__name__])
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_write, args=(url, chunks, writer, dict(os.environ)), daemon=True)
    process.start()
    writer.close()
    for _ in range(rng.randint(1, 2 * len(chunks))):
        if not reader.poll(300):
            raise TierError(f"{url}: the process that writes says nothing.")
        reader.recv()
    time.sleep(rng.random() * 0.003)
    process.kill()  # SIGKILL, where there is such a thing
    process.join()
