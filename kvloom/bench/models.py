"""The models that the benchmarks run, their prompts, and a prefill as `generate` does it."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from kvloom.lab.measure import NANO, load_model

__all__ = ["TOKENS", "load", "prefill", "prompt"]

TOKENS = 8192  # of the prompt that the bars are about


def load(name: str) -> PreTrainedModel:
    """Loads "nano", "random", or a folder or hub id, which raises ModelError if it cannot be loaded."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if name == "nano":
        return AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32, attn_implementation="sdpa").eval()
    if name == "random":
        return _random_llama()
    return load_model(name)[0]


def _random_llama() -> PreTrainedModel:
    """A random Llama of 4 layers in fp32: 8 query and 2 KV heads of size 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1 << 17, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompt(model: PreTrainedModel, tokens: int, seed: int = 1) -> Tensor:
    """Random token ids [1, tokens]."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(3, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))
    return ids.to(model.device)


@torch.inference_mode()
def prefill(model: PreTrainedModel, cache: Cache, ids: Tensor) -> None:
    """One forward of ids [1, n], as `generate` does it."""
    model(ids, past_key_values=cache, logits_to_keep=1)
