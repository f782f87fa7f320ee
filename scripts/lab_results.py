"""Writes docs/lab-results.md and docs/lab.json from a run of the lab: `python -m scripts.lab_results FOLDER "command"`.

Then `python -m scripts.taxonomy` puts the figures beside each recipe.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvloom.lab import report
from kvloom.lab.records import load
from kvloom.lab.tables import Row, summarize

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEAD = """\
# Lab results

Every recipe on the same examples, in turns, on the bundled model. What the columns mean: [lab.md](lab.md).

```bash
{command}
```

"""


def figures(model: str, row: Row) -> dict[str, Any]:
    """What the taxonomy shows of a recipe; null where the run did not measure it."""
    return {
        "model": model,
        "cache": row.recipe,
        "quality": row.quality and round(row.quality.mean, 4),
        "smaller": round(row.smaller, 2) if row.smaller and row.recipe != "full" else None,
        "kl": row.kl and round(row.kl.mean, 4),
    }


def write(folder: Path, command: str, docs: Path = DOCS) -> None:
    """The tables of the run, and by name the figures of every recipe that is no composition."""
    records = load([folder])
    page = HEAD.format(command=command) + report.markdown(records).rstrip() + "\n"
    found: dict[str, list[dict[str, Any]]] = {}
    for summary in summarize(records):
        for row in summary.rows:
            if "|" not in row.recipe:
                found.setdefault(row.recipe.partition("(")[0], []).append(figures(summary.model, row))
    (docs / "lab-results.md").write_text(page, encoding="utf-8")
    (docs / "lab.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write(Path(sys.argv[1]), sys.argv[2])
