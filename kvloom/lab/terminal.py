"""What commands share: results as JSON on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kvloom.errors import KvloomError

__all__ = ["Json", "print_json", "progress", "read_text"]

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON on stdout instead of a table.")]


def print_json(value: Any) -> None:
    """For people and programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def progress(total: int | None, live: bool = True) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; the yielded function names the next step. `live`: redrawn all the time, by a thread of its own,
    which would disturb what is being timed; otherwise only at each step. `total` None: nobody knows.
    """
    columns: list[ProgressColumn] = [
        SpinnerColumn(),
        BarColumn(),
        TextColumn("{task.completed}" if total is None else "{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    ]
    columns += [TextColumn("left"), TimeRemainingColumn()] if total is not None and total > 20 else []
    console = Console(stderr=True)
    with Progress(*columns, TextColumn("{task.description}"), console=console, auto_refresh=live) as bar:
        task, done = bar.add_task("", total=total), -1

        def tell(text: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=text, refresh=not live)

        yield tell
        bar.update(task, completed=total, description="done")


def read_text(path: Path, option: str) -> str:
    """A file's text. Raises KvloomError that names the option."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"{option} {str(path)!r} cannot be read as UTF-8 text ({error}). Give a text file."
        raise KvloomError(message) from error
