"""What the benchmarks share: models, recipes, alternated timing and tables with bars."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median

import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

import kvloom

STOCK = "DynamicCache"
TOKENS = 8192
RECIPES = ["full", "streamingllm", "h2o", "snapkv", "razorattention", "mikv", "kivi(bits=2)", "snapkv | kivi"]


def nano() -> PreTrainedModel:
    """The bundled model in fp32."""
    folder = Path(kvloom.__file__).parent / "models" / "nano"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def random_llama() -> PreTrainedModel:
    """A random Llama of 4 layers in fp32: 8 query and 2 KV heads of size 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2 * TOKENS, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def cache_for(model: PreTrainedModel, name: str) -> Cache:
    """A stock cache or one of kvloom's; the model's attention is registered to match."""
    if name == STOCK:
        kvloom.detach(model)
        return DynamicCache(config=model.config)
    return kvloom.KVCache(model, name)


@torch.inference_mode()
def prefill(model: PreTrainedModel, cache: Cache, ids: Tensor) -> None:
    """One forward of ids [1, n], as `generate` does it."""
    model(ids, past_key_values=cache, logits_to_keep=1)


def prompt(model: PreTrainedModel, tokens: int = TOKENS) -> Tensor:
    """Random token ids [1, tokens]."""
    return torch.randint(3, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))


def alternate(jobs: Mapping[str, Callable[[], object]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of every job in every round; the jobs take turns, so that a busy machine is equally busy for all."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for at in range(-warm, rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if at >= 0:
                taken[name].append(time.perf_counter() - start)
    return taken


def ratio(taken: dict[str, list[float]], name: str) -> float:
    """Median over the rounds of a job's time against the stock cache's in the same round."""
    return median(mine / stock for mine, stock in zip(taken[name], taken[STOCK], strict=True))


def verdict(value: float, bar: float | None) -> tuple[str, str]:
    """The bar and whether it is met, as two cells."""
    return ("", "") if bar is None else (f"<= {bar:.2f}x", "yes" if value <= bar else "NO")


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    out = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        out.add_column(name, justify="right" if i else "left")
    for row in rows:
        out.add_row(*row)
    return out
