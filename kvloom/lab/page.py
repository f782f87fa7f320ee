"""A result as one HTML page that needs nothing else: plot, table, answers, versions."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from html import escape
from math import log10

import torch
import transformers

from kvloom.lab import stats
from kvloom.lab.measure import Measured

__all__ = ["HEADS", "amount", "cells", "html", "pareto", "versions"]

STYLE = """
:root{--bg:#fff;--fg:#1c2126;--dim:#66707a;--line:#d9dee3;--hot:#0b63ce;--ok:#18794e;--bad:#c0342b}
@media(prefers-color-scheme:dark){:root{--bg:#14181c;--fg:#e4e8ec;--dim:#94a0aa;--line:#333b43;--hot:#6cb0ff;
--ok:#5ccb96;--bad:#ff8a80}}
body{background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif;max-width:60rem;
margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-size:.875rem;display:block;overflow-x:auto;margin:1rem 0}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}th{color:var(--dim);font-weight:600}
code{font:.85em ui-monospace,monospace}p.note,footer{color:var(--dim);font-size:.875rem}
.ok{color:var(--ok)}.bad{color:var(--bad)}svg{width:100%;height:auto}svg text{fill:var(--fg);font-size:12px}
svg .dim{fill:var(--dim)}svg .grid{stroke:var(--line)}svg .front{stroke:var(--hot);fill:none;stroke-width:2}
svg circle{fill:var(--dim)}svg circle.best{fill:var(--hot)}
""".replace("\n", "")
MARKS = {True: '<span class="ok">✓ right</span>', False: '<span class="bad">✗ wrong</span>', None: ""}
HEADS = ("recipe", "cache", "with room", "smaller", "prefill", "decode", "right", "KL to full", "same top token")


def amount(nbytes: float) -> str:
    """Bytes for people: "1.50 MiB"."""
    return f"{nbytes / 2**20:.2f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"


def cells(row: Measured) -> list[str]:
    """A row of the table as text, in the order of HEADS."""
    return [
        row.recipe,
        amount(row.used),
        amount(row.nbytes),
        f"{row.smaller:.1f}×",
        f"{row.prefill_seconds:.2f} s",
        f"{row.decode_ms:.1f} ms",
        f"{row.right}/{row.asked}" if row.asked else "-",
        f"{row.kl:.4f}",
        f"{row.agreement:.0%}",
    ]


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    from kvloom import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "kvloom": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def pareto(rows: Sequence[Measured]) -> list[Measured]:
    """Rows that no other beats in both bytes and KL, by rising bytes."""
    return [rows[i] for i in stats.pareto([(row.used, -row.kl) for row in rows])]


def plot(rows: Sequence[Measured]) -> str:
    """KL against bytes as SVG: bytes on a log scale, KL on a square-root scale so that small ones stay apart."""
    width, height, left, right, top, bottom = 860, 440, 64, 30, 24, 54
    low, high = (log10(f(r.used for r in rows)) for f in (min, max))
    low, high = low - 0.08, high + 0.12
    most = max(max(r.kl for r in rows) * 1.1, 1e-6)

    def x(used: float) -> float:
        return left + (log10(used) - low) / (high - low) * (width - left - right)

    def y(kl: float) -> float:
        return height - bottom - (kl / most) ** 0.5 * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="KL divergence against cache bytes">']
    for part in (0, 0.05, 0.2, 0.5, 1):
        at = y(most * part)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="dim" x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{most * part:.2g}</text>')
    for step in range(40):
        size = 2.0 ** (10 + step)
        if low <= log10(size) <= high:
            label = f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"
            at, foot = x(size), height - bottom
            parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{foot}"/>')
            parts.append(f'<text class="dim" x="{at:.1f}" y="{foot + 18}" text-anchor="middle">{label}</text>')
    front = pareto(rows)
    points = " ".join(f"{x(r.used):.1f},{y(r.kl):.1f}" for r in front)
    parts.append(f'<polyline class="front" points="{points}"/>')
    taken: list[tuple[float, float, float]] = []
    for row in sorted(rows, key=lambda r: r.kl, reverse=True):
        at, level = x(row.used), y(row.kl)
        best = ' class="best"' if row in front else ""
        parts.append(f'<circle{best} cx="{at:.1f}" cy="{level:.1f}" r="5"><title>{escape(row.recipe)}</title></circle>')
        long = 6.6 * len(row.recipe)
        start = at + 9 if at + 9 + long < width else at - 9 - long
        line = level - 8
        while any(abs(line - at_line) < 13 and start < e and b < start + long for b, e, at_line in taken):
            line -= 13
        taken.append((start, start + long, line))
        parts.append(f'<text x="{start:.1f}" y="{line:.1f}">{escape(row.recipe)}</text>')
    middle = (top + height - bottom) / 2
    parts.append(
        f'<text class="dim" x="{width / 2}" y="{height - 12}" text-anchor="middle">'
        "bytes of the cache after the prompt</text>"
    )
    parts.append(
        f'<text class="dim" transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        "KL to the full cache, nats per token</text></svg>"
    )
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{h}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _answers(rows: Sequence[Measured]) -> str:
    parts = []
    for i, first in enumerate(rows[0].answers):
        when = "asked in the prompt" if first.turn == 1 else f"asked in turn {first.turn}, after compression"
        wanted = "" if first.expected is None else f" Right: <code>{escape(first.expected)}</code>."
        lines = []
        for row in rows:
            got = row.answers[i]
            mark = MARKS[got.right]
            lines.append((f"<code>{escape(row.recipe)}</code>", escape(got.got) or "(nothing)", mark))
        parts.append(f"<h3>{escape(first.question)}</h3><p class=note>{when}.{wanted}</p>")
        parts.append(_table(("recipe", "answer", ""), lines))
    return "\n".join(parts)


def html(rows: Sequence[Measured], model: str, title: str = "kvloom: what each recipe keeps") -> str:
    """The page, self-contained: no script, no outside file."""
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    table = _table(HEADS, [[f"<code>{escape(c[0])}</code>", *map(escape, c[1:])] for c in map(cells, rows)])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>Model <code>{escape(model)}</code>, a prompt of {rows[0].tokens:,} tokens, one prefill per recipe.</p>
<h2>Bytes and damage</h2>
{plot(rows)}
<p class="note">Down and to the left is better. The line joins the recipes that no other beats in both (the Pareto
front).</p>
<h2>Numbers</h2>
{table}
<p class="note">cache: bytes stored after the prompt; with room: with empty room for growth. decode: median
time of one token. KL and the share of same top tokens: against the full cache, read token by token over the
same continuation. One document and few questions: an illustration, no benchmark. Speed differs by machine.</p>
<h2>Answers</h2>
{_answers(rows)}
<footer>{escape(made)}</footer></body></html>
"""
