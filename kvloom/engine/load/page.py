"""The result as one HTML page that needs nothing else: latencies by percentile, the run over time, numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from kvloom.engine.load import report
from kvloom.engine.load.client import Record
from kvloom.lab import svg

__all__ = ["HEADS", "cells", "html"]

STYLE = """
body{background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-size:.875rem;display:block;overflow-x:auto;margin:1rem 0}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}th{color:var(--dim)}code{font:.85em ui-monospace,monospace}
p.note{color:var(--dim);font-size:.875rem}
""".replace("\n", "")
HEADS = ("ms", "mean", "p50", "p90", "p95", "p99", "max")
TIMES = {"ttft_ms": "first token", "itl_ms": "between tokens", "e2e_ms": "whole answer"}


def cells(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table of times as text, in the order of HEADS."""
    return [
        [name, *(f"{found[key][head]:,.1f}" if found[key] else "-" for head in HEADS[1:])]
        for key, name in TIMES.items()
    ]


def _quantiles(values: Sequence[float]) -> list[float]:
    return (1e3 * np.percentile(values, SHARES)).tolist() if len(values) else [float("nan")] * len(SHARES)


SHARES = [*range(0, 100, 2), 99, 99.5, 100]


def _charts(records: Sequence[Record]) -> list[str]:
    good = [r for r in records if not r.error]
    if not good:
        return []
    gaps = [b - a for r in good for a, b in zip(r.arrivals, r.arrivals[1:])]
    waits = {"first token": _quantiles([r.first for r in good]), "between tokens": _quantiles(gaps),
             "whole answer": _quantiles([r.took for r in good])}  # fmt: skip
    start, end = min(r.at for r in records), max(r.at + r.took for r in records)
    edges = np.linspace(start, max(end, start + 1e-3), 61)
    middle = ((edges[1:] + edges[:-1]) / 2).tolist()
    speed = {"tokens per second": report.tokens_each_second(records, edges.tolist())}
    under_way = {"requests": report.running(records, middle)}
    shares, x = [float(s) for s in SHARES], "seconds"
    return [
        svg.lines(waits, shares, "Latency", x_label="% of requests, or of gaps", y_label="ms, at most", log_y=True),
        svg.lines(speed, middle, "Tokens of answers", x_label=x, y_label="tokens per second", low=0),
        svg.lines(under_way, middle, "Requests under way", x_label=x, y_label="requests", low=0),
    ]


def html(records: Sequence[Record], found: Mapping[str, Any], title: str, intro: Sequence[str], notes: Sequence[str]) -> str:  # fmt: skip
    """`found`: of `report.summary`. `intro`, `notes`: sentences, as plain text."""
    head = "".join(f"<th>{escape(h)}</th>" for h in HEADS)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in cells(found))
    failed = "\n".join(
        f"<li>{error['count']:,} × {escape(kind)}: <code>{escape(error['first'])}</code></li>"
        for kind, error in found["errors"].items()
    )
    paragraphs = "\n".join(f"<p>{escape(line)}</p>" for line in intro)
    remarks = "\n".join(f'<p class="note">{escape(line)}</p>' for line in notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{svg.STYLE}{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
{paragraphs}
<table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table>
{"".join(_charts(records))}
{f"<h2>Errors</h2><ul>{failed}</ul>" if failed else ""}
{remarks}
</body></html>
"""
