"""One `cache.update` of one layer: new keys and values of a batch, waiting for the queries that come with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.core.attention import Logits
from kvloom.core.mask import DenseMask, Gaps, LazyMask
from kvloom.core.together import together
from kvloom.errors import CacheError, ModelError

if TYPE_CHECKING:
    from kvloom.core.cache import KVLayer

__all__ = ["Mask", "Update", "watched"]

Mask = LazyMask | DenseMask | None
Watcher = Callable[[int, Tensor, Tensor, Logits, Mask, Tensor | None], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(by: Watcher) -> Iterator[None]:
    """Calls `by(layer, query [B, Hq, m, D], output [B, m, Hq, Dv], logits, mask, sinks)` after every attention of a managed
    layer. `mask.row(b, gaps, None)` gives what is visible beyond causal to row b; `sinks` [Hq]: learned ones, or None.
    """
    token = _watcher.set(by)
    try:
        yield
    finally:
        _watcher.reset(token)


class Update:
    """New rows k [B, H, m, D], v [B, H, m, Dv], and where a recipe asks their layer's input [B, m, hidden]. Attended once with their own queries, then stored."""

    def __init__(self, layer: KVLayer, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> None:
        self.layer, self.hidden = layer, hidden
        self.k: Tensor | None = k
        self.v: Tensor | None = v
        self.m, self.offset = k.shape[2], layer.seen

    def attend(
        self,
        query: Tensor,
        mask: LazyMask | Tensor | None,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """query [B, Hq, m, D] -> [B, m, Hq, Dv]; stores the rows and settles the layer."""
        if self.k is None or self.v is None:
            raise ModelError(
                f"layer {self.layer.site.layer}: its keys are attended to by a second layer (shared KV), which "
                f"{self.layer.cache.recipe.name} cannot serve. Use a stock cache for this model."
            )
        k, v, hidden, self.k, self.v, self.hidden = self.k, self.v, self.hidden, None, None, None
        self.layer.waiting = None
        self.layer.resolve()
        held = DenseMask(mask, k.shape[1]) if isinstance(mask, Tensor) else mask
        logits = Logits(scale, softcap, self.layer.rope)
        places: list[tuple[int, Tensor | None]] = []
        forwards = []
        for b, row in enumerate(self.layer.rows):
            row.layer.carry = self.layer.cache.carry(b)
            real = held.real(b) if held is not None else None
            start = row.layer.length
            _note(row.gaps, start, self.offset, real)
            if isinstance(held, LazyMask) and held.padded and start + _count(real, self.m) != held.count(b):
                raise CacheError(
                    f"attention_mask shows {held.count(b)} tokens in row {b}, but the cache holds {start} and "
                    f"{_count(real, self.m)} came. Pass the same mask for earlier tokens as when they were cached."
                )
            if real is not None and not len(real):
                continue
            visible = held.row(b, row.gaps, real) if held is not None else None
            q_row, k_row, v_row = (x[b] if real is None else x[b][:, real] for x in (query, k, v))
            places.append((b, real))
            x_row = None if hidden is None else hidden[b][None] if real is None else hidden[b][None, real]
            forwards.append(row.layer.forward(q_row, k_row, v_row, logits, visible, sinks, x_row))
        found = together(forwards)
        self.layer.settle()
        if len(self.layer.rows) == 1 and places and places[0][1] is None:
            out = found[0].transpose(0, 1)[None]
        else:
            out = query.new_zeros((query.shape[0], self.m, query.shape[1], v.shape[3]))
            for (b, real), got in zip(places, found, strict=True):
                out[b, slice(None) if real is None else real] = got.transpose(0, 1)
        watcher = _watcher.get()
        if watcher is not None:
            watcher(self.layer.site.layer, query, out, logits, held, sinks)
        return out

    def sdpa(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """For models that call `scaled_dot_product_attention` themselves: [B, Hq, m, D] -> [B, Hq, m, Dv]."""
        self.layer.cache.check_caller()
        return self.attend(query, mask, scale).transpose(1, 2)

    def tensor(self, which: int) -> Tensor:
        """All keys or values as a dense tensor, for models that look inside. Raises ModelError if some are gone."""
        self.layer.cache.check_caller()
        return self.layer.materialize(which, self)


def _count(real: Tensor | None, m: int) -> int:
    return m if real is None else len(real)


def _note(gaps: Gaps, start: int, offset: int, real: Tensor | None) -> None:
    if real is None:
        gaps.add(start, offset)
        return
    breaks = (torch.diff(real, prepend=real[:1] - 2) != 1).nonzero()[:, 0].tolist() if len(real) else []
    for i in breaks:
        gaps.add(start + i, offset + int(real[i]))
