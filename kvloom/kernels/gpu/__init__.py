"""The GPU's kernels, in Triton: the calls of `native`, with what describes slots as tensors instead of addresses.

`dispatch` calls them. `tiles` reads stored slots, `split` attends over them and `decode` plans its launches; `quantize`, `mass` and `flash` are the
kernels behind `launch`. Triton is imported when a kernel first runs.
"""

from kvloom.kernels.gpu.decode import Job, attend, job, run
from kvloom.kernels.gpu.launch import encode, observe, prefill, window_lse, window_mass
from kvloom.kernels.gpu.runs import Dense, Packed, dense, packed, tile
from kvloom.kernels.gpu.serving import ROWS, available, fits, found, obstacle, queries, runs_on, serves, triton

__all__ = [
    "ROWS", "Dense", "Job", "Packed", "attend", "available", "dense", "encode", "fits", "found", "job", "observe", "obstacle",
    "packed", "prefill", "queries", "run", "runs_on", "serves", "tile", "triton", "window_lse", "window_mass",
]  # fmt: skip
