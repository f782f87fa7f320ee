"""Bits per number against what they cost in KL: the ways to store keys and values, over a model's own text.

Test conditions after Gao et al., arXiv 2412.04307: fixed texts, all side data counted, keys and values apart, the same texts for
every contender.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from kvloom.bench import show
from kvloom.bench.coding_ways import BASE, Contender, Planes, contenders
from kvloom.bench.timing import Tell, alternate, silent, threads
from kvloom.errors import KvloomError
from kvloom.lab.demo import TEXT
from kvloom.lab.measure import load_model
from kvloom.store.cachegen import CacheGen
from kvloom.store.coding import Coded, Plain, expand, squeeze
from kvloom.store.frame import Frame, Place, _bytes_of
from kvloom.store.frame import pack as frame_of
from kvloom.store.identity import ChunkKey, Identity, chunk_keys

__all__ = ["Coding", "Row", "Speed", "at_equal_kl", "run", "steps"]


@dataclass(frozen=True)
class Row:
    """One contender. bits: of a stored number, everything in the frame counted; pages: without header and filling.

    kl: nats per token of the continuation; low, high: least and most of a text. key, value: squared error over squared size.
    """

    name: str
    bits: float
    pages: float
    kl: float
    low: float
    high: float
    key: float
    value: float


@dataclass(frozen=True)
class Speed:
    """GB of bfloat16 keys and values per second, by threads."""

    name: str
    threads: int
    encode: float
    decode: float


@dataclass(frozen=True)
class Coding:
    """All rows; `saved`: (CacheGen's row, the quantizer, share of its bits that CacheGen saves at equal KL)."""

    model: str
    texts: int
    tokens: int
    block: int
    rows: list[Row]
    saved: list[tuple[str, str, float]]
    speeds: list[Speed]

    def table(self) -> Table:
        """A row for every contender."""
        columns = ("stored as", "bits", "pages only", "KL", "least", "most", "error of K", "of V")
        cells = [
            (
                r.name,
                f"{r.bits:.3f}",
                f"{r.pages:.3f}",
                f"{r.kl:.2e}",
                f"{r.low:.1e}",
                f"{r.high:.1e}",
                f"{r.key:.2e}",
                f"{r.value:.2e}",
            )
            for r in self.rows
        ]
        title = f"Bits per number and KL, {self.model}: {self.texts} texts, {self.tokens:,} tokens in chunks of {self.block}"
        return show.table(title, columns, cells)

    def notes(self) -> list[str]:
        """What CacheGen saves at equal KL, and how fast it is."""
        lines = [
            f"{ours} takes {100 * part:.0f} % fewer bits than {theirs} at equal KL" for ours, theirs, part in self.saved
        ]
        lines += [
            f"{s.name}, threads {s.threads}: encodes {s.encode:.3f}, decodes {s.decode:.3f} GB/s of bfloat16"
            for s in self.speeds
        ]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return show.about() | asdict(self)


def steps(texts: int, rounds: int) -> int:
    """How often `run` tells of a step."""
    return texts * len(contenders()) + (4 * (rounds + 1) if rounds else 0)


@torch.no_grad()
def run(name: str, texts: int, tokens: int, ahead: int, block: int, rounds: int, tell: Tell = silent) -> Coding:
    """Prefills each text, stores and loads its keys and values in every way, and reads on behind them.

    Raises KvloomError if `tokens` are no whole chunks, or fewer than the texts have.
    """
    if tokens % block or block % 64:
        raise KvloomError(
            f"--tokens {tokens} and --block {block}: give a block of 64 tokens or a multiple, and whole blocks."
        )
    model, tokenizer = load_model(name)
    ways = contenders()
    book = TEXT.read_text(encoding="utf-8")
    bits: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    costs: dict[str, list[float]] = {way: [] for way in ways}
    errors: dict[str, dict[str, list[float]]] = {way: {"key": [], "value": []} for way in ways}
    for i in range(texts):
        piece = book[len(book) * (i + 1) // (texts + 1) :][: 8 * (tokens + ahead)].partition("\n")[2]
        ids = torch.tensor(tokenizer.encode(piece, add_special_tokens=False)[: tokens + ahead])
        if len(ids) < tokens + ahead:
            raise KvloomError(f"--tokens {tokens}: the text has only {len(ids)}.")
        planes, base = _full(model, ids, tokens)
        keys = _keys(ids[:tokens].tolist(), block, planes)
        for way, encode in ways.items():
            tell(way)
            got, whole, pages = _round_trip(planes, keys, encode, block)
            numbers = sum(x.numel() for x in planes.values())
            bits[way].append((8 * whole / numbers, 8 * pages / numbers))
            logp = _behind(model, ids, tokens, got)
            costs[way].append(max(0.0, float((base.exp() * (base - logp)).sum(-1).mean())))
            for plane, found in errors[way].items():
                mine = [p for p in planes if p.plane == plane]
                found.append(
                    sum(float((got[p] - planes[p]).square().sum()) for p in mine)
                    / sum(float(planes[p].square().sum()) for p in mine)
                )
    rows = [
        Row(
            way, _mean([b for b, _ in bits[way]]), _mean([p for _, p in bits[way]]), _mean(costs[way]), min(costs[way]), max(costs[way]),
            _mean(errors[way]["key"]), _mean(errors[way]["value"]),
        )
        for way in ways
    ]  # fmt: skip
    return Coding(name, texts, tokens, block, rows, at_equal_kl(rows), _speeds(rounds, tell) if rounds else [])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _full(model: Any, ids: Tensor, tokens: int) -> tuple[Planes, Tensor]:
    """Keys and values of the first tokens, and log probabilities [ahead, V] behind them."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    model(ids[None, :tokens].to(model.device), past_key_values=cache, logits_to_keep=1)
    planes = {
        Place(i, plane): x[0].float().cpu()
        for i, layer in enumerate(cache.layers)
        for plane, x in (("key", layer.keys), ("value", layer.values))
    }
    return planes, _behind(model, ids, tokens, planes)


def _behind(model: Any, ids: Tensor, tokens: int, planes: Planes) -> Tensor:
    """Log probabilities [ahead, V] of reading on behind these keys and values."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    for i in range(len(planes) // 2):
        key, value = (planes[Place(i, plane)][None].to(model.device, model.dtype) for plane in ("key", "value"))
        cache.update(key, value, i)
    logits: Tensor = model(ids[None, tokens:].to(model.device), past_key_values=cache).logits[0]
    return logits.float().log_softmax(-1).cpu()


def _keys(tokens: list[int], block: int, planes: Planes) -> list[ChunkKey]:
    layout = tuple((x.shape[0], x.shape[2], x.shape[2]) for place, x in planes.items() if place.plane == "key")
    return chunk_keys(Identity("bench", "bench", "float32", layout), tokens, block)


def _round_trip(planes: Planes, keys: Sequence[ChunkKey], encode: Contender, block: int) -> tuple[Planes, int, int]:
    """What comes back, bytes of all frames, and of their pages alone."""
    parts: dict[Place, list[Tensor]] = {place: [] for place in planes}
    whole = pages = 0
    for i, key in enumerate(keys):
        tensors, coding, decode = encode({place: x[:, i * block : (i + 1) * block] for place, x in planes.items()})
        frame = Frame.open(frame_of(key, tensors, coding=coding))
        whole += frame.nbytes
        pages += sum(page.stored for page in frame.header.pages)
        for place, x in decode(frame.read()).items():
            parts[place].append(x)
    return {place: torch.cat(found, 1) for place, found in parts.items()}, whole, pages


def at_equal_kl(rows: Sequence[Row]) -> list[tuple[str, str, float]]:
    """What each of CacheGen's rows saves against quantizing, packing and zstd, where their KLs overlap.

    The bits of the quantizer at that KL lie on straight lines between its rows, over the logarithm of KL; nothing is
    extrapolated. CacheGen's own numbers, packed, have the same KL and need none of it.
    """
    found = []
    curves = {
        f"min-max/{group}, zstd": sorted(
            (r for r in rows if r.name.startswith("min-max") and r.name.endswith(f"/{group}, {BASE}")),
            key=lambda r: r.kl,
        )
        for group in (32, 64)
    }
    for row in rows:
        if not row.name.startswith("cachegen") or row.name.endswith("zstd") or not row.kl > 0:
            continue
        for name, curve in curves.items():
            for better, worse in pairwise(curve):
                if 0 < better.kl <= row.kl <= worse.kl and better.kl < worse.kl:
                    share = math.log(row.kl / better.kl) / math.log(worse.kl / better.kl)
                    theirs = better.bits + share * (worse.bits - better.bits)
                    found.append((row.name, name, 1 - row.bits / theirs))
        for other in rows:
            if other.name.endswith("packed, zstd") and row.name == other.name.replace("packed, zstd", "fitted"):
                found.append((row.name, other.name, 1 - row.bits / other.bits))
    return found


def _speeds(rounds: int, tell: Tell) -> list[Speed]:
    """CacheGen and its coder alone, over random numbers shaped like a chunk of 256 tokens of 8 heads of 128 in 4 layers."""
    rng = torch.Generator().manual_seed(0)
    planes = {
        Place(layer, plane): (
            torch.randn(8, 256, 128, generator=rng) * torch.rand(8, 1, 128, generator=rng).exp()
        ).bfloat16()
        for layer in range(4)
        for plane in ("key", "value")
    }
    codec, nbytes = CacheGen(2), sum(x.nbytes for x in planes.values())
    tensors = codec.encode(planes)[0]
    plain = [Plain(_bytes_of(x), tuple(x.shape), x.itemsize) for x in tensors.values()]
    small = [
        Coded(name, memoryview(data), len(p.data), p.itemsize) for (name, data), p in zip(squeeze(plain, "rans"), plain)
    ]
    jobs = {
        "encode": lambda: squeeze(plain, "rans"),
        "decode": lambda: expand(small),
        "whole encode": lambda: squeeze(
            [Plain(_bytes_of(x), tuple(x.shape), x.itemsize) for x in codec.encode(planes)[0].values()], "rans"
        ),
        "whole decode": lambda: (expand(small), codec.decode(tensors)),
    }
    found = []
    for count in sorted({1, min(2, torch.get_num_threads())}):
        with threads(count):
            taken = {job: median(times) for job, times in alternate(jobs, rounds, 1, tell).items()}
        found.append(Speed("entropy coder", count, nbytes / taken["encode"] / 1e9, nbytes / taken["decode"] / 1e9))
        found.append(
            Speed(
                "cachegen(level=2)", count, nbytes / taken["whole encode"] / 1e9, nbytes / taken["whole decode"] / 1e9
            )
        )
    return found
