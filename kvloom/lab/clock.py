"""Seconds and peak memory of a piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import time
from pathlib import Path

import torch

__all__ = ["Clock"]

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Clock:
    """Wall time with the accelerator's queue emptied. With `memory`, also the peak of allocated or resident bytes.

    On a GPU the peak is what torch's allocator held at most, on Linux the peak of the resident set; both less what was
    held at the start. Elsewhere it is None.
    """

    def __init__(self, memory: bool = False) -> None:
        self.before = _reset() if memory else None
        self.start = self._now()

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self) -> float:
        """Since the clock was made."""
        return self._now() - self.start

    def peak(self) -> int | None:
        """Bytes at the peak since the clock was made, less those held at its start."""
        now = None if self.before is None else _peak()
        return None if now is None or self.before is None else max(0, now - self.before)


def _reset() -> int | None:
    """Starts a new peak; bytes held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    _trim()
    try:
        CLEAR.write_text("5")  # resets the peak of the resident set
    except OSError:
        return None
    return _status("VmRSS:")


def _trim() -> None:
    """Gives freed memory back to the system: what the C library keeps would hide the next piece of work in itself."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _peak() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM:")


def _status(name: str) -> int | None:
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith(name)), None)
    return None if line is None else int(line.split()[1]) * 1024
