"""`kvloom doctor --measure`: this machine's numbers, as `Hardware`, in about half a minute.

Times are those of the fastest round: other load only ever adds to them.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvloom.core import settle
from kvloom.core.attention import Logits, attend, job
from kvloom.core.cache import KVCache
from kvloom.core.group import Group
from kvloom.core.registry import parse, recipes
from kvloom.core.rows import Rows
from kvloom.core.segment import Kind
from kvloom.core.site import Site
from kvloom.core.step import Step
from kvloom.errors import KvloomError
from kvloom.kernels import dispatch, native, reference
from kvloom.plan.hardware import Hardware

__all__ = ["measure", "steps", "summary"]

SLOTS = (64, 1024, 4096, 16384)
SHAPE = (2, 4, 64)  # KV heads, queries of each, head size
LAYERS = 4  # caches that take turns, as the layers of a model do: what a core's cache holds of one is gone at the next
READS = (4, 16, 64, 256)  # MiB of weights
ROUNDS, SECONDS = 25, 0.4  # of one measurement: so many rounds, fewer after that time, but three
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = 2  # decoded in one round
TINY = (2, 6)  # layers of the two models that tell a layer's cost from a token's
Tell = Callable[[str], None]


def steps() -> int:
    """How often `measure` tells of a step."""
    return 1 + 2 * len(DTYPES) + len(_kinds()) + 1


@torch.inference_mode()
def measure(tell: Tell = lambda text: None) -> Hardware:
    """The CPU that this process runs on, with as many threads as torch uses."""
    tell("memory")
    vector = torch.ones(64 << 20)
    bandwidth = vector.nbytes / _seconds(vector.sum)
    twin = torch.empty_like(vector)
    link = vector.nbytes / _seconds(partial(twin.copy_, vector))
    del vector, twin
    flops, reads = {}, {}
    for name, dtype in DTYPES.items():
        tell(f"matrix products, {name}")
        flops[name] = _products(dtype)
        tell(f"reading weights, {name}")
        reads[name] = [[float(mib << 20), _weights(mib << 20, dtype)] for mib in READS]
    codecs: dict[str, list[list[float]]] = {}
    for label, (kind, dtype) in _kinds().items():
        tell(f"decode attention, {label}")
        points = [
            [float(n), _attention(kind, dtype, n) / 2] for n in SLOTS
        ]  # each plane takes half, as far as is known
        for plane, codec in (("key", kind.key), ("value", kind.value)):
            codecs[f"{plane} {label if codec.exact else repr(codec)}"] = points
    tell("what a token and a layer cost")
    token, layer, coded, row = _fixed()
    about = {
        "machine": platform.machine(), "threads": torch.get_num_threads(), "kernels": native.ISA or "torch",
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    source = f"measured by kvloom doctor: {', '.join(f'{k} {v}' for k, v in about.items())}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        f"{platform.machine()} CPU", memory, bandwidth, flops, link, source, reads, codecs, SHAPE, token, layer, coded,
        row, about,
    )  # fmt: skip


def summary(found: Hardware) -> list[tuple[str, str]]:
    """The numbers for people."""
    h, _, dim = found.shape
    lines = [
        ("memory", f"{found.memory / 2**30:.1f} GiB"),
        ("reads", f"{found.bandwidth / 1e9:.1f} GB/s"),
        ("copies", f"{found.link / 1e9:.1f} GB/s"),
        *((f"products, {name}", f"{rate / 1e9:,.1f} GFLOP/s") for name, rate in found.flops.items()),
    ]
    for name, points in found.reads.items():
        rates = ", ".join(f"{rate / 1e9:.1f} GB/s of {nbytes / 2**20:.0f} MiB" for nbytes, rate in points)
        lines.append((f"weights, {name}", rates))
    kinds: dict[str, str] = {}  # both planes of a pair were timed together
    for name, points in found.codecs.items():
        rates = ", ".join(f"{h * dim * n / seconds / 1e9:.2f} G/s at {n:,.0f}" for n, seconds in points[1:])
        plane, _, codec = name.partition(" ")
        if plane == "key":
            kinds[codec] = rates
    lines += [(f"numbers, {codec}", rates) for codec, rates in kinds.items()]
    costs = {
        "a token": found.token, "a layer": found.layer, "packed numbers in a layer": found.coded,
        "another sequence in a layer": found.row,
    }  # fmt: skip
    return [*lines, *((name, f"{1e3 * seconds:.3f} ms") for name, seconds in costs.items())]


def _rounds(seconds: float) -> Iterator[None]:
    end = time.perf_counter() + seconds
    for i in range(ROUNDS):
        if i >= 3 and time.perf_counter() > end:
            return
        yield


def _seconds(run: Callable[[], object], each: int = 1) -> float:
    """Seconds of one run in the fastest round of `each`."""
    run()
    taken = []
    for _ in _rounds(SECONDS):
        start = time.perf_counter()
        for _ in range(each):
            run()
        taken.append((time.perf_counter() - start) / each)
    return min(taken)


def _products(dtype: torch.dtype) -> float:
    """Operations per second of a product of square matrices."""
    side, seconds = 128, 0.0
    while side < 1024 and seconds < 0.02:  # some machines have no fast products of 16-bit numbers
        side *= 2
        a, b = torch.randn(2, side, side).to(dtype)
        seconds = _seconds(partial(torch.matmul, a, b))
    return 2 * side**3 / seconds


def _weights(nbytes: int, dtype: torch.dtype) -> float:
    """Bytes per second at which one token is multiplied with so many bytes of weights, a matrix after another."""
    side = 512
    weights = torch.full((max(1, nbytes // (side * side * dtype.itemsize)), side, side), 0.5, dtype=dtype)
    x = torch.ones(1, side, dtype=dtype)

    def run() -> None:
        for weight in weights:
            F.linear(x, weight)

    return weights.nbytes / _seconds(run)


def _kinds() -> dict[str, tuple[Kind, torch.dtype]]:
    """What to attend to, by name: exact numbers, and every pair of codecs that a recipe uses, kivi's in all its bits."""
    found = {f"exact {name}": (Kind(), dtype) for name, dtype in DTYPES.items()}
    for text in (*(f"kivi(bits={bits})" for bits in (1, 2, 3, 4, 8)), *recipes()):
        try:
            kinds = parse(text).kinds.values()
        except KvloomError:
            continue  # one that can't do without options
        for kind in kinds:
            if not kind.exact:
                planes = (repr(codec) for codec in (kind.key, kind.value) if not codec.exact)
                found.setdefault(" / ".join(planes), (Kind(kind.key, kind.value), torch.float32))
    return found


def _attention(kind: Kind, dtype: torch.dtype, n: int) -> float:
    """Seconds of one token's attention to n slots of one layer."""
    h, g, dim = SHAPE
    site = Site(0, 1, h * g, h, dim, dim, dtype, lambda: None)
    groups = []
    for _ in range(LAYERS):
        group = Group({"main": kind.at(site)})
        k, v = torch.randn(2, h, n, dim).to(dtype)
        group.segments["main"].append(Rows(k, v, 0))
        q, logits = torch.randn(h, g, 1, dim).to(dtype), Logits(dim**-0.5)
        step = Step(site, "prompt", group, ("main",), q, torch.zeros(h, g, 1), n - 1, n, n, logits)
        for kept in (False, True):
            settle.fit(step, kept)
        group.segments["main"].settle()
        groups.append((group, q, logits))
    layers = cycle(groups)

    def run() -> None:
        group, q, logits = next(layers)
        found = job(q, dim, group, logits, n, None, False)
        if found is None:
            reference.merge(attend(q, group, logits, n)[0])
        else:
            dispatch.run([found[0]])

    return _seconds(run, each=LAYERS)


def _tiny(layers: int) -> PreTrainedModel:
    h, g, dim = SHAPE
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=h * g,
        num_key_value_heads=h, head_dim=dim, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _fixed() -> tuple[float, float, float, float]:
    """Seconds of a token, of a layer, of a layer with packed numbers besides, and of a layer's further sequence.

    From models so small that nothing but calling them takes time. They take turns, so other load slows all alike.
    """
    few, many = (_tiny(n) for n in TINY)
    packed, batch = "kivi(bits=4, group=32, residual=32)", 4
    runs = [_decoder(few, "full"), _decoder(many, "full"), _decoder(many, packed), _decoder(many, "full", batch)]
    taken: list[list[float]] = [[] for _ in runs]
    for i in range(3 * ROUNDS + 1):
        for run, times in zip(runs, taken):
            start = time.perf_counter()
            run()
            if i:
                times.append(time.perf_counter() - start)
    a, b, c, d = (min(times) / TOKENS for times in taken)
    few_layers, layers = TINY
    layer = max(1e-9, (b - a) / (layers - few_layers))
    token, coded = max(0.0, a - few_layers * layer), max(0.0, (c - b) / layers)
    return token, layer, coded, max(0.0, (d - b) / (layers * (batch - 1)))


def _decoder(model: Any, recipe: str, batch: int = 1) -> Callable[[], None]:
    """Decodes TOKENS tokens behind a short prompt."""
    cache = KVCache(model, recipe)
    model(torch.zeros(batch, SLOTS[0], dtype=torch.long), past_key_values=cache)
    return partial(_decode, model, cache, torch.zeros(batch, 1, dtype=torch.long))


def _decode(model: Any, cache: KVCache, token: Tensor) -> None:
    for _ in range(TOKENS):
        model(token, past_key_values=cache)
