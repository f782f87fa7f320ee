"""Rotary position embedding (RoFormer, arXiv 2104.09864) of one attention layer, as data.

There is no table of model families here. `rope_of` asks the model: it reads a token at several positions, and
what its layers cache is compared with the rotations that its frequency buffers allow (which channels pair up,
which part of a head turns, which way, how the arithmetic rounds): an answer proven on the weights in use.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvloom.errors import ModelError

Layout = Literal["half", "interleaved"]
Rounding = Literal["all", "table", "none"]


@dataclass(frozen=True, eq=False)
class Rope:
    """How one layer rotates keys and queries: channels `offset : offset + rotary_dim` turn, the others pass.

    A pre-RoPE key is what the layer would cache at position 0, but for `scaling`. In nearly all models that
    is the output of `k_proj`, after the key norm if there is one.
    """

    inv_freq: Tensor  # fp32 [R/2], radians per token, as now in use (a copy); negative if it turns backwards
    layout: Layout  # which of the R rotated channels pair up: "half" (i, i + R/2), "interleaved" (2i, 2i + 1)
    rotary_dim: int  # R <= D
    offset: int = 0  # the first rotated channel; not 0 where a family turns the last channels of a head
    scaling: float = 1.0  # factor on cos and sin (YaRN, longrope)
    kind: str = "default"  # as transformers calls it: linear, dynamic, yarn, longrope, llama3, ...
    varies: bool = False  # frequencies follow the text's length: call `rope_of` again after each forward
    rounding: Rounding = "all"  # to the model's dtype: cos, sin and products; cos and sin; or the result only

    def rotate(self, x: Tensor, position: Tensor | int) -> Tensor:
        """Pre-RoPE keys -> keys as the model caches them, with its own fp32 angles, rounding and `scaling`.

        x: [..., n, D] in the model's dtype; position: integers broadcastable to [..., n]. -> like x.
        """
        cos, sin = self._table(x, position)
        return self._turn(x, cos, sin, x.dtype if self.rounding == "all" else torch.float32)

    def unrotate(self, x: Tensor, position: Tensor | int) -> Tensor:
        """Keys cached at `position` -> pre-RoPE keys: the inverse of `rotate`, with the same arguments.

        x has to come in the dtype in which the model computed it, since cos and sin were rounded to that one.
        Computes in fp32; error on fp32 keys, at any position: 3e-7 of the largest entry.
        """
        cos, sin = (t.float() for t in self._table(x, position))
        square = cos * cos + sin * sin  # scaling², or not quite if rounded: inverts the very matrix applied
        return self._turn(x, cos / square, -sin / square)

    def shift(self, x: Tensor, delta: Tensor | int, position: Tensor | int | None = None) -> Tensor:
        """Keys cached at position p -> the same keys at p + delta; or queries turned by delta. Norms stay.

        x: [..., n, D] post-RoPE; delta, position: integers broadcastable to [..., n]. -> like x.
        Angles in float64, the rest in fp32; by 0 gives x. The model's own angles are fp32 products, each off
        by up to 2**-24 of itself. So without `position` the result is within 6e-8 * (p + |p + delta|) of what
        the model would have cached, relative to the norm (measured: 2e-4 below 32k). Given p as `position`,
        those errors are followed, and the two agree within 1e-6 anywhere.
        ModelError: the frequencies vary with the text's length, so no rotation leads from p to p + delta.
        """
        if self.varies:
            raise ModelError(
                f"shift(delta=...): frequencies of {self.kind!r} RoPE change with the length of the text, so "
                "no rotation moves cached keys; recompute them, or give the model a fixed kind such as 'yarn'"
            )
        delta = torch.as_tensor(delta, device=x.device)
        if position is None:
            angle = delta.double()[..., None] * self.inv_freq.to(x.device).double()
        else:
            position = torch.as_tensor(position, device=x.device)
            angle = self._angle(position + delta).double() - self._angle(position).double()
        return self._turn(x, angle.cos().float(), angle.sin().float())

    def average(self, x: Tensor, position: Tensor) -> Tensor:
        """The mean of `rotate(x, p)` over positions p [F]; x [..., D] pre-RoPE -> like x. Linear in x."""
        cos, sin = self._table(x, position)
        return self._turn(x, cos.mean(-2), sin.mean(-2))

    def partners(self, dim: int) -> Tensor:
        """For each of `dim` channels the one that it turns with, itself if it does not turn: [D] int64."""
        found, turn = torch.arange(dim), torch.arange(self.rotary_dim)
        half = self.rotary_dim // 2
        found[self.offset : self.offset + self.rotary_dim] = self.offset + (
            (turn + half) % self.rotary_dim if self.layout == "half" else turn ^ 1
        )
        return found

    def _angle(self, position: Tensor) -> Tensor:
        return position.float()[..., None] * self.inv_freq.to(position.device)  # one fp32 product, as in the models

    def _table(self, x: Tensor, position: Tensor | int) -> tuple[Tensor, Tensor]:
        angle = self._angle(torch.as_tensor(position, device=x.device))
        cos, sin = angle.cos() * self.scaling, angle.sin() * self.scaling
        return (cos, sin) if self.rounding == "none" else (cos.to(x.dtype), sin.to(x.dtype))

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Multiplies each pair (a, b) by [[cos, -sin], [sin, cos]] in `dtype`; cos and sin: [..., n, R/2]."""
        end, half = self.offset + self.rotary_dim, self.layout == "half"
        part = x[..., self.offset : end].to(dtype)
        a, b = part.chunk(2, -1) if half else (part[..., 0::2], part[..., 1::2])
        pair = (a * cos - b * sin, b * cos + a * sin)
        turned = (torch.cat(pair, -1) if half else torch.stack(pair, -1).flatten(-2)).to(x.dtype)
        whole = self.rotary_dim == x.shape[-1]
        return turned if whole else torch.cat((x[..., : self.offset], turned, x[..., end:]), -1)


_Source = tuple[nn.Module, str, int]  # a module, the name of its frequency buffer, 1 or -1: which way it turns
_Fit = tuple[_Source | None, Rope]  # without a source, the frequencies are the textbook's
_Found = _Fit | str | None  # a layer doesn't rotate (None), or why no rotation fits (str)
_found: WeakKeyDictionary[nn.Module, tuple[torch.dtype, dict[int, _Found]]] = WeakKeyDictionary()


def rope_of(model: nn.Module, layer: int) -> Rope | None:
    """How attention layer `layer` (0-based) of a transformers model rotates its keys; None if it doesn't.

    None means NoPE, ALiBi, learned or relative positions, or a layer that caches no keys of its own (linear
    attention, keys shared with another layer). The first call on a model runs its decoder on 6 rows of one
    token (twice if frequencies vary) and leaves no trace; later calls copy the frequencies now in use. Models
    with several position axes (images in Qwen2-VL) are described for text, where the axes agree.

    ModelError: no such layer, weights on the meta device, a decoder that can't be run on token ids alone, or
    keys that depend on the position in another way than a rotation by the model's frequencies.
    """
    dtype = next(model.parameters()).dtype  # decides `rounding`
    if model not in _found or _found[model][0] != dtype:
        _found[model] = (dtype, _probe(model))
    layers = _found[model][1]
    if layer not in layers:
        raise ModelError(f"layer={layer}: {type(model).__name__} has layers 0 to {len(layers) - 1}")
    found = layers[layer]
    if isinstance(found, str):
        raise ModelError(found)
    if found is None or found[0] is None:
        return found and found[1]
    return replace(found[1], inv_freq=_read(found[0]).inv_freq)


def _probe(model: nn.Module) -> dict[int, _Found]:
    decoder: Any = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    decoder = decoder if isinstance(decoder, PreTrainedModel) else model.base_model  # ModernBERT's: its head
    config, name = decoder.config.get_text_config(decoder=True), f"model={type(model).__name__}"
    if next(decoder.parameters()).is_meta:
        raise ModelError(f"{name}: its weights are on the meta device; load them before asking for its RoPE")
    sources = _sources(decoder)
    found: dict[int, _Found] = dict.fromkeys(range(config.num_hidden_layers))
    if "position_ids" not in inspect.signature(decoder.forward).parameters:  # without frequencies, it's ALiBi
        reason = f"{name}: it rotates keys, but takes no position_ids to probe that with"
        return dict.fromkeys(found, reason if sources else None)

    # Frequencies may change at these lengths (of each layer type). Half of one lets slow channels turn, too.
    params = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in (params, *params.values()) if isinstance(p, dict)]
    lengths = [512, *(p.get("original_max_position_embeddings") or 512 for p in nested)]
    lengths.append(getattr(config, "max_position_embeddings", None) or 512)
    near, far = min(lengths) // 2, 2 * max(lengths)
    pad, rotary_dim = getattr(config, "pad_token_id", None), getattr(config, "rotary_dim", None)
    tokens = [t for t in range(config.vocab_size // 2, config.vocab_size) if t != pad][:2]
    ids = torch.tensor(tokens).repeat_interleave(3)
    with _undisturbed(decoder, sources):
        for end in (near, far) if any(_read(s).varies for s in sources) else (near,):
            at = torch.tensor([0, 1, end] * 2)
            try:
                keys = _run(decoder, ids, at, DynamicCache(config=config))
            except Exception as error:  # whatever a model's own code raises
                raise ModelError(f"{name}: can't run it on token ids and positions: {error!r}") from error
            for i, (key, value) in keys.items():
                if not isinstance(found.get(i), str):
                    found[i] = _fit(key, value, at, sources, rotary_dim, f"{name}: layer {i}")
    return found


def _sources(decoder: nn.Module) -> list[_Source]:
    """The different sets of frequencies among the buffers of a model, turning either way."""
    sources: dict[object, _Source] = {}
    for module, sign in product(decoder.modules(), (1, -1)):
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq") and buffer.dim() == 1:
                rope = _read((module, name, sign))
                sources.setdefault((rope.kind, rope.scaling, *rope.inv_freq.tolist()), (module, name, sign))
    return list(sources.values())


def _read(source: _Source) -> Rope:
    module, name, sign = source
    prefix = name.removesuffix("inv_freq")  # "", or one per layer type, such as "full_attention_"
    kind = getattr(module, "rope_type", "default")
    kind = kind.get(prefix[:-1], "default") if isinstance(kind, dict) else kind
    scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
    inv_freq = module.get_buffer(name).detach().float() * sign
    varies = "dynamic" in kind or kind == "longrope"
    return Rope(inv_freq, "half", 2 * len(inv_freq), scaling=scaling, kind=kind, varies=varies)


@contextmanager
def _undisturbed(decoder: nn.Module, sources: list[_Source]) -> Iterator[None]:
    """Runs a probe in eval mode; leaves training flags and frequencies as they were."""
    training = [m for m in decoder.modules() if m.training]
    state = {m: {**vars(m), "_buffers": dict(m._buffers)} for m, _, _ in sources}
    buffers = [(b, b.clone()) for m in state for b in m.buffers(recurse=False)]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
        for module, attributes in state.items():
            vars(module).update(attributes)
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@torch.no_grad()
def _run(decoder: Any, ids: Tensor, position: Tensor, cache: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """Runs rows of one token each; -> keys and values that each layer caches, [rows, H, 1, D]."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    stock = cache.update

    def update(key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        seen.setdefault(layer_idx, (key.clone(), value.clone()))
        key, value = stock(key, value, layer_idx, *args, **kwargs)
        # A row attends to itself only, with weight 1, or less beside a learned sink. Zero values keep the
        # rounding of its rotated scores out of the next layer: hidden states are the same at every position.
        return key, torch.zeros_like(value)

    cache.update = update
    device = decoder.get_input_embeddings().weight.device
    ids, position = ids[:, None].to(device), position[:, None].to(device)
    decoder(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
    return seen


def _fit(k: Tensor, v: Tensor, at: Tensor, sources: list[_Source], rotary_dim: int | None, where: str) -> _Found:
    """The rotation that leads from keys at position 0 to those of other rows. k, v: [6, H, 1, D]; at: [6]."""
    first, at, dim = [0, 0, 0, 3, 3, 3], at[:, None, None].to(k.device), k.shape[-1]
    tolerance = max(1e-4, 4 * torch.finfo(k.dtype).eps)

    def miss(found: Tensor, true: Tensor) -> float:
        return float((found - true).abs().amax() / true.abs().amax())

    moved = miss(v[first], v) > tolerance  # positions enter with the embeddings, or v is no value
    if miss(k[first], k) <= tolerance / 4:
        return f"{where} caches rotated channels apart from its keys (latent)" if moved and sources else None
    bases: list[_Fit] = [(source, _read(source)) for source in sources]
    if not sources:  # models that keep a table of cos and sin (GPT-J)
        sizes = sorted({rotary_dim or dim, dim})
        tables = [1 / 10000 ** (torch.arange(0, n, 2, dtype=torch.int64) / n) for n in sizes]
        bases = [(None, Rope(table, "half", n)) for table, n in zip(tables, sizes)]
    roundings: list[Rounding] = ["all"] if k.dtype == torch.float32 else ["all", "table", "none"]
    layouts: list[Layout] = ["half", "interleaved"]
    best, least, wrong = None, float("inf"), float("inf")
    for (source, rope), layout, rounding, last in product(bases, layouts, roundings, (False, True)):
        rope = replace(rope, layout=layout, rounding=rounding, offset=(dim - rope.rotary_dim) * last)
        if rope.rotary_dim <= dim:
            found = rope.rotate(rope.unrotate(k[first], 0), at)
            # By the mean: where scaling is not 1, keys at position 0 have been rounded once more already.
            if (mean := float((found - k).abs().float().mean())) < least:
                best, least, wrong = (source, rope), mean, miss(found, k)
    if wrong <= tolerance:
        return best
    no = f"{where} moves its keys, but by no rotation known here ({wrong:.1g} off at best)"
    return None if moved and not sources else no
