"""Fails if a source file of the work tree, tracked or not yet added, is longer than LIMIT lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LIMIT = 400
SUFFIXES = {".py", ".cpp", ".h"}


def sources(root: Path) -> list[Path]:
    """Source files below root that git tracks or would add; all of them where root is no git work tree."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        paths = [root / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [path for path in root.rglob("*") if ".venv" not in str(path.relative_to(root))]
    # a file that was deleted but not yet removed from the index is listed too
    return sorted(path for path in paths if path.suffix in SUFFIXES and path.is_file())


def main() -> None:
    """Prints every file over the limit with its length."""
    root = Path(__file__).resolve().parent.parent
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(root)}
    too_long = {path: length for path, length in lengths.items() if length > LIMIT}
    for path, length in too_long.items():
        print(f"{path.relative_to(root)}: {length} lines, at most {LIMIT} are allowed: split it")
    if too_long:
        sys.exit(1)
    print(f"{len(lengths)} source files, none longer than {LIMIT} lines")


if __name__ == "__main__":
    main()
