"""The command `kvloom batch`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from kvloom.engine.commands import SHARE, free_memory
from kvloom.errors import KvloomError

__all__ = ["batch"]


def batch(
    file: Path,
    model: str = "nano",
    *,
    out: Path | None = None,
    cache: str = "full",
    kv_memory: str | None = None,
    part: int = 256,
    chunk: int = 1024,
    order: Literal["batchllm", "fcfs"] = "batchllm",
) -> None:
    """Answer a file of requests in OpenAI's batch format; results are appended to a file, and a second run goes on where the first ended.

    Each line of FILE is {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}. Prompts that begin alike
    are answered together, so that what they share is computed once, even where it would not stay in memory.

    Example: kvloom batch requests.jsonl Qwen/Qwen3-0.6B --out results.jsonl --cache "kivi(bits=4)"

    Args:
        file: The requests.
        model: Folder, hub id or "nano".
        out: Where results go; without it beside FILE, as FILE.results.jsonl.
        cache: The recipe of all caches.
        kv_memory: Bytes for all caches together, as in 4GiB; without it a quarter of what is free.
        part: What is shared is a multiple of so many tokens.
        chunk: Tokens of one step, of all requests together.
        order: "batchllm": the order that shares most. "fcfs": the file's.
    """
    try:
        from kvloom.engine.ask import Desk, Served
        from kvloom.engine.offline import Results, answered, lines
    except ModuleNotFoundError as error:
        raise KvloomError(f"kvloom batch needs {error.name}: pip install 'kvloom[serve]'.") from error
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from kvloom.core.registry import parse
    from kvloom.engine.batch import BatchLLM
    from kvloom.engine.engine import Engine
    from kvloom.engine.scheduler import Sarathi
    from kvloom.lab.chat import stops_of
    from kvloom.lab.measure import load_model
    from kvloom.store.tier import size_of

    if not file.is_file():
        raise KvloomError(f"{str(file)!r} is no file of requests.")
    parse(cache)
    for option, value in (("--chunk", chunk), ("--part", part)):
        if value < 1:
            raise KvloomError(f"{option} {value} must be at least 1.")
    memory = free_memory() // SHARE if kv_memory is None else size_of(kv_memory)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    loaded, tokenizer = load_model(model)
    scheduler = BatchLLM(rows=chunk) if order == "batchllm" else Sarathi(rows=chunk)
    engine = Engine(loaded, cache, memory=memory, part=part, scheduler=scheduler, queue=1 << 30)
    served = Served(
        names=[model], tokenizer=tokenizer, vocabulary=engine.vocabulary, context=engine.context,
        ends=stops_of(loaded, tokenizer), recipe=cache,
    )  # fmt: skip
    path = out or file.with_name(f"{file.name}.results.jsonl")
    results = Results(path)
    try:
        before = len(results.done)
        todo = list(lines(file, Desk(served), results))
        refused = len(results.done) - before
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("requests", total=before + refused + len(todo), completed=len(results.done))
            answered(engine, todo, results, lambda _: bar.update(task, completed=len(results.done)))
    finally:
        results.close()
    stats = engine.stats()
    computed = stats["prefix_queries"] - stats["prefix_hits"]
    print(
        f"{path}: {len(results.done):,} results, {before:,} of them from before; {computed:,} of {stats['prefix_queries']:,} tokens "
        f"of prompts computed, {stats['generated_tokens']:,} generated.",
        file=sys.stderr,
    )
