"""What scripts share that make pages of docs/ from data: they write the page, or with `--check` say whether it is current."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

__all__ = ["write_or_check"]


def write_or_check(page: Path, wanted: str, about: str, count: str) -> None:
    """Writes `wanted`; with `--check` on the command line it writes nothing and fails if the page says something else.

    `about`: what `--help` shows. `count`: what was written, in a few words.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--check", action="store_true", help="fail if the page is not current; write nothing")
    if not parser.parse_args().check:
        page.write_text(wanted, encoding="utf-8")
        print(f"{page.name}: {count}")
    elif not page.exists() or wanted != page.read_text(encoding="utf-8"):
        script = Path(sys.argv[0]).stem
        sys.exit(f"{page.name} is not what it is made from says: run python -m scripts.{script}")
