"""The command `kvloom inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from kvloom.errors import KvloomError
from kvloom.lab.terminal import Json, print_json, progress, read_text

__all__ = ["inspect"]


def inspect(
    model: str,
    *,
    text: Annotated[Path, Parameter(help="The text to read, a UTF-8 file.")],
    tokens: int = 2048,
    out: Path = Path("inspect.html"),
    json: Json = False,
) -> None:
    """Pictures of a model's KV cache, and which families of methods they speak for.

    Outlier channels, attention sinks, entropy, retrieval heads, recency, heavy hitters, singular values, likeness of tokens
    and layers: one page with a summary at its head. The text is read once with a full cache.

    Example: kvloom inspect nano --text book.txt

    Args:
        model: Folder, hub id or "nano".
        tokens: How many tokens of the text are read, from its start.
        out: The HTML page to write.
    """
    import torch
    import transformers

    from kvloom.lab.inspect.capture import LEAST
    from kvloom.lab.inspect.figures import figures, steps
    from kvloom.lab.inspect.page import html, notes
    from kvloom.lab.inspect.panels import panels
    from kvloom.lab.inspect.suggest import suggestions
    from kvloom.lab.measure import load_model
    from kvloom.lab.page import versions

    if tokens < LEAST:
        raise KvloomError(f"--tokens {tokens} is too few to tell far from near; give at least {LEAST}.")
    content = read_text(text, "--text")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    network, tokenizer = load_model(model)
    # Characters beyond need not be tokenized: hardly any token is longer than 16.
    ids = tokenizer.encode(content[: 16 * tokens])[:tokens]
    if len(ids) < LEAST:
        raise KvloomError(f"--text {str(text)!r} has only {len(ids)} tokens; give a text of at least {LEAST}.")
    with progress(steps(network.config.get_text_config(decoder=True).num_hidden_layers, len(ids))) as tell:
        found = figures(network, torch.tensor([ids]), tell)
    shown, ranked = panels(found), suggestions(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html(found, shown, ranked, model, text.name), encoding="utf-8")
    if json:
        said = [{"key": p.key, "title": p.title, "shows": p.shows, "family": p.family} for p in shown]
        about = {"model": model, "text": str(text), "page": str(out), "versions": versions(), "notes": notes(found)}
        print_json(about | {"suggestions": [s.to_dict() for s in ranked], "panels": said, "figures": found.to_dict()})
        return
    console = Console()
    console.print(f"[bold]{model}[/bold], {found.tokens:,} tokens: what suits this cache", highlight=False)
    for s in ranked:
        saving = f"{s.saving:4.0%}" if s.pays else "    "
        names = f" ({', '.join(s.recipes)})" if s.recipes else ""
        console.print(f"[green]{saving}[/green] {s.family}{names}", highlight=False)
        console.print(f"     [dim]{s.evidence}[/dim]", highlight=False)
    for note in notes(found):
        console.print(note, style="dim", markup=False, highlight=False)
    console.print(f"Page: {out}", highlight=False)
