"""A lean Llama for training on a CPU, and its exchange with Hugging Face weights.

Same function as ``LlamaForCausalLM`` (checked by ``check_export``), with fused projections and a loss that
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

    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 384
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


# (layer, query head, offset, strength): heads that start out looking that many tokens back. Recall is built
# on such # heads (match what stood before, copy what follows); finding them from noise takes millions of
# tokens.
OFFSET_HEADS = ((0, 0, 1, 1.3), (0, 1, 2, 1.3), (1, 0, 1, 1.3), (1, 1, 3, 1.3))
COPY_HEADS = ((2, 0), (3, 2))  # (layer, query head), see plant_copy_heads


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
        for layer, head, offset, strength in OFFSET_HEADS:
            self.plant_offset_head(layer, head, offset, strength)
        self.plant_copy_heads()
        cos, sin = rotary(shape.positions, shape.head_dim, shape.theta)
        self.register_buffer("cos", cos[:, None], persistent=False)
        self.register_buffer("sin", sin[:, None], persistent=False)

    @torch.no_grad()
    def plant_offset_head(self, layer: int, head: int, offset: int, strength: float, bands: int = 8) -> None:
        """Start a head with its attention peak ``offset`` tokens back.

        Channel 0 of the embedding is about constant, so a query and a key that read only that channel
        depend on the distance alone: with phases turned by ``offset`` in the ``bands`` fastest rotary
        bands, the score sum(cos(frequency x (distance - offset))) is largest at that distance.
        """
        s = self.shape
        self.embed[:, 0] = 0.1  # about five times the other channels
        half = s.head_dim // 2
        frequency = s.theta ** (-torch.arange(bands) / half)
        weight = self.blocks[layer].qkv.weight
        key = (s.heads + head // (s.heads // s.kv_heads)) * s.head_dim
        query = head * s.head_dim
        for row in (key, query):
            for first in (row, row + half):
                weight[first : first + bands] *= 0.1
        weight[key : key + bands, 0] = strength
        weight[key + half : key + half + bands, 0] = 0.0
        weight[query : query + bands, 0] = strength * torch.cos(frequency * offset)
        weight[query + half : query + half + bands, 0] = -strength * torch.sin(frequency * offset)

    @torch.no_grad()
    def plant_copy_heads(self, pass_on: float = 0.03, match: float = 2.5, copy: float = 0.3) -> None:
        """Start an induction circuit: "A B ... A" suggests B.

        Head 0 of layer 0, which looks one token back, writes a random 64-channel view of that token into the
        residual stream. The heads of ``COPY_HEADS`` compare half of that view with the same view of the
        present token, in the slow rotary bands where distance hardly counts, and write a view of the token
        they find.
        """
        s, d = self.shape, self.shape.head_dim

        def view() -> Tensor:  # d orthonormal rows [d, hidden] without the constant channel
            rows = torch.linalg.qr(torch.randn(s.hidden - 1, d))[0].T
            return torch.cat((torch.zeros(d, 1), rows), dim=1)

        source, target = view(), view()
        first = self.blocks[0]
        first.qkv.weight[(s.heads + s.kv_heads) * d :][:d] = source
        first.out.weight[:, :d] = pass_on * target.T
        half = d // 2
        slow = torch.cat((torch.arange(half // 2, half), torch.arange(half + half // 2, d)))
        for layer, head in COPY_HEADS:
            block, group = self.blocks[layer], head // (s.heads // s.kv_heads)
            query, key = head * d, (s.heads + group) * d
            block.qkv.weight[query : query + d] *= 0.1
            block.qkv.weight[key : key + d] *= 0.1
            block.qkv.weight[query + slow] = match * source[slow]
            block.qkv.weight[key + slow] = match * target[slow]
            output = view()
            value = (s.heads + s.kv_heads + group) * d
            block.qkv.weight[value : value + d] = output
            block.out.weight[:, head * d : (head + 1) * d] = copy * output.T

    def hidden(self, ids: Tensor) -> Tensor:
        """Normed hidden states [batch, length, hidden] of ids [batch, length]."""
        x = F.embedding(ids, self.embed)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return rms(x, self.norm)

    def forward(self, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies [n] in nats of ``targets`` [n] at flat ``positions`` [n] of ids [batch, length]."""
        picked = self.hidden(ids).flatten(0, 1)[positions]
        logits = F.linear(picked, self.embed)
        return F.cross_entropy(logits, targets, reduction="none")

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
