"""Tables with bars, and what the numbers were made with."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kvloom.kernels import native
from kvloom.lab.page import versions

__all__ = ["about", "met", "show", "table", "verdict"]

NAME = 14  # columns that a name keeps on a narrow screen, where it is folded; numbers stay whole


def about() -> dict[str, Any]:
    """Machine, kernels and versions."""
    return {"machine": platform.machine(), "kernels": native.ISA or "torch", **versions()}


def met(value: float, bar: float | None) -> bool | None:
    """Whether a ratio keeps to its bar; None where there is no bar."""
    return None if bar is None else value <= bar


def verdict(value: float, bar: float | None) -> tuple[str, str]:
    """The bar and whether it is met, as two cells."""
    return ("", "") if bar is None else (f"<= {bar:.2f}x", "yes" if met(value, bar) else "NO")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1, group: int = 0) -> Table:
    """The first `text` columns are text, the others numbers; a line is drawn where one of the first `group` changes.

    Columns without a word in them are left out.
    """
    cells = list(rows)
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    shown = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    for i in shown:
        widest = max(len(row[i]) for row in cells)
        if i < text:
            out.add_column(columns[i], min_width=min(widest, NAME), overflow="fold")
        else:
            out.add_column(columns[i], justify="right", min_width=widest)
    for row, after in zip(cells, [*cells[1:], None]):
        last = after is not None and row[:group] != after[:group]
        out.add_row(*(row[i] for i in shown), end_section=last)
    return out


def show(found: Table, notes: Iterable[str]) -> None:
    """Prints the table to stdout, notes under it, and what the numbers were made with."""
    # a table that goes to a file is not squeezed into the 80 columns assumed there
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if console.width >= 100:
        found.padding = (0, 1, 0, 0)
    console.print(found, markup=False)
    for line in (*notes, ", ".join(f"{name} {value}" for name, value in about().items())):
        console.print(line, markup=False, style="dim")
