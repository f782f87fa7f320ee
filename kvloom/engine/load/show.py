"""What `kvloom load` shows: a bar while it runs, then a table and sentences."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvloom.engine.load import page
from kvloom.engine.load.client import Record
from kvloom.engine.load.run import Tell

__all__ = ["lines", "progress", "said", "show"]


@contextmanager
def progress(total: int) -> Iterator[Tell]:
    """A bar on stderr, drawn four times a second: the server may share this machine."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task, done, errors, tokens, start = bar.add_task("", total=total), 0, 0, 0, time.perf_counter()

        def tell(now: int, record: Record | None) -> None:
            nonlocal done, errors, tokens
            if record is None:
                return
            done, errors, tokens = done + 1, errors + bool(record.error), tokens + record.tokens
            speed = tokens / (time.perf_counter() - start)
            failed = f", [red]{errors:,} failed[/red]" if errors else ""
            bar.update(task, completed=done, description=f"{now:,} running, {speed:,.0f} tokens/s{failed}")

        yield tell


def said(about: dict[str, Any]) -> str:
    return f"{about['model']} at {about['url']}: {about['what']}; {about['when']}, seed {about['seed']}, prompts as {about['prompts']}."


def lines(found: dict[str, Any]) -> list[str]:
    """What the table of times doesn't say, a sentence each."""
    told = [
        f"{found['completed']:,} of {found['requests']:,} requests in {found['seconds']:,.1f} s: "
        f"{found['requests_per_second']:,.2f} requests/s, {found['output_tokens_per_second']:,.1f} tokens/s of answers"
    ]
    if found["prompt_tokens"] is not None:
        share = (
            ""
            if found["cached_tokens"] is None
            else f", {found['cached_tokens'] / max(1, found['prompt_tokens']):.1%} from the cache"
        )
        told.append(f"{found['prompt_tokens']:,} tokens of prompts{share}")
    if good := found.get("goodput"):
        slo = ", ".join(f"{name} <= {most:g} ms" for name, most in good["slo_ms"].items())
        told.append(f"goodput: {good['requests_per_second']:,.2f} requests/s, {good['share']:.1%} of requests ({slo})")
    if found["short"]:
        told.append(f"{found['short']:,} answers are shorter than asked")
    if (found["tokens_an_arrival"] or 1) > 1.02:
        told.append(f"the server sends {found['tokens_an_arrival']:.2f} tokens at a time: gaps are between arrivals")
    if found["late_ms"] and found["late_ms"]["p99"] > 5:
        told.append(
            f"requests were sent up to {found['late_ms']['max']:,.0f} ms late: this process was busy, times are off by as much"
        )
    return told


def show(about: dict[str, Any], found: dict[str, Any], notes: Sequence[str], files: Sequence[Path]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(said(about), markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, head in enumerate(page.HEADS):
        table.add_column(head, justify="right" if i else "left")
    for row in page.cells(found):
        table.add_row(*row)
    console.print(table)
    for line in lines(found):
        console.print(line, markup=False)
    for kind, error in found["errors"].items():
        console.print(f"[red]{error['count']:,} failed[/red]: ", end="")
        console.print(f"{kind}: {error['first']}", markup=False)
    for note in notes:
        console.print(note, style="dim", markup=False)
    for path in files:
        console.print(f"Written: {path}", markup=False)
