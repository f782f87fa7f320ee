"""The commands `kvloom store stat`, `ls`, `verify`, `gc`, `export`, `import` and `torture`."""

from __future__ import annotations

import contextlib
import json as json_
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvloom.store import archive
from kvloom.store.store import cache_folder, open_tier
from kvloom.store.tier import Deadline, Tier, size_of

__all__ = ["app"]

HELP = """Look at, check and carry what a store holds.

A TIER is an address: file:///folder, redis://host:6379/0, s3://bucket/prefix. Without one, the folder that kvloom uses by itself.
Caches of models get there with kvloom.store.attach; see docs/store.md.

Start with: kvloom store stat
"""
app = App(name="store", help=HELP)
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON on stdout instead of a table.")]
Flag = Annotated[bool, Parameter(negative="")]


@contextlib.contextmanager
def _tier(url: str | None) -> Iterator[Tier]:
    tier = open_tier(url or cache_folder().as_uri())
    try:
        yield tier
    finally:
        tier.close()


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def _print(value: Any) -> None:
    print(json_.dumps(value, indent=2))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


def _count(tier: Tier) -> int:
    return tier.stat(Deadline(archive.SECONDS)).count


@app.command
def stat(*tiers: str, json: Json = False) -> None:
    """Chunks, bytes and caps of tiers.

    Example: kvloom store stat file:///var/cache/kvloom redis://localhost:6379/0

    Args:
        tiers: Addresses of tiers.
    """
    found: list[dict[str, Any]] = []
    for url in tiers or (None,):
        with _tier(url) as tier:
            held = tier.stat(Deadline(archive.SECONDS))
            found.append({"tier": tier.name, "chunks": held.count, "bytes": held.nbytes, "max": held.max})
    if json:
        _print(found)
        return
    rows = [(x["tier"], f"{x['chunks']:,}", _size(x["bytes"]), _size(x["max"]) if x["max"] else "none") for x in found]
    _table(("tier", "chunks", "held", "cap"), rows)


@app.command
def ls(tier: str | None = None, /, *, identity: str = "", limit: int = 40, json: Json = False) -> None:
    """Chunks of a tier, by text: where they stand, how many tokens, what computing them took.

    Reads headers only; `kvloom store verify` reads everything.

    Example: kvloom store ls file:///var/cache/kvloom --identity 3fa9

    Args:
        tier: Address of a tier.
        identity: Only chunks whose identity (of model, recipe, tenant) begins with these hex digits.
        limit: Chunks to show; 0 shows all. JSON always has all.
    """
    with _tier(tier) as opened, _progress(_count(opened)) as tell:
        found = [chunk for chunk in archive.chunks(opened, tell) if chunk.identity.startswith(identity)]
    found.sort(key=lambda chunk: (chunk.identity, chunk.start, chunk.context, chunk.key))
    if json:
        _print([asdict(chunk) for chunk in found])
        return
    rows = [
        (
            chunk.key[:12], chunk.identity[:12], chunk.context[:12] or "(beginning)", f"{chunk.start:,}", f"{chunk.tokens:,}",
            _size(chunk.nbytes), f"{chunk.seconds:.3f}", chunk.problem,
        )
        for chunk in (found[:limit] if limit else found)
    ]  # fmt: skip
    _table(("chunk", "identity", "behind", "from token", "tokens", "held", "seconds", ""), rows)
    if limit and len(found) > limit:
        Console().print(f"... and {len(found) - limit:,} more (--limit 0)", highlight=False)


@app.command
def verify(*tiers: str, fix: Flag = False, json: Json = False) -> None:
    """Read every byte of every chunk and compare checksums, names and keys. Code 1 if something is not as it was stored.

    Reading a chunk for a model does the same, so a damaged one never becomes a wrong token: it costs time. This finds out before.

    Args:
        tiers: Addresses of tiers.
        fix: Remove what is damaged; the next prompt computes and stores it again.
    """
    found: list[dict[str, Any]] = []
    damaged = 0
    for url in tiers or (None,):
        with _tier(url) as tier, _progress(_count(tier)) as tell:
            good, nbytes, bad = archive.verify(tier, fix, tell)
            found.append(
                {"tier": tier.name, "good": good, "bytes": nbytes, "damaged": bad, "removed": fix and bool(bad)}
            )
            damaged += len(bad)
    if json:
        _print(found)
    else:
        _table(
            ("tier", "good", "bytes", "damaged"),
            [(x["tier"], f"{x['good']:,}", _size(x["bytes"]), f"{len(x['damaged']):,}") for x in found],
        )
        for x in found:
            for key, why in x["damaged"].items():
                print(f"{'removed' if fix else 'damaged'} {key}: {why}")
    if damaged:
        sys.exit(1)


@app.command
def gc(
    tier: str | None = None,
    /,
    *,
    max: str | None = None,
    orphans: Flag = False,
    dry_run: Flag = False,
    json: Json = False,
) -> None:
    """Throw out chunks that can't be read, orphans, and the least worth beyond a size.

    Tiers with a cap evict by themselves; this is for those without, and for making room now. Unfinished files of writers that
    died are removed whenever a folder is opened.

    Example: kvloom store gc file:///var/cache/kvloom --max 10GiB --dry-run

    Args:
        tier: Address of a tier.
        max: Bytes to leave, as in 10GiB. What is cheapest to compute again per byte goes first, of a text its end.
        orphans: Also chunks whose chunk before is gone: no prompt leads there. Chunks that programs keep for any place
            in a text name no chunk before them and count as orphans, if they were computed behind some text.
        dry_run: Only say what would go.
    """
    with _tier(tier) as opened, _progress(_count(opened)) as tell:
        gone = archive.shrink(opened, size_of(max) if max else None, orphans, dry_run, tell)
    freed = sum(chunk.nbytes for chunk in gone)
    if json:
        _print({"removed": not dry_run, "chunks": [asdict(chunk) for chunk in gone], "bytes": freed})
        return
    print(f"{'would remove' if dry_run else 'removed'} {len(gone):,} chunks, {_size(freed)}")


@app.command(name="export")
def export_(tier: str, file: Path, /, *, identity: str = "", json: Json = False) -> None:
    """Write the chunks of a tier into one file, each verified. The file holds tokens in the clear.

    Example: kvloom store export file:///var/cache/kvloom warm.zip

    Args:
        tier: Address of a tier.
        file: A new file (zip, uncompressed).
        identity: Only chunks whose identity begins with these hex digits.
    """
    with _tier(tier) as opened, _progress(_count(opened)) as tell:
        moved = archive.export(opened, file, identity, tell)
    _moved(moved, "exported", json)


@app.command(name="import")
def import_(file: Path, tier: str, /, *, json: Json = False) -> None:
    """Put the chunks of a file into a tier, each verified first. Code 1 if some are refused.

    Nothing is written under a name from the file: only digests pass. A checksum finds accidents, not forgery: import files of
    people whom you would let write to the tier.

    Args:
        file: A file that `kvloom store export` wrote.
        tier: Address of a tier.
    """
    with _tier(tier) as opened, _progress(len(archive.names(file))) as tell:
        moved = archive.import_(file, opened, tell)
    _moved(moved, "imported", json)


def _moved(moved: archive.Moved, done: str, json: bool) -> None:
    if json:
        _print(asdict(moved))
    else:
        known = f", {moved.known:,} were there already" if moved.known else ""
        print(f"{done} {moved.chunks:,} chunks, {_size(moved.nbytes)}{known}")
        for name, why in moved.refused.items():
            print(f"refused {name}: {why}")
    if moved.refused:
        sys.exit(1)


@app.command
def torture(
    *tiers: str,
    fault: Annotated[list[str] | None, Parameter(negative="")] = None,
    coding: Annotated[list[str] | None, Parameter(negative="")] = None,
    seed: int = 0,
    json: Json = False,
) -> None:
    """Every fault on every tier with every coding: what is served is what was stored, or nothing, counted, in time.

    Chunks of its own come and go in the tiers; others are left alone. Code 1 if a rule is broken.

    Example: kvloom store torture memory:// file:///tmp/torture --fault "flipped bit" --fault torn

    Args:
        tiers: Addresses of tiers. Without one: memory, and a folder that is removed afterwards.
        fault: A fault; give it once per fault. Without it: all of them.
        coding: How chunks are stored; give it once per coding. Without it: all of them.
        seed: Another number damages other bytes.
    """
    import tempfile

    from kvloom.errors import StoreError, unknown
    from kvloom.store import torture as matrix

    faults, codings = fault or list(matrix.FAULTS), coding or list(matrix.CODINGS)
    for name, given, known in (("fault", faults, matrix.FAULTS), ("coding", codings, matrix.CODINGS)):
        for each in given:
            if each not in known:
                raise StoreError(unknown(name, each, known))
    with tempfile.TemporaryDirectory(prefix="kvloom-torture-") as folder:
        urls = tiers or ("memory://", f"file://{folder}")
        with _progress(matrix.steps(urls, faults, codings)) as tell:
            rows = matrix.run(urls, faults, codings, seed, tell)
    if json:
        _print([asdict(row) for row in rows])
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(matrix.table(rows))
        for row in rows:
            if row.broken:
                print(f"BROKEN {row.fault} on {row.tier}, {row.coding}: {row.broken}")
    if any(row.broken for row in rows):
        sys.exit(1)
