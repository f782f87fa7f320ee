"""The command `kvloom bench coding`."""

from __future__ import annotations

from kvloom.bench.commands_reuse import app
from kvloom.errors import KvloomError
from kvloom.lab.terminal import Json, print_json, progress

__all__ = ["app", "coding"]


@app.command
def coding(
    model: str = "nano",
    /,
    *,
    texts: int = 4,
    tokens: int = 1024,
    ahead: int = 128,
    block: int = 256,
    rounds: int = 5,
    json: Json = False,
) -> None:
    """Bits per stored number against the KL that they cost, for every way in which the store keeps keys and values.

    Pieces of the shipped book are prefilled; their keys and values are stored in chunks, loaded, and the text is read on behind
    them. Bits count everything: scales, tables, headers. Then CacheGen's speed, on one thread and two.

    Example: kvloom bench coding nano --texts 2 --tokens 512

    Args:
        model: Folder, hub id or "nano".
        texts: Pieces of text.
        tokens: Tokens of each that are stored.
        ahead: Tokens read behind them.
        block: Tokens in a chunk: a multiple of 64.
        rounds: How often the speed is measured; 0 leaves that out.
    """
    from kvloom.bench import coding as bench
    from kvloom.bench.show import show

    for option, value in (("--texts", texts), ("--tokens", tokens), ("--ahead", ahead), ("--block", block)):
        if value < 1:
            raise KvloomError(f"{option} {value} must be at least 1.")
    with progress(bench.steps(texts, rounds), live=False) as tell:
        found = bench.run(model, texts, tokens, ahead, block, rounds, tell)
    print_json(found.to_dict()) if json else show(found.table(), found.notes())
