"""The command `kvloom calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from kvloom.errors import RecipeError
from kvloom.lab.terminal import Json, print_json, progress, read_text

__all__ = ["calibrate"]


def calibrate(
    model: str,
    *,
    cache: Annotated[str, Parameter(name=["--cache", "--recipe"])],
    text: Path | None = None,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    json: Json = False,
) -> None:
    """Measure a model once for a recipe that needs it, and write the profile to a file.

    A profile in its default place is found by itself; any other as: --cache "kvquant(profile='FILE')".

    Args:
        model: Folder, hub id or "nano".
        cache: The recipe to measure for, with its options.
        text: What the model reads meanwhile, if the recipe wants a text; without it, a book that comes with kvloom.
        output: The profile to write (safetensors). Without it: the model's own folder, or the user's cache.
    """
    import torch
    import transformers

    from kvloom import parse
    from kvloom.core.profile import default_path
    from kvloom.core.registry import recipes
    from kvloom.lab.measure import NANO, load_model

    recipe = parse(cache)
    if recipe.calibrate is None:
        needy = ", ".join(name for name in recipes() if parse(name).calibrate is not None)
        raise RecipeError(f"--cache {cache!r} needs no profile. Give one recipe that does: {needy}.")
    words = read_text(text or NANO.parent / "text" / "gutenberg.txt", "--text")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    network, tokenizer = load_model(model)
    path = output or default_path(network, cache.partition("(")[0].strip())
    ids = torch.tensor(tokenizer.encode(words, add_special_tokens=False))
    with progress(None) as tell:
        found = recipe.calibrate(network, ids, path, tell)
    if json:
        sets = {name: [{"bits": b, "loss": x} for b, x in points] for name, points in _sets(found).items()}
        print_json({"file": str(path), "tensors": {name: list(x.shape) for name, x in found.items()}, "sets": sets})
    else:
        for name, points in _sets(found).items():
            table = Table("bits", "loss", title=f"{name}: no choice is better in both")
            for bits, loss in points:
                table.add_row(f"{bits:.2f}", f"{loss:.5f}")
            Console().print(table)
        size = path.stat().st_size
        Console().print(f"Wrote {path}: {len(found)} tensors, {size:,} bytes.", highlight=False, soft_wrap=True)


def _sets(found: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Pareto sets in a profile, as points: tensors NAME.bits and NAME.loss of equal length."""
    names = [name.removesuffix(".bits") for name in found if name.endswith(".bits")]
    return {
        name: list(zip(found[f"{name}.bits"].tolist(), found[f"{name}.loss"].tolist(), strict=True))
        for name in names
        if f"{name}.loss" in found
    }
