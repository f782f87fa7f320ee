"""Installs the pinned torch into the running interpreter's environment, a CPU build where one can be had.

Usage: python scripts/install_torch.py CONSTRAINTS, a file with a line ``torch==VERSION``.

On Linux the default package index serves torch with several GB of CUDA libraries. So PyTorch's own CPU index
is tried first, once, and the default index is used where that one does not answer. TORCH_INDEX in the
environment overrides this: the index of that address alone is used, or the default one if it is empty.

Only torch itself is installed: its dependencies come with the next step, pinned by the same constraints.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE = "import sys, urllib.request as r; r.urlopen(r.Request(sys.argv[1], method='HEAD'), timeout=5)"


def pinned(constraints: Path) -> str:
    """The version in the line ``torch==VERSION`` of a constraints file."""
    match = re.search(r"^torch==(\S+)", constraints.read_text(), flags=re.MULTILINE)
    if match is None:
        sys.exit(f"{constraints} pins no torch: add a line torch==VERSION")
    return match[1]


def installed() -> str | None:
    """The torch version of this environment without its local part ("+cpu"), or None."""
    try:
        return metadata.version("torch").partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def answers(index: str) -> bool:
    """Whether an index answers a request for torch's page within seconds."""
    # In a process of its own, as looking up a host's name can outlast any time-out of the request.
    try:
        probe = subprocess.run([sys.executable, "-c", PROBE, f"{index}/torch/"], capture_output=True, timeout=10)
    except subprocess.TimeoutExpired:
        return False
    return probe.returncode == 0


def install(version: str, *options: str) -> bool:
    """Runs pip for torch alone; False if it failed."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", *options, f"torch=={version}"]
    return subprocess.run(pip).returncode == 0


def main() -> None:
    """Installs torch unless the pinned version is there already."""
    version = pinned(Path(sys.argv[1]))
    if installed() == version:
        return
    index = os.environ.get("TORCH_INDEX")
    if index is None and sys.platform == "linux" and answers(CPU_INDEX):
        print(f"Installing torch {version} from {CPU_INDEX}", flush=True)
        if install(version, "--index-url", CPU_INDEX, "--timeout", "15", "--retries", "0"):
            return
    print(f"Installing torch {version} from {index or 'the default index'}", flush=True)
    if not install(version, *(["--index-url", index] if index else [])):
        sys.exit(f"torch {version} could not be installed: give an index that has it as TORCH_INDEX=ADDRESS")


if __name__ == "__main__":
    main()
