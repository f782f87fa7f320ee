"""A run as one HTML page that needs nothing else, as Markdown, and as a table in the terminal."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kvloom.errors import LabError
from kvloom.lab import svg
from kvloom.lab.page import amount
from kvloom.lab.records import Record
from kvloom.lab.stats import Interval
from kvloom.lab.tables import BEYOND, Cell, Row, Spread, Summary, by_length, summarize

__all__ = ["HEADS", "cells", "html", "markdown", "show", "summary", "write"]

HEADS = (
    "recipe", "rank", "quality", "to full", "cache", "smaller", "prefill", "decode", "peak", "bits/byte", "perplexity", "KL", "top-1", "mass kept",
)  # fmt: skip
STYLE = """
body{background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-size:.875rem;display:block;overflow-x:auto;margin:1rem 0}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--dim);font-weight:600}
th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid var(--hot)}
th[aria-sort=ascending] button:after{content:" ▲"}th[aria-sort=descending] button:after{content:" ▼"}
code{font:.85em ui-monospace,monospace}p.note,footer,summary{color:var(--dim);font-size:.875rem}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(24rem,1fr));gap:1rem}
""".replace("\n", "")
SCRIPT = """
document.querySelectorAll("table.sort th").forEach((head,column)=>{const button=head.querySelector("button");
if(!button)return;button.addEventListener("click",()=>{const table=head.closest("table"),body=table.tBodies[0];
const at=[...head.parentNode.children].indexOf(head),up=head.getAttribute("aria-sort")!=="ascending";
table.querySelectorAll("th").forEach(h=>h.removeAttribute("aria-sort"));
head.setAttribute("aria-sort",up?"ascending":"descending");
const value=row=>{const cell=row.cells[at],v=cell.dataset.v;return v===undefined?cell.textContent:v===""?NaN:Number(v)};
[...body.rows].sort((a,b)=>{const x=value(a),y=value(b);if(typeof x==="string")return up?x.localeCompare(y):y.localeCompare(x);
if(isNaN(x)||isNaN(y))return isNaN(x)-isNaN(y);return up?x-y:y-x}).forEach(row=>body.append(row))})});
""".replace("\n", "")


def _share(x: Interval | None, signed: bool = False) -> str:
    if x is None:
        return "-"
    half = max(x.high - x.mean, x.mean - x.low)
    return f"{x.mean:{'+' if signed else ''}.1%}" + (f" ± {half:.1%}" if math.isfinite(half) else " (too few)")


def _time(x: Spread | None, unit: str, spread: bool) -> str:
    if x is None:
        return "-"
    return f"{x.middle:.3g} {unit}" + (f" ({x.low:.3g} to {x.high:.3g})" if spread else "")


def cells(row: Row, spread: bool = False) -> list[tuple[str, float | None]]:
    """A row of the table: text and the number to sort by, in the order of HEADS. `spread`: quartiles behind times."""

    def mean(x: Interval | None) -> float | None:
        return None if x is None else x.mean

    def middle(x: Spread | None) -> float | None:
        return None if x is None else x.middle

    return [
        (row.recipe + (f" ({row.refused} refused)" if row.refused else ""), None),
        (str(row.rank) if row.quality else "-", float(row.rank) if row.quality else None),
        (_share(row.quality), mean(row.quality)),
        (_share(row.to_full, signed=True), mean(row.to_full)),
        (amount(row.used) if row.used is not None else "-", row.used),
        (f"{row.smaller:.1f}×" if row.smaller else "-", row.smaller),
        (_time(row.prefill, "s", spread), middle(row.prefill)),
        (_time(row.decode, "ms", spread), middle(row.decode)),
        (amount(row.peak.middle) if row.peak else "-", middle(row.peak)),
        (f"{row.bits.mean:+.3f}" if row.bits else "-", mean(row.bits)),
        (f"{row.perplexity:.2f}" if row.perplexity else "-", row.perplexity),
        (f"{row.kl.mean:.4f}" if row.kl else "-", mean(row.kl)),
        (f"{row.top1:.1%}" if row.top1 is not None else "-", row.top1),
        (f"{row.mass:.1%}" if row.mass is not None else "-", row.mass),
    ]


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """For JSON."""
    return {"models": [found.to_dict() for found in summarize(records)]}


def show(records: Sequence[Record]) -> None:
    """Tables in the terminal, one per model."""
    console = Console()
    for found in summarize(records):
        shown = _shown(found)
        table = Table(title=found.model, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i in shown:
            width = 18 if i == 0 else max(len(cells(row)[i][0].partition(" ±")[0]) for row in found.rows)
            table.add_column(HEADS[i], justify="right" if i else "left", overflow="fold", min_width=width)
        for row in found.rows:
            table.add_row(*(cells(row)[i][0] for i in shown))
        console.print(table)
        for text in _remarks(found):
            console.print(text, style="dim", highlight=False, markup=False)


def _remarks(found: Summary) -> list[str]:
    out = []
    if found.beyond:
        names = ", ".join(_title(cell) for cell in found.beyond)
        out.append(f"Beyond this model (the full cache scores under {BEYOND:.0%}), not averaged in: {names}.")
    out += [f"Not run: {what} ({count}×)" for what, count in found.errors.items()]
    return out


def _title(cell: Cell) -> str:
    return f"{cell[0]} at {cell[1]:,}" + ("" if cell[2] == "multi-turn" else f", {cell[2]}")


def markdown(records: Sequence[Record]) -> str:
    """The same tables as Markdown."""
    parts = []
    for found in summarize(records):
        shown = _shown(found)
        rows = [[cells(row, spread=True)[i][0] for i in shown] for row in found.rows]
        parts += [f"## {found.model}", "", _md([HEADS[i] for i in shown], rows), ""]
        if found.cells:
            recipes = [row.recipe for row in found.rows]
            lines = [
                [_title(cell), *(_percent(scores.get(recipe)) for recipe in recipes)]
                for cell, scores in found.cells.items()
            ]
            parts += [_md(["task", *recipes], lines), ""]
        parts += [f"{text}\n" for text in _remarks(found)]
        parts += [_versions(found), ""]
    return "\n".join(parts)


def _percent(x: Interval | None) -> str:
    return "-" if x is None else f"{x.mean:.0%}"


def _md(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(heads), ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _versions(found: Summary) -> str:
    made = dict.fromkeys(
        f"model {m.fingerprint[:12]} in {m.dtype}, seed {m.seed}, kvloom {m.kvloom}{' ' + m.commit if m.commit else ''}, torch {m.torch}, "
        f"transformers {m.transformers}, Python {m.python}, {m.device}, {m.threads} threads, {m.kernels} kernels"
        for m in (r.made for r in found.records)
    )
    return "; ".join(made)


def _table(heads: Sequence[str], rows: Iterable[Sequence[tuple[str, float | None]]]) -> str:
    head = "".join(f'<th scope="col"><button type="button">{escape(h)}</button></th>' for h in heads)
    body = []
    for row in rows:
        first, *others = row
        tds = "".join(
            f'<td data-v="{"" if v is None else format(v, ".10g")}">{escape(text)}</td>' for text, v in others
        )
        body.append(f"<tr><td><code>{escape(first[0])}</code></td>{tds}</tr>")
    return f'<table class="sort"><thead><tr>{head}</tr></thead>\n<tbody>' + "\n".join(body) + "</tbody></table>"


def _shown(found: Summary) -> list[int]:
    """The columns that say something."""
    return [i for i in range(len(HEADS)) if any(cells(row)[i][0] != "-" for row in found.rows)]


def _overview(found: Summary) -> str:
    shown = _shown(found)
    return _table([HEADS[i] for i in shown], [[cells(row, spread=True)[i] for i in shown] for row in found.rows])


def _quality(found: Summary) -> str:
    points = [
        svg.Point(
            row.used, 100 * row.quality.mean, row.recipe,
            y_error=(100 * row.quality.low, 100 * row.quality.high),
            note=f"{row.recipe}: {row.quality.mean:.1%}, {amount(row.used)}",
        )
        for row in found.rows
        if row.quality is not None and row.used
    ]  # fmt: skip
    if not points:
        return ""
    chart = svg.scatter(
        points, "Quality against bytes", x_label="bytes of the cache after the prompt", y_label="mean score, %",
        best=("low", "high"), log_x=True, bytes_x=True,
    )  # fmt: skip
    return (
        f'<h3>Quality against bytes</h3>{chart}<p class="note">Up and to the left is better. The line joins recipes that no '
        "other beats in both (the Pareto front). Bars: 95 % intervals of the mean; differences are judged in pairs, below.</p>"
    )


def _kl(found: Summary) -> str:
    points = [
        svg.Point(row.used, row.kl.mean, row.recipe, y_error=(max(0.0, row.kl.low), row.kl.high))
        for row in found.rows
        if row.kl is not None and row.used
    ]
    if not points:
        return ""
    return "<h3>Damage against bytes</h3>" + svg.scatter(
        points, "KL divergence to the full cache", x_label="bytes of the cache after the prompt",
        y_label="nats per token", log_x=True, bytes_x=True,
    )  # fmt: skip


def _cells(found: Summary) -> str:
    if not found.cells:
        return ""
    recipes = [row.recipe for row in found.rows]
    rows = []
    for cell, scores in found.cells.items():
        mark = " (beyond this model)" if cell in found.beyond else ""
        row: list[tuple[str, float | None]] = [(_title(cell) + mark, None)]
        row += [(_percent(scores.get(r)), scores[r].mean if r in scores else None) for r in recipes]
        rows.append(row)
    grid = [[100 * scores[r].mean if r in scores else math.nan for r in recipes] for scores in found.cells.values()]
    heat = svg.heat(
        list(map(list, zip(*grid))), [_title(cell) for cell in found.cells], recipes, "Score of every recipe in every task", "%",
        low=0, high=100,
    )  # fmt: skip
    return f"<h3>Task by task</h3>{_table(('task', *recipes), rows)}{heat if len(found.cells) <= 16 else ''}"


def _depths(found: Summary) -> str:
    parts = []
    for task in dict.fromkeys(r.task for r in found.records if "depth" in r.about):
        for row in found.rows:
            own = [r for r in found.records if r.recipe == row.recipe and r.task == task and "depth" in r.about]
            depths, lengths, means = by_length(own, lambda r: float(r.about["depth"]))
            grid = [[100 * means.get((d, n), math.nan) for n in lengths] for d in depths]
            parts.append(
                svg.heat(
                    grid,
                    [f"{n:,}" for n in lengths],
                    [f"{d:.0f}" for d in depths],
                    f"{task}: {row.recipe}",
                    "%",
                    x_label="tokens",
                    y_label="depth, %",
                    low=0,
                    high=100,
                )
            )
    return f'<h3>Depth and length</h3><div class="maps">{"".join(parts)}</div>' if parts else ""


def _layers(found: Summary) -> str:
    parts = []
    for name, title, axis in (
        ("error", "Error of attention outputs, by layer", "relative error, mean over heads"),
        ("mass", "Attention mass on what was kept, by layer", "share, mean over heads"),
    ):
        series: dict[str, list[float]] = {}
        layers: list[float] = []
        for row in found.rows:
            near = [r.fidelity for r in found.records if r.recipe == row.recipe and r.fidelity]
            if near and row.recipe != "full":
                layers = [float(x) for x in near[0]["layers"]]
                series[row.recipe] = [fmean(fmean(x[name][i]) for x in near) for i in range(len(layers))]
        if series:
            parts.append(svg.lines(series, layers, title, x_label="layer", y_label=axis, low=0))
            heads = [
                svg.heat(
                    [
                        [fmean(x[name][i][h] for x in near) for h in range(len(near[0][name][i]))]
                        for i in range(len(layers))
                    ],
                    [str(h) for h in range(len(near[0][name][0]))],
                    [f"{x:.0f}" for x in layers],
                    recipe,
                    low=0,
                    x_label="head",
                    y_label="layer",
                    high=1 if name == "mass" else None,
                )
                for recipe in series
                if (near := [r.fidelity for r in found.records if r.recipe == recipe and r.fidelity])
            ]
            parts.append(f'<details><summary>by head</summary><div class="maps">{"".join(heads)}</div></details>')
    return f"<h3>Inside the model</h3>{''.join(parts)}" if parts else ""


def _turns(found: Summary) -> str:
    parts = []
    for task, mode in dict.fromkeys((r.task, r.mode) for r in found.records if len(r.scores) > 1):
        series = {}
        for row in found.rows:
            own = [r for r in found.records if (r.recipe, r.task, r.mode) == (row.recipe, task, mode) and r.scores]
            most = max((len(r.scores) for r in own), default=0)
            series[row.recipe] = [100 * fmean(r.scores[i] for r in own if len(r.scores) > i) for i in range(most)]
        turns = [float(i + 1) for i in range(max(map(len, series.values())))]
        title = f"{task}, {mode}: score by turn"
        parts.append(svg.lines(series, turns, title, x_label="turn", y_label="score, %", low=0, high=100))
    return f"<h3>Turn by turn</h3>{''.join(parts)}" if parts else ""


def _stages(found: Summary) -> str:
    rows = []
    for row in found.rows:
        stages = next((r.stages for r in found.records if r.recipe == row.recipe and r.stages), None)
        if stages:
            prefill = f"{row.prefill.middle:.3g} s" if row.prefill else "-"
            ratio = f"{stages['compression']}"
            if ratio != "not applicable" and row.smaller:
                ratio += f", {row.smaller:.1f}× smaller"
            texts = (row.recipe, prefill, ratio, stages["retrieval"], stages["loading"])
            rows.append([(text, None) for text in texts])
    heads = ("recipe", "generation", "compression", "retrieval", "loading")
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text, _ in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{h}</th>" for h in heads)
    return (
        f"<h3>Stages of the cache's life</h3><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        if rows
        else ""
    )


def html(records: Sequence[Record], title: str = "kvloom lab") -> str:
    """The page: self-contained, one section per model."""
    parts = []
    for found in summarize(records):
        remarks = "".join(f"<p>{escape(text)}</p>" for text in _remarks(found))
        parts.append(
            f"<h2><code>{escape(found.model)}</code></h2>{_overview(found)}"
            '<p class="note">quality: mean score, every cell (task, length, mode) weighing the same, with its 95 % interval. to full: '
            "the same less the full cache's on the same examples; its interval holds every shift that a sign-flip test does not "
            "reject. rank: 1 + how many recipes are clearly better, so recipes whose difference lies inside its interval are not "
            "ranked against each other. prefill, decode, peak: medians (and quartiles); recipes take turns at every example. bits/byte: more "
            "than the full cache; perplexity: per token. Click a head to sort.</p>"
            f"{remarks}{_quality(found)}{_kl(found)}{_cells(found)}{_depths(found)}{_layers(found)}{_turns(found)}{_stages(found)}"
            f'<p class="note">{escape(_versions(found))}</p>'
        )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{svg.STYLE}{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
{"".join(parts)}
<script>{SCRIPT}</script></body></html>
"""


def write(records: Sequence[Record], page: Path, text: Path) -> Path:
    """Writes both files whole or not at all; returns the page. Raises LabError if there is nothing to show."""
    if not records:
        raise LabError("there are no results to report. Run something first: kvloom lab run smoke --model nano")
    for path, content in ((page, html(records)), (text, markdown(records))):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.replace(name, path)
    return page
