"""One flat forward over the new tokens of many sequences: `past_key_values` of a step, without padding.

Each layer's rows are taken apart by sequence at attention, the only place where sequences may not see one another; kernels get
the work of all of them in one call.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvloom.core import attach
from kvloom.core.attention import Logits
from kvloom.core.handle import Handle
from kvloom.core.together import together
from kvloom.core.view import text_config
from kvloom.engine.sequence import Sequence
from kvloom.errors import ModelError
from kvloom.kernels import native

__all__ = ["Packed", "Part"]


@dataclass
class Part:
    """New tokens [m] of one sequence; `logits`: whether those behind the last are wanted."""

    sequence: Sequence
    tokens: list[int]
    logits: bool = True


class Packed(Cache):
    """Runs steps of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config = model, text_config(model)
        self.parts: list[Part] = []
        self.borders: list[int] = []  # where each part's rows begin, and the end
        self.heard: dict[int, Tensor] = {}
        attach.attach(model)
        self._picks = "logits_to_keep" in inspect.signature(model.forward).parameters
        super().__init__(layers=[_Layer(self, i) for i in range(self.config.num_hidden_layers)])

    @torch.inference_mode()
    def run(self, parts: List[Part]) -> Tensor:
        """Feeds all parts. Returns logits [parts that want them, vocabulary], fp32."""
        self.parts, self.borders = list(parts), [0]
        ids: list[int] = []
        places: list[Tensor] = []
        for part in parts:
            ids += part.tokens
            start = part.sequence.length
            places.append(torch.arange(start, start + len(part.tokens)))
            self.borders.append(len(ids))
        device = self.model.device
        wanted = torch.tensor([end - 1 for part, end in zip(parts, self.borders[1:], strict=True) if part.logits])
        options: dict[str, Any] = {"logits_to_keep": wanted.to(device).long()} if self._picks else {}
        try:
            found = self.model(
                torch.tensor([ids], device=device), position_ids=torch.cat(places)[None].to(device),
                past_key_values=self, use_cache=True, **options,
            ).logits[0]  # fmt: skip
        finally:
            self.parts, self.heard = [], {}
        return (found if self._picks else found[wanted.long()]).float()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        attach.announce(self, query_length, query_length)
        return query_length, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def hear(self, layer: int, hidden: Tensor) -> None:
        """Takes the input [1, m, hidden] of an attention layer, just before its keys and values come."""
        if any(part.sequence.outline.recipe.hidden for part in self.parts):
            self.heard[layer] = hidden

    def check_caller(self) -> None:
        """Any way into attention that reaches the handles will do."""


class _Layer(CacheLayerMixin):
    is_compileable = False
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, cache: Packed, at: int) -> None:
        super().__init__()
        self.cache, self.at = cache, at
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        update = _Update(self, key_states[0], value_states[0])
        n = key_states.shape[2]
        return Handle.of(update, 0, key_states, n), Handle.of(update, 1, value_states, n)  # type: ignore[arg-type]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class _Update:
    """New rows k [H, n, D], v [H, n, Dv] of all parts, and the queries that come with them."""

    def __init__(self, layer: _Layer, k: Tensor, v: Tensor) -> None:
        self.layer, self.k, self.v = layer, k, v

    def attend(
        self,
        query: Tensor,
        mask: object,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """query [1, Hq, n, D] -> [1, n, Hq, Dv]; each sequence's rows see that sequence alone. Its mask is known: causal."""
        cache, at, q = self.layer.cache, self.layer.at, query[0]
        hidden = cache.heard.pop(at, None)
        standing, rows = [], []
        slow: list[tuple[Sequence, int, int, Logits]] = []
        forwards = []
        for part, a, b in zip(cache.parts, cache.borders, cache.borders[1:], strict=False):
            sequence = part.sequence
            ready = sequence.standing[at]
            if ready is not None and b - a == 1 and ready.room:
                standing.append(ready)
                rows.append(a)
                sequence.ahead[at] += 1
                continue
            outline, layer = sequence.outline, sequence.layer(at)
            x = hidden[:, a:b] if hidden is not None and layer.recipe.hidden else None
            seen = outline.visible(at, layer.length, b - a)
            logits = outline.logits.setdefault(at, Logits(scale, softcap, outline.rope))
            slow.append((sequence, a, b, logits))
            forwards.append(layer.forward(q[:, a:b], self.k[:, a:b], self.v[:, a:b], logits, seen, sinks, x))
        out = torch.empty(
            q.shape[1], q.shape[0], self.v.shape[2], dtype=torch.float32 if standing else q.dtype, device=q.device
        )
        if standing:
            k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (self.k, self.v))
            without = None if sinks is None else sinks.float().contiguous()
            native.decode(standing, rows, q.float().contiguous(), k, v, out, without)
        for (sequence, a, b, logits), x in zip(slow, together(forwards), strict=True):
            out[a:b] = x.transpose(0, 1)
            sequence.settled(at)
            if b - a == 1:
                sequence.stand(at, q, logits)
        return out.to(q.dtype)[None]

    def sdpa(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """For models that call `scaled_dot_product_attention` themselves."""
        return self.attend(query, mask, scale).transpose(1, 2)

    def tensor(self, which: int) -> Tensor:
        """Keys and values are not kept in the form that a model that looks inside wants."""
        raise ModelError(
            f"this model's attention in layer {self.layer.at} reads keys and values directly, which packed steps don't "
            "offer. Load it with attn_implementation='sdpa', or serve another model."
        )
