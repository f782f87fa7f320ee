"""Attention over one dense run, and the merge of partial results, in plain torch.

Shapes: h KV heads, R query rows per KV head (the queries of its group times the new tokens), n slots, D channels.
"""

import math

import torch
from torch import Tensor

__all__ = ["blocked", "dense", "exp_", "finish", "flash_serves", "logits", "merge", "mix", "observe"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_cuda = torch.ops.aten._scaled_dot_product_flash_attention.default
# A block of fp32 logits stays within this many numbers, so that it is still in cache when it is read back.
BLOCK = 1 << 20
TILE = 1 << 18  # and of those that are summed over rows


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp. q [Hq, m, D], k [h, n, D], v [h, n, Dv], with Hq a multiple of h.

    `causal` aligns the first query with the first key. `bias` is added to the logits, broadcastable to [Hq, m, n].
    Returns out [Hq, m, Dv] in q's dtype and lse [Hq, m] in fp32.
    """
    if k.shape[1] == 0:
        return q.new_zeros((*q.shape[:2], v.shape[-1])), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))  # flash attention reads rows as contiguous
    if q.device.type == "cpu" and k.shape[-1] == v.shape[-1] and q.dtype == k.dtype:
        if bias is not None:
            bias = bias.to(q.dtype).expand(q.shape[0], -1, -1)[None]
        out, lse = _flash(q[None], k[None], v[None], 0.0, causal, attn_mask=bias, scale=scale)
        return out[0], lse[0].float()
    if bias is None and flash_serves(q, k, v, causal):
        out, lse = _flash_cuda(q[None], k[None], v[None], 0.0, causal, scale=scale)[:2]
        return out[0], lse[0]
    return _blocked(q, k, v, scale, causal, bias, None)


def flash_serves(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether torch's flash attention on a GPU takes these: 16-bit numbers, one head size that 8 divides."""
    if not q.is_cuda or q.dtype != k.dtype or k.shape[-1] != v.shape[-1] or k.shape[-1] % 8 or not q.shape[1]:
        return False
    if causal and q.shape[1] != k.shape[1]:  # it would align the last query with the last key
        return False
    grouped = q.shape[0] != k.shape[0]
    asked = torch.backends.cuda.SDPAParams(q[None], k[None], v[None], None, 0.0, causal, grouped)
    return bool(torch.backends.cuda.can_use_flash_attention(asked))


def logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q [h, R, D], k [h, n, D] -> scaled dot products [h, R, n] in fp32."""
    return torch.matmul(q.float() * scale, k.float().transpose(-1, -2))


def mix(p: Tensor, v: Tensor) -> Tensor:
    """Probabilities p [h, R, n] fp32, v [h, n, Dv] -> [h, R, Dv] in fp32."""
    return torch.matmul(p, v.float())


def exp_(x: Tensor) -> Tensor:
    """e ** x, in place. On CPU torch's own takes ten times as long where results are denormal, as faint weights are."""
    return x.mul_(math.log2(math.e)).exp2_()


def finish(s: Tensor) -> tuple[Tensor, Tensor]:
    """Logits s [..., n] -> unnormalized weights exp(s - max) (in place) and lse [...]. A row of -inf gives zeros."""
    top = s.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    p = exp_(s.sub_(top))
    return p, p.sum(-1).log_() + top[..., 0]


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Partial results (out [..., D], lse [...]) over disjoint sets of slots -> the result over their union, fp32."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    total = torch.logsumexp(lses, 0)
    weights = (lses - total.clamp_min(torch.finfo(torch.float32).min)).exp_()
    out = parts[0][0].float() * weights[0][..., None]
    for (part, _), w in zip(parts[1:], weights[1:], strict=True):
        out += part.float() * w[..., None]
    return out, total


def blocked(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`dense` for what the fused kernels lack (soft-capping, unequal head sizes): blocks of queries, never T x T."""
    return _blocked(q, k, v, scale, causal, bias, softcap)


def _blocked(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    heads, m, _ = q.shape
    group = heads // k.shape[0]
    out = q.new_empty((heads, m, v.shape[-1]))
    lse = q.new_empty((heads, m), dtype=torch.float32)
    step = max(1, BLOCK // (heads * k.shape[1]))
    for at in range(0, m, step):
        rows = slice(at, min(at + step, m))
        width = rows.stop if causal else k.shape[1]
        s = logits(q[:, rows].unflatten(0, (-1, group)).flatten(1, 2), k[:, :width], scale)
        s = s.unflatten(1, (group, -1)).flatten(0, 1)
        if softcap is not None:
            s = s.div_(softcap).tanh_().mul_(softcap)
        if causal:
            ahead = torch.arange(width, device=q.device) > torch.arange(at, rows.stop, device=q.device)[:, None]
            s.masked_fill_(ahead, -torch.inf)
        if bias is not None:
            s += bias[:, rows if bias.shape[1] > 1 else slice(None), :width]
        p, lse[:, rows] = finish(s)
        p /= p.sum(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        folded = p.unflatten(0, (-1, group)).flatten(1, 2)
        out[:, rows] = mix(folded, v[:, :width]).unflatten(1, (group, -1)).flatten(0, 1).to(out.dtype)
    return out, lse


def observe(q: Tensor, k: Tensor, lse: Tensor, scale: float, past: int, softcap: float | None = None) -> Tensor:
    """Attention that every slot receives from all rows, summed: [Hq, n] fp32. In tiles, so nothing is T x T.

    q [Hq, m, D], k [h, n, D], lse [Hq, m] fp32. Row i sees the slots up to `past` + i, which may be negative.
    """
    (heads, m, _), (h, n, _) = q.shape, k.shape
    group = heads // h
    out = q.new_zeros((heads, n), dtype=torch.float32)
    rows = min(m, max(64, math.isqrt(TILE // heads)))
    cols = max(64, TILE // (heads * max(1, rows)))
    for c in range(0, n if m else 0, cols):
        d = min(c + cols, n)
        for at in range(max(0, c - past), m, rows):
            stop = min(at + rows, m)
            s = logits(q[:, at:stop].unflatten(0, (h, group)).flatten(1, 2), k[:, c:d], scale)
            s = s.unflatten(1, (group, -1)).flatten(0, 1)
            if softcap is not None:
                s = s.div_(softcap).tanh_().mul_(softcap)
            s = exp_(s.sub_(lse[:, at:stop, None]))
            if d - past > at + 1:
                place = torch.arange(c - past, d - past, device=s.device)
                s.masked_fill_(place > torch.arange(at, stop, device=s.device)[:, None], 0.0)
            out[:, c:d] += s.sum(1)
    return out
