"""Finds the benchmarks in this folder, runs them one after another and prints their tables."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import platform
import sys
import time

import torch
import transformers
from rich.console import Console

import benchmarks


def main() -> None:
    """Runs all benchmarks, or those named by --only."""
    names = sorted(info.name for info in pkgutil.iter_modules(benchmarks.__path__) if info.name[0] != "_")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the benchmarks and stop")
    parser.add_argument("--only", metavar="NAME", action="append", choices=names, help="run it (repeatable)")
    options = parser.parse_args()

    # a table that goes to a file is not squeezed into the 80 columns assumed there
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if not options.list:
        console.print(f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}", markup=False)
    for name in options.only or names:
        module = importlib.import_module(f"benchmarks.{name}")
        if options.list:
            title = (module.__doc__ or "").strip().partition("\n")[0]
            console.print(f"{name:20} {title}", markup=False, soft_wrap=True)
            continue
        console.rule(name)
        start = time.perf_counter()
        console.print(module.run(), markup=False)
        console.print(f"{name}: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
