"""Partial prefill: one forward over chosen rows of a text whose other rows are in the cache already.

Every layer writes the fed rows' fresh keys and values over the stored ones and attends over the whole text, each row to
the places up to its own. Between layers the set of rows may shrink (`choose`): then the residual stream goes on with
fewer rows, whatever the model's code looks like, by hooks on its decoder layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.cache import KVCache
from kvloom.errors import CacheError, ModelError
from kvloom.programs.chunk import whole_model
from kvloom.programs.feeding import Choose, Feeding, Step
from kvloom.programs.narrow import Narrow, Way
from kvloom.programs.place import main_of

__all__ = ["Choose", "Fed", "Step", "feed"]


@dataclass(frozen=True)
class Fed:
    """What a feed gave. `logits`: [1, V] of the last row, [r, V] of the rows that reached the end, or None.

    `index` [r]: the places of those rows. `rows[layer]`: how many rows that layer took in, and so wrote; `went`: how many
    of them attended and went on. `seconds`: how long it took.
    """

    logits: Tensor | None
    index: Tensor
    rows: tuple[int, ...]
    went: tuple[int, ...]
    seconds: float


def feed(
    model: PreTrainedModel,
    cache: KVCache,
    tokens: Sequence[int] | Tensor,
    index: Sequence[int] | Tensor | range,
    choose: Choose | None = None,
    logits: Literal["last", "all", "none"] = "last",
) -> Fed:
    """One forward over `tokens` (ids [m]) at the places `index` [m] (ascending) of the text that an exact cache holds.

    A fed row whose place is stored replaces the stored row in every layer that it reaches; another is added, in the order
    of the text. Every row attends to the places up to its own, fresh or stored, and to nothing behind. `choose(step)` is
    asked in every layer, once its fresh keys and values are known: rows that it leaves out have theirs stored there, but
    go no further. Rows that the cache had nothing for, and the last row if its logits are asked for, have to stay.

    Afterwards the cache is as any other: `model.generate` goes on with it, at the place behind its last row. Memory is that
    of the rows: nothing is text x text. Slots that a fork shares are copied before they are written to. If it raises from
    within the model, the cache is half written: drop it.

    Raises CacheError for a cache that drops, encodes, pads or holds several sequences, and for rows that do not fit;
    ModelError for a model that rows cannot be narrowed in.
    """
    ids = torch.as_tensor(tokens, dtype=torch.long).cpu()
    where = torch.as_tensor(index if isinstance(index, Tensor) else list(index), dtype=torch.long).cpu()
    if ids.dim() != 1 or ids.shape != where.shape or not len(ids):
        raise CacheError(
            f"tokens {tuple(ids.shape)} and index {tuple(where.shape)}: give one place for each of 1 or more."
        )
    if int(where[0]) < 0 or bool((where.diff() <= 0).any()):
        raise CacheError(f"index={where.tolist()[:8]}...: give places from 0 on, in ascending order, each once.")
    if logits not in ("last", "all", "none"):
        raise CacheError(f"logits={logits!r}: 'last', 'all' or 'none'.")
    whole_model(cache)
    for layer in cache.managed():
        if layer.is_initialized:
            main_of(layer)
        if layer.cache.recipe.policy or layer.recording:
            raise CacheError(
                f"{cache.recipe.name}: partial prefill needs an exact cache without drafts: KVCache(model)."
            )
    return _feed(model, cache, ids, where, choose, logits, way_of(model) if choose else "inside")


@torch.no_grad()
def _feed(
    model: PreTrainedModel, cache: KVCache, ids: Tensor, where: Tensor, choose: Choose | None, logits: str, way: Way
) -> Fed:
    start, device = perf_counter(), model.device
    rows = Narrow(model, where, way)
    feeding = Feeding(cache, rows, choose, keep_last=logits == "last")
    call: Any = model if logits != "none" else model.base_model
    few = (
        {"logits_to_keep": 1}
        if logits == "last" and "logits_to_keep" in inspect.signature(call.forward).parameters
        else {}
    )
    with rows:
        out = call(
            input_ids=ids[None].to(device), position_ids=where[None].to(device), past_key_values=feeding, use_cache=True,
            **few,
        )  # fmt: skip
    found = None if logits == "none" else out.logits[0]
    if logits == "last" and found is not None:
        found = found[-1:]
    return Fed(found, rows.index, tuple(rows.took), tuple(rows.went), perf_counter() - start)


_ways: WeakKeyDictionary[PreTrainedModel, tuple[torch.dtype, Way | str]] = WeakKeyDictionary()


def way_of(model: PreTrainedModel) -> Way:
    """How rows are narrowed in this model, found by trying it on eight tokens. Raises ModelError if no way works."""
    known = _ways.get(model)
    if known is None or known[0] != model.dtype:
        known = _ways[model] = (model.dtype, _probe(model))
    if known[1] not in ("inside", "behind"):
        raise ModelError(
            f"rows cannot be narrowed in {type(model).__name__}: {known[1]}. Feed all rows, without choose."
        )
    return known[1]  # type: ignore[return-value]


def _probe(model: PreTrainedModel) -> str:
    vocab = model.config.get_text_config(decoder=True).vocab_size
    pad = getattr(model.config, "pad_token_id", None)
    ids = torch.tensor([t for t in range(vocab // 2, vocab) if t != pad][:8])
    why = "its vocabulary is too small"
    ways: tuple[Way, ...] = ("inside", "behind")
    for way in ways if len(ids) == 8 else ():
        cache = KVCache(model)
        try:
            whole = _feed(model, cache, ids, torch.arange(8), None, "last", way).logits
            some = torch.tensor([2, 3, 5, 7])
            again = _feed(model, cache, ids[some], some, lambda s: torch.arange(2, 4) if len(s.index) == 4 else None,
                          "last", way).logits  # fmt: skip
        except Exception as error:  # whatever a model's own code raises
            why = repr(error)
            continue
        assert whole is not None and again is not None
        miss = float((whole - again).float().abs().max() / whole.float().abs().max().clamp_min(1e-6))
        if miss <= max(1e-3, 16 * torch.finfo(model.dtype).eps):
            return way
        why = f"logits of the same rows differ by {miss:.1g}"
    return why
