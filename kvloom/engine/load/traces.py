"""Reads traces of requests and fits their lengths to a model.

Three forms, told apart by their lines:
- Mooncake's JSON lines: `timestamp` (ms), `input_length`, `output_length`, and `hash_ids`, one for each 512 tokens of the
  prompt: equal ids are equal tokens, so shared prefixes come out as they were.
- JSON lines with `input_length`, `output_length`, and `timestamp` if there is one.
- Comma-separated lengths with a head, as traces of ShareGPT are given: `num_prefill_tokens`, `num_decode_tokens`.

A trace is read as what a stranger wrote: every line and number has a limit, and an error names the line.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kvloom.engine.load.work import Ask, block, own
from kvloom.errors import KvloomError

__all__ = ["EXAMPLE", "Row", "Trace", "fit", "read"]

EXAMPLE = Path(__file__).parent / "example.jsonl"
BLOCK = 512
LINE, ROWS, TOKENS = 1 << 20, 1_000_000, 10_000_000  # bytes of a line, lines, tokens of a prompt or answer
SECONDS = 10 * 366 * 86400
HEADS = ("num_prefill_tokens", "num_decode_tokens")


@dataclass(frozen=True)
class Row:
    """`at` in seconds. `blocks`: ids of the prompt's blocks; none: all tokens are the request's own."""

    at: float
    input: int
    output: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """`timed`: whether the trace says when requests came."""

    rows: tuple[Row, ...]
    timed: bool


def _whole(value: Any, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}")
    return value


def _parse(line: bytes) -> tuple[Row, bool]:
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    wide, long = (_whole(found.get(name), name, 1, TOKENS) for name in ("input_length", "output_length"))
    at = found.get("timestamp", 0)
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at <= SECONDS * 1e3:
        raise ValueError("timestamp must be a number of milliseconds, not negative, within ten years")
    ids = found.get("hash_ids", [])
    if not isinstance(ids, list) or (ids and len(ids) != math.ceil(wide / BLOCK)):
        raise ValueError(f"hash_ids must be a list with one id for each {BLOCK} tokens of input_length")
    return Row(at / 1e3, wide, long, tuple(_whole(i, "a hash id", 0, 2**61) for i in ids)), "timestamp" in found


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(LINE + 1):
        number += 1
        if len(line) > LINE:
            raise KvloomError(f"line {number} is longer than {LINE:,} bytes")
        if number > ROWS + 1:
            raise KvloomError(f"more than {ROWS:,} lines")
        if line.strip():
            yield number, line


def read(path: Path, most: int | None = None) -> Trace:
    """The trace in a file, of it the first `most` requests, by rising time that starts at 0.

    Raises KvloomError that names file, line and what is wrong with it.
    """
    rows, timed, heads, number = [], True, None, 0
    try:
        with open(path, "rb") as file:
            for number, line in _lines(file):
                if number == 1 and not line.lstrip().startswith(b"{"):
                    heads = next(csv.reader([line.decode()]))
                    if not set(HEADS) <= set(heads):
                        raise ValueError(f"neither a JSON object nor heads with {' and '.join(HEADS)}")
                    continue
                if heads is None:
                    row, when = _parse(line)
                    timed = timed and when
                else:
                    cells = dict(zip(heads, next(csv.reader([line.decode()]))))
                    wide, long = (_whole(int(cells.get(name, "")), name, 1, TOKENS) for name in HEADS)
                    row, timed = Row(0.0, wide, long), False
                rows.append(row)
                if most is not None and len(rows) == most:
                    break
    except OSError as error:
        raise KvloomError(f"--trace {str(path)!r} cannot be read ({error}). Give a file, or 'example'.") from error
    except KvloomError as error:
        raise KvloomError(f"--trace {str(path)!r}: {error}.") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise KvloomError(f"--trace {str(path)!r}, line {number}: {error or 'nested too deep'}.") from error
    if not rows:
        raise KvloomError(f"--trace {str(path)!r} holds no requests.")
    rows.sort(key=lambda row: row.at)
    start = rows[0].at
    return Trace(tuple(Row(r.at - start, r.input, r.output, r.blocks) for r in rows), timed)


def _scaled(row: Row, index: int, factor: float) -> Ask:
    output = max(1, int(row.output * factor))
    if not row.blocks:
        return Ask((own(index, max(1, int(row.input * factor))),), output, row.at)
    each = round(BLOCK * factor)
    last = max(1, int((row.input - BLOCK * (len(row.blocks) - 1)) * factor))
    sizes = [each] * (len(row.blocks) - 1) + [last]
    return Ask(tuple(block(i, n) for i, n in zip(row.blocks, sizes)), output, row.at)


def fit(trace: Trace, limit: int | None, factor: float | None = None) -> tuple[list[Ask], float, int]:
    """Requests, the factor that all their lengths were scaled by, and how many were left out.

    `limit`: tokens of prompt and answer that the model takes. Without `factor` the longest request just fits, and none
    grows; with one, requests that do not fit are left out. Blocks keep whole lengths, so a factor becomes one of 1/512.
    """
    longest = max(row.input + row.output for row in trace.rows)
    if factor is None:
        factor = 1.0 if limit is None or longest <= limit else (limit - 2) / longest
        whole = int(BLOCK * factor)
    else:
        whole = round(BLOCK * factor)
    if any(row.blocks for row in trace.rows):
        if whole < 1:
            raise KvloomError(
                f"lengths scaled by {factor:.2g} leave nothing of blocks of {BLOCK} tokens. The longest request has "
                f"{longest:,} tokens{'' if limit is None else f', the model takes {limit:,}'}: give a larger --scale."
            )
        factor = whole / BLOCK
    asks = [_scaled(row, i, factor) for i, row in enumerate(trace.rows)]
    kept = [ask for ask in asks if limit is None or ask.prompt + ask.output <= limit]
    if not kept:
        raise KvloomError(
            f"no request fits the model's {limit:,} tokens scaled by {factor:.3g}: give a smaller --scale."
        )
    return kept, factor, len(asks) - len(kept)
