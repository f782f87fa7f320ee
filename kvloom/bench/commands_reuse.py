"""The commands `kvloom bench rag` and `reuse`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from kvloom.bench.commands import app
from kvloom.errors import KvloomError
from kvloom.lab.terminal import Json, print_json, progress

__all__ = ["app", "rag", "reuse"]


@app.command
def rag(
    *,
    method: Annotated[list[str] | None, Parameter(negative="")] = None,
    passages: int = 10,
    tokens: int = 512,
    requests: int = 5,
    samples: int = 12,
    json: Json = False,
) -> None:
    """Seconds to the first token of prompts made of passages that were seen before, in another order; then what it costs.

    Times: a random Llama of 12 layers; passages of a book, drawn by Zipf's law; against prefix caching, and against no reuse.
    Answers: nano, on facts that stand whole in a passage, and on facts cut in two by the border of passages. Takes minutes.

    Example: kvloom bench rag --method "cacheblend(ratio=0.3)" --requests 3 --samples 0

    Args:
        method: A method of `kvloom methods` to time; give it once per method. Without it: cacheblend, epic, naive.
        passages: Passages of a prompt.
        tokens: Tokens of a passage.
        requests: Prompts that are timed; 0: none.
        samples: Documents that are asked about; 0: none.
    """
    from kvloom.bench import rag as bench
    from kvloom.bench.show import show
    from kvloom.programs.method import parse_method

    methods = list(dict.fromkeys(method or bench.METHODS))
    for name in methods:
        parse_method(name)
    for option, count, least in (
        ("--passages", passages, 1), ("--tokens", tokens, 1), ("--requests", requests, 0), ("--samples", samples, 0)
    ):  # fmt: skip
        if count < least:
            raise KvloomError(f"{option} {count} must be at least {least}.")
    if requests == samples == 0:
        raise KvloomError("--requests 0 --samples 0 leaves nothing to do; give one of them.")
    with progress(bench.steps(len(methods), requests, samples), live=False) as tell:
        found = bench.run(methods, passages, tokens, requests, samples, tell)
    if json:
        print_json(found.to_dict())
        return
    *others, last = found.tables()
    for table in others:
        show(table, ())
    show(last, found.notes())


@app.command
def reuse(model: str = "nano", *, tokens: int = 4096, requests: int = 3, json: Json = False) -> None:
    """Text reused beyond the prefix, against a full prefill of the same prompt.

    agents: five agents read a question and what the others wrote, under kvcomm. edits: a source file is changed, under pie.
    contexts: eight contexts side by side, under ape. For passages in a prompt, see `kvloom bench rag`.

    Example: kvloom bench reuse nano --tokens 1024 --requests 2

    Args:
        model: "nano", "random", a folder or a hub id.
        tokens: Tokens of the edited file, of the contexts together, and about those that the last agent reads: 64 or more.
        requests: How many of each.
    """
    from kvloom.bench import reuse as bench
    from kvloom.bench.show import show

    if tokens < 64:
        raise KvloomError(f"--tokens {tokens} must be 64 or more.")
    if requests < 1:
        raise KvloomError(f"--requests {requests} must be at least 1.")
    with progress(bench.steps(requests), live=False) as tell:
        found = bench.run(model, requests, tokens, tell)
    print_json(found.to_dict()) if json else show(found.table(), found.notes())
