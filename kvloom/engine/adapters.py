"""LoRA adapters (arXiv 2106.09685) for one model: any number known by name, those in use in the memory that caches have.

As in S-LoRA (arXiv 2311.03285) the model's own products are computed once for a step, and what adapters add to them is added for
the rows of each; adapters and keys and values share one pool, so whoever needs memory gets what the others leave.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvloom.engine.lora import Outline, read_outline, read_tensors
from kvloom.engine.pool import Pool
from kvloom.errors import ModelError, RequestError, unknown

__all__ = ["Adapter", "Adapters"]

Where = slice | Tensor


@dataclass(eq=False)
class Adapter:
    """`weights`: (A [r, in], B [out, r], scale) of every module, in one storage; empty while it is not in memory."""

    name: str
    outline: Outline
    digest: str = ""  # of all that it does to numbers, once it was read
    weights: dict[str, tuple[Tensor, Tensor, float]] | None = None
    used: int = 0

    @property
    def nbytes(self) -> int:
        return self.outline.elements * self.outline.itemsize


class Adapters:
    """What adapters there are, and which are in memory. `pool`: what they take is part of it."""

    def __init__(self, model: PreTrainedModel, pool: Pool, paths: Mapping[str, str | Path] | None = None) -> None:
        self.model, self.pool = model, pool
        self.known: dict[str, Adapter] = {}
        self.resident: dict[str, Adapter] = {}
        self.loads = 0
        self._clock = count(1)
        self._linear: dict[str, nn.Linear] | None = None
        for name, path in (paths or {}).items():
            self.add(name, path)

    def __len__(self) -> int:
        return len(self.known)

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def add(self, name: str, path: str | Path) -> None:
        """Makes a folder as PEFT writes it known under a name. Only its configuration and the shapes in its file are read.

        Raises RequestError for a name that is taken, and ModelError for an adapter that does not fit the model.
        """
        if not name or name in self.known:
            raise RequestError(
                f"adapter {name!r}: " + ("there is one of this name already." if name else "give it a name.")
            )
        if self._linear is None:
            self._linear = _reached(self.model)
        self.known[name] = Adapter(name, read_outline(name, Path(path), self._linear))

    def find(self, name: str) -> Adapter:
        """Raises RequestError for a name that is not known."""
        found = self.known.get(name)
        if found is None:
            raise RequestError(unknown("adapter", name, self.known))
        return found

    def needs(self, name: str) -> int:
        """Bytes that have to be free before a request with this adapter ("": none) begins, for the adapter alone."""
        return 0 if not name or name in self.resident else self.find(name).nbytes

    def load(self, name: str) -> Adapter:
        """An adapter, in memory from now on. Raises ModelError if its file is not what it was when it was added."""
        found = self.find(name)
        found.used = next(self._clock)
        if found.weights is None:
            weight = next(self.model.parameters())
            room = torch.empty(found.outline.elements, dtype=found.outline.dtype, device=weight.device)
            found.weights, at, digest = {}, 0, hashlib.blake2b(digest_size=16)
            for module, a, b in read_tensors(name, found.outline):
                pair = []
                for x in (a, b):
                    pair.append(room[at : at + x.numel()].view(x.shape).copy_(x))
                    at += x.numel()
                scale = found.outline.modules[module].scale
                digest.update(f"{module} {tuple(a.shape)} {tuple(b.shape)} {scale!r} ".encode())
                digest.update(room[at - a.numel() - b.numel() : at].cpu().view(torch.uint8).numpy().tobytes())
                found.weights[module] = (pair[0], pair[1], scale)
            found.digest = digest.hexdigest()
            self.resident[name] = found
            self.pool.hold(found, [(room.data_ptr(), room.nbytes, "adapter")])
            self.loads += 1
        return found

    def evict(self, busy: Collection[str]) -> bool:
        """Forgets the weights of the least recently used adapter but those in `busy`. False if there is none."""
        idle = [x for x in self.resident.values() if x.name not in busy]
        if not idle:
            return False
        least = min(idle, key=lambda x: x.used)
        least.weights = None
        del self.resident[least.name]
        self.pool.drop(least)
        return True

    @contextmanager
    def applied(self, parts: Iterable[tuple[str, int]]) -> Iterator[None]:
        """Within, a flat forward takes the rows of each part through its adapter. `parts`: name ("": none) and rows, in order."""
        spans: dict[str, list[tuple[int, int]]] = {}
        n = 0
        for name, rows in parts:
            if name:
                spans.setdefault(name, []).append((n, n + rows))
            n += rows
        work: dict[str, list[tuple[Where, Tensor, Tensor, float]]] = {}
        for name, found in spans.items():
            where = _where(found, self.model.device)
            for module, weights in (self.resident[name].weights or {}).items():
                work.setdefault(module, []).append((where, *weights))
        assert not work or self._linear is not None
        hooks = [(self._linear or {})[x].register_forward_hook(_adds(jobs, n)) for x, jobs in work.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _where(spans: list[tuple[int, int]], device: torch.device) -> Where:
    if all(b == a for (_, b), (a, _) in pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    return torch.cat([torch.arange(a, b) for a, b in spans]).to(device)


def _adds(jobs: list[tuple[Where, Tensor, Tensor, float]], rows: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        x, y = args[0].flatten(0, -2), out.view(-1, out.shape[-1])
        if len(x) != rows:
            raise ModelError(
                f"a module with an adapter saw {len(x)} rows of {rows}; this model can't be served with it."
            )
        for where, a, b, scale in jobs:
            if isinstance(where, slice):
                y[where].addmm_(x[where] @ a.T, b.T, alpha=scale)
            else:
                y.index_add_(0, where, (x[where] @ a.T) @ b.T, alpha=scale)

    return hook


@torch.no_grad()
def _reached(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear modules that every token goes through exactly once, by name: not experts, not the output layer."""
    n, seen = 3, dict[str, int]()

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        whole = args[0].numel() == n * args[0].shape[-1]
        seen[name] = seen.get(name, 0) + (1 if whole else n)

    found = {name: x for name, x in model.named_modules() if type(x) is nn.Linear and ".experts." not in name}
    hooks = [x.register_forward_pre_hook(partial(note, name)) for name, x in found.items()]
    try:
        model(torch.zeros(1, n, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    head = model.get_output_embeddings()
    return {name: x for name, x in found.items() if seen.get(name) == 1 and x is not head}
