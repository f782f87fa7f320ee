"""Small random decoder models, one per way of attending that transformers ships.

Weights are drawn so that attention decides the output: queries and keys are scaled until the softmax is
peaked (see `test_control_the_middle_matters`). A model is a function of family and seed; nothing is loaded.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 300
WINDOW = 16

# Between the shortest and the longest prompt, so that both sides of length-dependent rotations run.
ORIGINAL_LENGTH = 32

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GQA: dict[str, Any] = {**COMMON, "intermediate_size": 96, "num_key_value_heads": 2}


def _rope(rope_type: str, **extra: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 10000.0, **extra}


def _longrope() -> dict[str, Any]:
    pairs = 8
    short = [1.0 + 0.05 * i for i in range(pairs)]
    long = [1.5 + 0.4 * i for i in range(pairs)]
    return _rope(
        "longrope",
        factor=4.0,
        short_factor=short,
        long_factor=long,
        original_max_position_embeddings=ORIGINAL_LENGTH,
    )


_LLAMA = ("LlamaConfig", "LlamaForCausalLM")

# name -> (config class, model class, arguments of the config)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (*_LLAMA, {**GQA, "num_hidden_layers": 3}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**GQA, "hidden_size": 128}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GQA, "head_dim": 32}),
    "mistral-sliding": ("MistralConfig", "MistralForCausalLM", {**GQA, "sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **GQA,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "attn_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **GQA,
            "num_hidden_layers": 3,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**GQA, "hidden_size": 128}),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**COMMON, "intermediate_size": 96, "rope_parameters": _rope("default", partial_rotary_factor=0.25)},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {**GQA}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**GQA, "num_key_value_heads": 1, "logit_scale": 1.0}),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **GQA,
            "head_dim": 64,
            "max_position_embeddings": 4 * ORIGINAL_LENGTH,
            "intermediate_size": 32,
            "sliding_window": WINDOW,
            "num_local_experts": 2,
            "experts_implementation": "eager",  # the fused one knows no fp64
            "num_experts_per_tok": 2,  # all experts: a top-k over near ties would make the comparison chaotic
            "rope_parameters": _rope(
                "yarn", factor=4.0, original_max_position_embeddings=ORIGINAL_LENGTH, truncate=False
            ),
        },
    ),
    "falcon-mqa": (
        "FalconConfig",
        "FalconForCausalLM",
        {**COMMON, "ffn_hidden_size": 96, "multi_query": True},
    ),
    "falcon-gqa": (
        "FalconConfig",
        "FalconForCausalLM",
        {**COMMON, "ffn_hidden_size": 96, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "llama-linear": (*_LLAMA, {**GQA, "rope_parameters": _rope("linear", factor=4.0)}),
    "llama-dynamic": (
        *_LLAMA,
        {**GQA, "rope_parameters": _rope("dynamic", factor=4.0), "max_position_embeddings": ORIGINAL_LENGTH},
    ),
    "llama-yarn": (
        *_LLAMA,
        {
            **GQA,
            "max_position_embeddings": 4 * ORIGINAL_LENGTH,
            "rope_parameters": _rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL_LENGTH),
        },
    ),
    "llama-llama3": (
        *_LLAMA,
        {
            **GQA,
            "rope_parameters": _rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=ORIGINAL_LENGTH,
            ),
        },
    ),
    "llama-longrope": (
        *_LLAMA,
        {**GQA, "rope_parameters": _longrope(), "max_position_embeddings": 4 * ORIGINAL_LENGTH},
    ),
}

SLIDING = ("mistral-sliding", "gemma2", "gemma3", "gpt-oss")
ASSISTANT_LAYERS = 1

# Parameter name -> spread of its outputs for inputs of spread 1. Fused projections hold queries and keys.
_GAINS = (
    (("q_proj.weight", "k_proj.weight", "qkv_proj.weight", "query_key_value.weight"), 1.7),
    (("v_proj.weight", "o_proj.weight", "self_attention.dense.weight", "attention.dense.weight"), 1.4),
    (("embed_tokens.weight", "embed_in.weight", "word_embeddings.weight"), 0.5),
    (("lm_head.weight", "embed_out.weight"), 2.0),
)


def _draw(name: str, value: torch.Tensor, zero_centred: bool, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(value.shape, generator=generator)
    if name.endswith("sinks"):
        return noise
    if value.dim() == 1 and name.endswith("weight"):
        # the norms; those of queries and keys set the temperature of the softmax
        scale = 1.7 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
        return scale - zero_centred + 0.1 * noise
    if value.dim() == 1 or name.endswith("bias"):
        return 0.1 * noise
    gain = next((g for ends, g in _GAINS if name.endswith(ends)), 0.7)
    fan_in = 1 if "embed_tokens" in name or "embed_in" in name or "word_emb" in name else value.shape[-1]
    return noise * gain / fan_in**0.5


def build(family: str, *, assistant: bool = False, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A new model of `family`, fp32, in evaluation mode; `overrides` replace arguments of its config.

    `assistant` gives a one-layer model with the same vocabulary and other weights, for assisted decoding.
    """
    config_class, model_class, options = FAMILIES[family]
    options = {**options, **overrides}
    if assistant:
        options["num_hidden_layers"] = ASSISTANT_LAYERS
        if "layer_types" in options:
            options["layer_types"] = options["layer_types"][:ASSISTANT_LAYERS]
    config = getattr(transformers, config_class)(**options)
    if getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"  # some versions of transformers drop the soft cap elsewhere
    model: PreTrainedModel = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{family}-{assistant}".encode()) + seed)
    zero_centred = family.startswith("gemma")
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(_draw(name, value, zero_centred, generator))
    model.generation_config.eos_token_id = None  # every run has the same length
    model.generation_config.pad_token_id = 0
    return model.eval()


@functools.cache
def pristine(family: str, assistant: bool = False) -> PreTrainedModel:
    """The test run's model that no kvloom cache ever touches: what stock results are computed with."""
    return build(family, assistant=assistant)


@functools.cache
def subject(family: str, **overrides: Any) -> PreTrainedModel:
    """The test run's model with the same weights that kvloom caches are attached to; a recipe measures it once."""
    return build(family, **overrides)


def prompt(length: int, seed: int = 0, distinct: int = VOCAB - 10) -> torch.Tensor:
    """Random token ids `[1, length]`, first a BOS; with few `distinct` tokens the text repeats itself."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(10, 10 + distinct, (1, length), generator=generator)
    ids[:, 0] = 1
    return ids
