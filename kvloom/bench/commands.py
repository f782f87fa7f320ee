"""The commands `kvloom bench kernels`, `decode`, `prefill`, `memory`, `store`, `tiers`, `gpu` and `plan`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from kvloom.errors import KvloomError, unknown
from kvloom.lab.terminal import Json, print_json, progress

__all__ = ["app"]

HELP = """What kvloom costs on this machine, beside what you would run instead.

Contenders take turns in one process and every number is a median over the rounds, ratios included, so other load
slows all of them alike. Close what you can all the same. Results go to stdout, progress to stderr.

Start with: kvloom bench decode nano --tokens 2048
"""
app = App(name="bench", help=HELP)

Numbers = Annotated[list[str], Parameter(consume_multiple=True, negative="")]
Caches = Annotated[list[str] | None, Parameter(negative="")]
Rounds = Annotated[int, Parameter(help="How often each contender takes its turn.")]


@app.command
def kernels(
    *,
    slots: Numbers = ["8192", "131072"],  # noqa: B006
    shape: Numbers = ["2x4x64", "8x4x128"],  # noqa: B006
    threads: Numbers = ["1", "all"],  # noqa: B006
    rounds: Rounds = 15,
    json: Json = False,
) -> None:
    """Attention of one decoded token over the slots of one layer, in every way there is.

    kvloom: the compiled kernels, over fp32, bf16, and packed numbers in groups of 32. SDPA: torch's fused kernel, as
    transformers calls it; "SDPA rows": with a KV head's queries folded into rows. matmul: two products and a softmax.
    quanto, hqq, fp8: transformers' QuantizedCache, which unpacks everything, then calls SDPA. int4pack: torch's product
    with 4-bit weights, for the keys alone. What is not installed is left out, with the reason.

    GB/s counts the bytes of keys and values as they are stored. "of roof" is the least time that this machine needs to
    read them, or to multiply them, over the time taken: 100 % is as fast as can be; more means read from a core's cache.
    "ratio" is the time over that of torch's fastest fp32 way. The largest default needs several GiB.

    Example: kvloom bench kernels --slots 8192 --shape 8x4x128 --threads all

    Args:
        slots: Tokens in the cache: multiples of 32.
        shape: KV heads x query heads of each x head size, a multiple of 32.
        threads: Numbers of threads; "all" is as many as torch takes by itself.
    """
    import torch

    from kvloom.bench import kernels as bench
    from kvloom.bench.attention import GROUP, Shape

    shapes = [Shape(*_shape(text, GROUP)) for text in _split("--shape", shape)]
    lengths = _numbers("--slots", slots, multiple=GROUP)
    most = torch.get_num_threads()
    counts = [most if x == "all" else _number("--threads", x, also="all") for x in _split("--threads", threads)]
    counts = list(dict.fromkeys(counts))
    _at_least_one("--rounds", rounds)
    with progress(bench.steps(len(shapes), len(lengths), len(counts), rounds), live=False) as tell:
        found = bench.run(shapes, lengths, counts, rounds, tell)
    _show(found, found.notes(), json)


@app.command
def decode(
    model: str | None = None,
    /,
    *,
    tokens: Numbers | None = None,
    cache: Caches = None,
    codecs: bool = False,
    against: Caches = None,
    rounds: Rounds = 9,
    json: Json = False,
) -> None:
    """Milliseconds per decoded token behind a long prompt, and MiB of the cache: recipes against stock caches.

    DynamicCache is what `generate` uses when nothing else is asked for, and what the ratios are against. The bar of a
    row is the most that it should take. Nearly all the time goes into prefills of the longest prompt, once per recipe.

    Example: kvloom bench decode nano --tokens 2048 8192 --cache full --cache "snapkv(budget=0.1)" --against quanto

    Args:
        model: "nano", "random" (a Llama of 4 layers with 8 query and 2 KV heads of size 64), a folder or a hub id.
            Without it: nano and random.
        tokens: Lengths of the prompt. Without it: 2048, 8192, 16384 and 32768, as far as the model has positions.
        cache: A recipe; give it once per recipe. Without it: full, snapkv, kivi in 4 and 2 bits, h2o, snapkv | kivi.
        codecs: Instead, full and every recipe that stores numbers in fewer bits or channels. The random model gets the profiles
            that some need; no other cache stands beside them, unless --against names one. Half an hour behind 16384 tokens.
        against: StaticCache, or QuantizedCache with the packing of quanto, hqq or fp8; give it once per cache. Without
            it: all that are installed.
    """
    from kvloom.bench import decode as bench
    from kvloom.bench import models
    from kvloom.bench.caches import AGAINST
    from kvloom.bench.caches import codecs as every

    lengths = list(bench.LENGTHS) if tokens is None else _numbers("--tokens", tokens)
    recipes = _recipes(cache, () if codecs else bench.RECIPES)
    others = list(dict.fromkeys(against or (() if codecs else AGAINST)))
    for name in others:
        if name not in AGAINST:
            raise KvloomError("--against: " + unknown("cache", name, AGAINST))
    _at_least_one("--rounds", rounds)
    found = bench.Decode([], [])
    for name in (model,) if model else ("nano", "random"):
        network = models.load(name)
        if codecs:
            recipes = list(dict.fromkeys([*recipes, "full", *every(network)]))
        fit = bench.lengths_of(network, lengths)
        found.left_out.extend(f"{name}: {n:,} tokens: it has fewer positions" for n in lengths if n not in fit)
        with progress(bench.steps(len(fit), len(recipes), len(others), rounds), live=False) as tell:
            part = bench.run(name, network, fit, recipes, others, rounds, tell)
        found.rows.extend(part.rows)
        found.left_out.extend(line for line in part.left_out if line not in found.left_out)
    if not found.rows:
        shown = " ".join(map(str, lengths))
        raise KvloomError(f"--tokens {shown} is more than {model or 'the models'!r} has positions for. Give fewer.")
    _show(found, found.notes(), json)


@app.command
def prefill(
    model: str = "nano", /, *, tokens: int = 8192, cache: Caches = None, rounds: Rounds = 5, json: Json = False
) -> None:
    """Seconds to read a prompt: recipes against DynamicCache.

    The bar of a row is the most that it should take; it is about prompts of 8,192 tokens of nano and random. Takes minutes.

    Example: kvloom bench prefill nano --tokens 2048 --cache full --cache "h2o(budget=0.2)"

    Args:
        model: "nano", "random" (a Llama of 4 layers with 8 query and 2 KV heads of size 64), a folder or a hub id.
        tokens: Length of the prompt.
        cache: A recipe; give it once per recipe. Without it: all of them, with their default options.
    """
    from kvloom.bench import prefill as bench
    from kvloom.bench.caches import RECIPES

    recipes = _recipes(cache, RECIPES)
    _at_least_one("--tokens", tokens)
    _at_least_one("--rounds", rounds)
    with progress(bench.steps(len(recipes), rounds), live=False) as tell:
        found = bench.run(model, recipes, tokens, rounds, tell)
    _show(found, (), json)


@app.command
def memory(*, tokens: int = 8192, cache: Caches = None, json: Json = False) -> None:
    """Most memory that a process needs to read a prompt with the bundled model: recipes against DynamicCache.

    A process for each, since the most is counted per process. The bar is about prompts of 8,192 tokens. Takes minutes.

    Example: kvloom bench memory --cache full --cache "kivi(bits=2)"

    Args:
        tokens: Length of the prompt.
        cache: A recipe; give it once per recipe. Without it: all of them, with their default options.
    """
    from kvloom.bench import memory as bench
    from kvloom.bench.caches import RECIPES

    recipes = _recipes(cache, RECIPES)
    _at_least_one("--tokens", tokens)
    with progress(bench.steps(len(recipes))) as tell:
        found = bench.run(recipes, tokens, tell)
    _show(found, (), json)


@app.command
def plan(
    model: str | None = None,
    /,
    *,
    hardware: str | None = None,
    tokens: Numbers | None = None,
    cache: Caches = None,
    rounds: Rounds = 100,
    json: Json = False,
) -> None:
    """Milliseconds per decoded token as `kvloom plan` tells them, beside measured ones.

    Example: kvloom bench plan nano --tokens 2048 --cache full --cache "kivi(bits=4)"

    Args:
        model: "nano", "random", a folder or a hub id. Without it: nano and random.
        hardware: "cpu" or a file of `kvloom doctor --measure`. Without it: this machine is measured first, about a minute.
        tokens: Lengths of the prompt. Without it: 2048 and 8192.
        cache: A recipe; give it once per recipe. Without it: full, kivi in 4 bits, snapkv, streamingllm.
    """
    from kvloom.bench import models
    from kvloom.bench import plan as bench
    from kvloom.bench.decode import lengths_of
    from kvloom.plan import measure
    from kvloom.plan.hardware import hardware as machine_of

    lengths = list(bench.LENGTHS) if tokens is None else _numbers("--tokens", tokens)
    recipes = _recipes(cache, bench.RECIPES)
    _at_least_one("--rounds", rounds)
    if hardware is None:
        with progress(measure.steps(), live=False) as tell:
            machine = measure.measure(tell)
    else:
        machine = machine_of(hardware)
        if not machine.measured:
            raise KvloomError(
                f"--hardware {hardware}: only this machine can be checked. Give cpu, or a file of `doctor`."
            )
    rows = []
    for name in (model,) if model else ("nano", "random"):
        network = models.load(name)
        fit = lengths_of(network, lengths)
        with progress(bench.steps(len(fit), len(recipes), rounds), live=False) as tell:
            rows += bench.run(name, network, machine, fit, recipes, rounds, tell)
    if not rows:
        shown = " ".join(map(str, lengths))
        raise KvloomError(f"--tokens {shown} is more than {model or 'the models'!r} has positions for. Give fewer.")
    found = bench.Compared(rows, machine)
    _show(found, found.notes(), json)


@app.command
def store(
    model: str = "nano", /, *, tokens: int = 4096, cache: Caches = None, rounds: Rounds = 7, json: Json = False
) -> None:
    """Milliseconds to the first token behind a prompt that was read before: from memory, from files, computed again.

    Every prompt ends with a question that is new. recompute is `generate` with transformers' own cache. The bars are about
    nano, 4,096 tokens, under full.

    Example: kvloom bench store nano --tokens 4096 --cache full --cache "kivi(bits=4)"

    Args:
        model: "nano", "random", a folder or a hub id.
        tokens: Tokens that are reused: a multiple of 256.
        cache: A recipe; give it once per recipe. Without it: full and kivi in 4 bits.
    """
    from kvloom.bench import store_reuse as bench

    recipes = _recipes(cache, ("full", "kivi(bits=4)"))
    _number("--tokens", str(tokens), multiple=256)
    _at_least_one("--rounds", rounds)
    with progress(bench.steps(len(recipes), rounds), live=False) as tell:
        found = bench.run(model, tokens, recipes, rounds, tell)
    _show(found, found.notes(), json)


@app.command
def tiers(
    *urls: str,
    folder: Path | None = None,
    chunks: int = 8,
    size: str = "32MiB",
    rounds: Rounds = 5,
    json: Json = False,
) -> None:
    """GiB/s that the store's tiers write and read, beside the disk itself, and what checksums take of it.

    Chunks are of bf16 in 32 layers; 32 MiB are 256 tokens of a Llama-3.1-8B. What was written is removed at the end.

    Example: kvloom bench tiers redis://localhost:6379/0 --folder /mnt/fast

    Args:
        urls: More tiers: redis://... or s3://...
        folder: Where the file tier is made, on the disk to be measured. Without it: the system's folder for temporary files.
        chunks: How many are written and read.
        size: Bytes of one, a multiple of 4 MiB.
    """
    import tempfile

    from kvloom.bench import store as bench
    from kvloom.store.tier import size_of

    _at_least_one("--chunks", chunks)
    _at_least_one("--rounds", rounds)
    place = folder or Path(tempfile.gettempdir())
    if not place.is_dir():
        raise KvloomError(f"--folder {str(place)!r} is no folder. Give one on the disk that is to be measured.")
    with progress(bench.steps(rounds, len(urls)), live=False) as tell:
        found = bench.run(place, urls, chunks, size_of(size), rounds, tell)
    _show(found, found.notes(), json)


@app.command
def gpu(
    *,
    slots: Numbers = ["8192", "32768", "131072"],  # noqa: B006
    batch: Numbers = ["1", "8", "32"],  # noqa: B006
    rounds: Rounds = 20,
    json: Json = False,
) -> None:
    """Attention of one decoded token on an NVIDIA GPU: kvloom's Triton kernels against torch's FlashAttention.

    SDPA, bf16: torch's FlashAttention over dense bf16 keys and values, as transformers calls it. kvloom: bf16, and numbers
    packed in 4 and 2 bits in groups of 32. One layer of 8 KV heads with 4 query heads of size 128 each, in every batch.
    Times are the GPU's own, from event to event, with its caches cleared before each.

    GB/s counts the bytes of keys and values as they are stored. "of copy" is GB/s over those of a large copy on the same
    GPU: the fraction of memory bandwidth that is used. "faster than SDPA" is SDPA's time over the row's. What does not fit
    into memory is left out, with the reason; the largest default needs about 40 GiB.

    Needs a GPU of compute capability 8.0 or newer and kvloom[gpu]; `kvloom doctor` says whether the kernels run.

    Example: kvloom bench gpu --slots 32768 --batch 1,8

    Args:
        slots: Tokens in the cache: multiples of 32.
        batch: Numbers of sequences.
    """
    from kvloom.bench import gpu as bench

    lengths, batches = _numbers("--slots", slots, multiple=bench.GROUP), _numbers("--batch", batch)
    _at_least_one("--rounds", rounds)
    bench.check()
    with progress(bench.steps(len(batches), len(lengths), rounds), live=False) as tell:
        found = bench.run(lengths, batches, rounds, tell)
    _show(found, found.notes(), json)


def _show(found: Any, notes: Iterable[str], as_json: bool) -> None:
    from kvloom.bench.show import show

    print_json(found.to_dict()) if as_json else show(found.table(), notes)


def _recipes(given: Sequence[str] | None, default: Sequence[str]) -> list[str]:
    """Each once, checked before anything is run."""
    from kvloom import parse

    recipes = list(dict.fromkeys(given or default))
    for recipe in recipes:
        parse(recipe)
    return recipes


def _split(option: str, given: Sequence[str]) -> list[str]:
    """Values with commas or spaces between them, each once."""
    found = list(dict.fromkeys(part.strip() for text in given for part in text.split(",") if part.strip()))
    if not found:
        raise KvloomError(f"{option} {','.join(given)!r} holds no value. Give at least one, or leave the option out.")
    return found


def _numbers(option: str, given: Sequence[str], multiple: int = 1) -> list[int]:
    return [_number(option, text, multiple) for text in _split(option, given)]


def _number(option: str, text: str, multiple: int = 1, also: str = "") -> int:
    if text.isdecimal() and int(text) > 0 and int(text) % multiple == 0:
        return int(text)
    kind = "a positive whole number" if multiple == 1 else f"a positive multiple of {multiple}"
    example = f"{256 * multiple},{4096 * multiple}" if multiple > 1 else "2048,8192"
    choice = f" or {also!r}" if also else f", or several, such as {option} {example}"
    raise KvloomError(f"{option} {text!r} must be {kind}{choice}.")


def _shape(text: str, multiple: int) -> list[int]:
    parts = text.lower().split("x")
    if len(parts) == 3 and all(p.isdecimal() and int(p) > 0 for p in parts) and int(parts[2]) % multiple == 0:
        return [int(p) for p in parts]
    raise KvloomError(
        f"--shape {text!r} must be KV heads x query heads of each x head size, the size a multiple of {multiple}, "
        "such as --shape 2x4x64."
    )


def _at_least_one(option: str, value: int) -> None:
    if value < 1:
        raise KvloomError(f"{option} {value} must be at least 1.")
