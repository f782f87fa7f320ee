"""A lean Llama for training on a CPU, and its exchange with Hugging Face weights.

Same function as ``LlamaForCausalLM``, with fused projections and a loss that
runs the output head only where a weight asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Shape:
    """Sizes of the model; head size in channels, theta is the base of the rotary frequencies."""

    vocab: int = 4099
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 640
    theta: float = 1e5
    positions: int = 8192

    def hf_config(self) -> Any:
        """The matching ``LlamaConfig``."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=self.head_dim,
            intermediate_size=self.mlp, max_position_embeddings=self.positions, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": self.theta}, rms_norm_eps=1e-6,
            bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )  # fmt: skip


def rotary(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_dim] in the two-halves layout of Llama."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().float(), angle.sin().float()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm over the last axis."""
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


class Block(nn.Module):
    """One decoder layer on [batch, length, hidden]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        inner = shape.heads * shape.head_dim
        self.norm1 = nn.Parameter(torch.ones(shape.hidden))
        self.qkv = nn.Linear(shape.hidden, inner + 2 * shape.kv_heads * shape.head_dim, bias=False)
        self.out = nn.Linear(inner, shape.hidden, bias=False)
        self.norm2 = nn.Parameter(torch.ones(shape.hidden))
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s = self.shape
        batch, length, _ = x.shape
        qkv = self.qkv(rms(x, self.norm1)).view(batch, length, s.heads + 2 * s.kv_heads, s.head_dim)
        qk, v = qkv.split((s.heads + s.kv_heads, s.kv_heads), dim=2)
        first, second = qk.chunk(2, dim=-1)
        qk = qk * cos + torch.cat((-second, first), dim=-1) * sin
        q, k = qk.split((s.heads, s.kv_heads), dim=2)
        group = s.heads // s.kv_heads
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(rms(x, self.norm2)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class TrainLlama(nn.Module):
    """Tied-embedding Llama; ``forward`` returns one loss per asked position."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.randn(shape.vocab, shape.hidden) * 0.02)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and name != "embed":
                nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)
            if name.endswith(("out.weight", "down.weight")):
                weight.data.mul_(0.02)  # residual branches start quiet
        cos, sin = rotary(shape.positions, shape.head_dim, shape.theta)
        self.register_buffer("cos", cos[:, None], persistent=False)
        self.register_buffer("sin", sin[:, None], persistent=False)

    def hidden(self, ids: Tensor) -> Tensor:
        """Normed hidden states [batch, length, hidden] of ids [batch, length]."""
        x = F.embedding(ids, self.embed)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return rms(x, self.norm)

    def forward(self, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies [n] in nats at flat ``positions`` [n] of ids [batch, length].

        ``targets`` [n, k]: tokens of which any is right; -1 fills up.
        """
        picked = self.hidden(ids).flatten(0, 1)[positions]
        logits = F.linear(picked, self.embed)
        right = logits.gather(1, targets.clamp_min(0)).masked_fill(targets < 0, -torch.inf)
        return logits.logsumexp(1) - right.logsumexp(1)

    def hf_state(self) -> dict[str, Tensor]:
        """Weights under the names of ``LlamaForCausalLM`` (tied head left out), float32."""
        s = self.shape
        state = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        for index, block in enumerate(self.blocks):
            base = f"model.layers.{index}."
            sizes = (s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim)
            for name, part in zip("qkv", block.qkv.weight.split(sizes), strict=True):
                state[f"{base}self_attn.{name}_proj.weight"] = part
            gate, up = block.gate_up.weight.chunk(2)
            state[base + "self_attn.o_proj.weight"] = block.out.weight
            state[base + "mlp.gate_proj.weight"] = gate
            state[base + "mlp.up_proj.weight"] = up
            state[base + "mlp.down_proj.weight"] = block.down.weight
            state[base + "input_layernorm.weight"] = block.norm1
            state[base + "post_attention_layernorm.weight"] = block.norm2
        return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}

    def load_hf_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``hf_state``."""
        own = {"embed": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"]}
        for index in range(self.shape.layers):
            base, to = f"model.layers.{index}.", f"blocks.{index}."
            own[to + "qkv.weight"] = torch.cat([state[f"{base}self_attn.{n}_proj.weight"] for n in "qkv"])
            own[to + "gate_up.weight"] = torch.cat([state[f"{base}mlp.{n}_proj.weight"] for n in ("gate", "up")])
            own[to + "out.weight"] = state[base + "self_attn.o_proj.weight"]
            own[to + "down.weight"] = state[base + "mlp.down_proj.weight"]
            own[to + "norm1"] = state[base + "input_layernorm.weight"]
            own[to + "norm2"] = state[base + "post_attention_layernorm.weight"]
        self.load_state_dict({name: tensor.float() for name, tensor in own.items()})


def grow(state: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Hugging Face weights of a shallower model with fewer tokens, made to fit ``shape``; same function.

    A new layer is a copy of the one before it whose two output projections are zero (block expansion,
    arXiv 2401.02415); new layers stand spread over the depth. Tokens added at the end start as small noise.
    """
    old = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers."))
    source = [round(index * (old - 1) / max(1, shape.layers - 1)) for index in range(shape.layers)]
    table = state["model.embed_tokens.weight"].float()
    extra = torch.randn(shape.vocab - len(table), shape.hidden) * 0.02
    grown = {"model.embed_tokens.weight": torch.cat((table, extra)), "model.norm.weight": state["model.norm.weight"]}
    for layer, origin in enumerate(source):
        again = layer > 0 and source[layer - 1] == origin
        for name, tensor in state.items():
            if name.startswith(f"model.layers.{origin}."):
                silent = again and name.endswith(("o_proj.weight", "down_proj.weight"))
                target = name.replace(f"layers.{origin}.", f"layers.{layer}.", 1)
                grown[target] = torch.zeros_like(tensor) if silent else tensor
    return grown
