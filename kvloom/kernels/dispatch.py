"""Which kernels work on a tensor: the compiled ones on a CPU, Triton's on a GPU, or none, which leaves it to `reference`.

KVLOOM_KERNELS=torch switches all of them off. KVLOOM_KERNELS=triton is for tests: Triton's kernels then serve any device,
CPUs through Triton's interpreter (TRITON_INTERPRET=1), which is very slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from kvloom.kernels import gpu, native
from kvloom.kernels.tile import Term

__all__ = ["Job", "Kernels", "kernels_for", "run"]

Job = native.Job | gpu.Job


class Kernels(Protocol):
    """What `native` and `gpu` both offer. A run of slots is described as the kernels that read it like it: hence Any."""

    ROWS: int

    def queries(self, q: Tensor) -> Tensor: ...
    def serves(self, q: Tensor, value_dim: int) -> bool: ...
    def fits(self, q: Tensor, *others: Tensor) -> bool: ...
    def dense(self, x: Tensor, q: Tensor | None = None) -> Any: ...
    def packed(
        self, along: str, bits: int, group: int, codes: Tensor, scale: Tensor, zero: Tensor, q: Tensor | None = None
    ) -> Any: ...
    def tile(self, n: int, terms: list[Term], kept: list[Tensor]) -> Any: ...
    def job(
        self, h: int, rows: int, dim: int, value_dim: int, parts: list[native.Part], scale: float, softcap: float | None
    ) -> Any: ...
    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]: ...
    def observe(
        self, q: Tensor, k: Tensor, lse: Tensor, scale: float, past: int, softcap: float | None = None
    ) -> Tensor: ...
    def encode(self, x: Tensor, along: str, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor] | None: ...


def kernels_for(x: Tensor) -> Kernels | None:
    """The kernels that work where x lies; None: plain torch does.

    Raises KvloomError under KVLOOM_KERNELS=triton where they can't.
    """
    if gpu.runs_on(x.device):
        return gpu
    return native if native.ISA is not None and x.device.type == "cpu" else None


def run(jobs: Sequence[Job]) -> None:
    """Computes jobs of one device, of one sequence or of many, in one call."""
    if isinstance(jobs[0], gpu.Job):
        gpu.run(jobs)  # type: ignore[arg-type]
    else:
        native.run(jobs)  # type: ignore[arg-type]
