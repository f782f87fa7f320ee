"""What a model's layers see as their cache during a feed: fresh rows replace stored ones, then the chosen rows attend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import causal_mask_function

from kvloom.core import attach
from kvloom.core.attention import Logits
from kvloom.core.cache import KVCache, KVLayer
from kvloom.core.handle import Handle
from kvloom.core.mask import LazyMask
from kvloom.core.rows import Rows
from kvloom.core.update import Update
from kvloom.errors import CacheError, ModelError
from kvloom.programs.narrow import Narrow
from kvloom.programs.place import insert, main_of, own, where_of
from kvloom.programs.rows import attend

__all__ = ["Choose", "Feeding", "Step"]


@dataclass(frozen=True)
class Step:
    """What `choose` sees of one layer, before attention: m rows at hand, n slots of the text.

    `index` [m] long, ascending: their places in the text. `stored` [m] bool: whether the cache had keys and values for that
    place before this feed. `new`: their fresh keys [H, m, D] (post-RoPE) and values. `q` [Hq, m, D]: their queries.
    `slots`: all keys and values [H, n, D], at the places `where` [n], as they are before the fresh ones are written; views,
    not to be written to. All are on the model's device, but `index`, `stored` and `where`, which are on the host.
    """

    layer: int
    layers: int
    index: Tensor
    stored: Tensor
    new: Rows
    q: Tensor
    slots: Rows
    where: Tensor
    logits: Logits

    @cached_property
    def at(self) -> Tensor:
        """The slot of each row at hand, [m] long."""
        return torch.searchsorted(self.where, self.index)

    @cached_property
    def old(self) -> Rows:
        """Keys and values that the cache had for the rows at hand, [H, m, D]; without meaning where not `stored`."""
        at = self.at.to(self.slots.k.device)
        return Rows(self.slots.k[:, at], self.slots.v[:, at], self.index.int()[None])


# -> positions among the rows at hand [r] (ascending), or a mask [m] of them; None: all go on
Choose = Callable[[Step], Tensor | None]


class Feeding(Cache):
    """The cache that the model sees during a feed: one view of each layer of the real one."""

    def __init__(self, cache: KVCache, rows: Narrow, choose: Choose | None, keep_last: bool) -> None:
        self.cache, self.config, self.rows, self.choose, self.keep_last = cache, cache.config, rows, choose, keep_last
        super().__init__(layers=[_FeedLayer(self, layer) for layer in cache.managed()])

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        sizes = self.layers[layer_idx].get_mask_sizes(query_length)
        attach.announce(self, query_length, sizes[0])
        return sizes


class _FeedLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, feeding: Feeding, layer: KVLayer) -> None:
        super().__init__()
        self.feeding, self.layer, self.is_initialized = feeding, layer, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Takes the fed rows' keys and values [1, H, m, D]; returns handles for the attention function."""
        if not self.layer.is_initialized:
            self.layer.lazy_initialization(key_states, value_states)
        update = _FeedUpdate(self, key_states, value_states)
        return Handle.of(update, 0, key_states, key_states.shape[2]), Handle.of(
            update, 1, value_states, key_states.shape[2]
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class _FeedUpdate(Update):
    """One update of a feed: fresh rows replace the stored ones, then the chosen ones attend."""

    def __init__(self, view: _FeedLayer, k: Tensor, v: Tensor) -> None:
        super().__init__(view.layer, k, v)
        self.feeding = view.feeding

    def attend(
        self,
        query: Tensor,
        mask: LazyMask | Tensor | None,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """query [1, Hq, m, D] -> [1, m, Hq, Dv]; rows that were not chosen are zero there."""
        if self.k is None or self.v is None:
            raise ModelError(
                f"layer {self.layer.site.layer}: its keys are attended to twice (shared KV), which no feed serves."
            )
        if isinstance(mask, Tensor) or (isinstance(mask, LazyMask) and mask.function is not causal_mask_function):
            raise ModelError(
                f"layer {self.layer.site.layer} masks more than what is to come, which partial prefill cannot."
            )
        new, self.k, self.v = Rows(self.k[0], self.v[0], 0), None, None
        rows, layer, i = self.feeding.rows, self.layer, self.layer.site.layer
        index = rows.index
        new.index = index.int()[None]
        segment = main_of(layer)
        held = where_of(segment)
        stored = torch.isin(index, held)
        if not bool(stored.all()):
            fresh = ~stored
            here = fresh.to(new.k.device)
            segment = insert(layer, Rows(new.k[:, here], new.v[:, here], index[fresh].int()[None]))
            held = where_of(segment)
        logits = Logits(scale, softcap)
        k, v = segment.key.dense(0, segment.n), segment.value.dense(0, segment.n)
        chosen = self._chosen(
            Step(i, len(self.feeding.layers), index, stored, new, query[0], Rows(k, v, 0), held, logits)
        )
        if bool(stored.any()):
            k, v = own(segment)
            _write(k, v, new, torch.searchsorted(held, index))
        else:
            k, v = segment.key.dense(0, segment.n), segment.value.dense(0, segment.n)
        q, at = query[0], index
        if chosen is not None:
            q, at = q[:, chosen.to(q.device)], index[chosen]
        out, lse = attend(q, k, v, torch.searchsorted(held, at, right=True), logits)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks.float()[:, None])
            out = out.float() * (lse - total).exp_()[..., None]
        found = out.to(query.dtype).transpose(0, 1)[None]
        rows.chose(i, chosen)
        if chosen is None:
            return found
        whole = query.new_zeros((1, query.shape[2], *found.shape[2:]))
        whole[:, chosen.to(query.device)] = found
        return whole

    def _chosen(self, step: Step) -> Tensor | None:
        choose = self.feeding.choose
        chosen = choose(step) if choose is not None else None
        if chosen is None:
            return None
        m = len(step.index)
        if chosen.dtype == torch.bool and chosen.shape == (m,):
            chosen = chosen.nonzero()[:, 0]
        chosen = chosen.long().cpu()
        if (
            chosen.dim() != 1
            or not len(chosen)
            or int(chosen.min()) < 0
            or int(chosen.max()) >= m
            or bool((chosen.diff() <= 0).any())
        ):
            raise CacheError(
                f"choose() in layer {step.layer} gave {chosen.tolist()[:8]}...: give rows 0 to {m - 1}, ascending."
            )
        stays = torch.zeros(m, dtype=torch.bool).index_fill_(0, chosen, True)
        if self.feeding.keep_last and not bool(stays[-1]):
            raise CacheError(
                f"choose() in layer {step.layer} left the last row out, whose logits are asked for; keep it."
            )
        lost = ~stays & ~step.stored
        if bool(lost.any()) and step.layer < step.layers - 1:
            raise CacheError(
                f"choose() in layer {step.layer} left out the row at {int(step.index[lost][0])}, for which the cache has "
                "nothing in later layers; keep all rows where step.stored is False."
            )
        return None if len(chosen) == m else chosen


def _write(k: Tensor, v: Tensor, new: Rows, at: Tensor) -> None:
    """Writes rows to slots; consecutive ones by one plain copy."""
    first, m = int(at[0]), len(at)
    if int(at[-1]) - first == m - 1:
        k.narrow(1, first, m).copy_(new.k)
        v.narrow(1, first, m).copy_(new.v)
    else:
        k.index_copy_(1, at.to(k.device), new.k)
        v.index_copy_(1, at.to(v.device), new.v)
