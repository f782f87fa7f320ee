"""The largest tensor of a prefill: a few times one layer's keys, never tokens x tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from kvloom import KVCache
from tests.families import build, prompt

RECIPES = [
    "full",
    "streamingllm(sinks=4, window=512)",
    "h2o(budget=0.2)",
    "h2o(budget=0.95)",
    "snapkv(budget=512)",
    "razorattention(echo=0.2, induction=0.2, window=128)",
    "kivi(bits=2, group=16, residual=64)",
    "mikv(budget=0.3)",
    "h2o(budget=0.5) | kivi(bits=4, group=16, residual=64)",
    "snapkv(budget=512) | kivi(bits=4, group=16, residual=64)",
    "streamingllm(window=512) | kivi(bits=4, group=16, residual=64)",
]


class Largest(TorchDispatchMode):
    """Records the largest new storage, and any tensor with two dimensions of `length`, made while `on`."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.most, self.by = length, 0, ""
        self.square: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in self._tensors(out):
            size = x.untyped_storage().nbytes()
            if size > self.most:
                self.most, self.by = size, f"{func} {tuple(x.shape)} {x.dtype}"
            if sum(n >= self.length // 2 for n in x.shape) > 1 and size >= self.length**2 // 4:
                self.square.append(f"{func} {tuple(x.shape)}")
        return out

    def _tensors(self, x: Any) -> Iterator[torch.Tensor]:
        if isinstance(x, torch.Tensor) and type(x) is torch.Tensor:
            yield x
        elif isinstance(x, tuple | list):
            for each in x:
                yield from self._tensors(each)


def check(length: int, recipe: str) -> None:
    """Keys of one layer are as large as the hidden states here, so what the model itself makes is no larger."""
    model: PreTrainedModel = build(
        "llama", num_key_value_heads=4, head_dim=32, num_hidden_layers=2, intermediate_size=96,
        max_position_embeddings=length + 8, vocab_size=64,
    )  # fmt: skip
    one = length * 4 * 32 * 4
    cache = KVCache(model, recipe)
    ids = prompt(length, distinct=50)
    with torch.no_grad(), Largest(length) as largest:
        model.model(ids, past_key_values=cache)
    assert not largest.square
    # a kernel's block of logits has a fixed size, whatever the length
    assert largest.most <= max(4 * one, 4 << 20), f"{largest.most / one:.1f} times a layer's keys: {largest.by}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_prefill_of_2048(recipe: str) -> None:
    check(2048, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_prefill_of_8192(recipe: str) -> None:
    check(8192, recipe)
