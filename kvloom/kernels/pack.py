"""n-bit codes in bytes. Low bits first: code j of a byte holding 8/b codes sits at bit b*j.

3 bits do not divide a byte, so they are stored as a 2-bit plane followed by a 1-bit plane along the last dimension.
"""

import torch
from torch import Tensor

__all__ = ["BITS", "pack", "unpack"]

BITS = (1, 2, 3, 4, 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] below 2**bits -> uint8 bytes [..., n * bits / 8]; n must be a multiple of 8."""
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=-1)
    per = 8 // bits
    lanes = codes.unflatten(-1, (-1, per))
    out = lanes[..., 0].clone()
    for j in range(1, per):
        out |= lanes[..., j] << (bits * j)
    return out


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: uint8 bytes [..., m] -> uint8 codes [..., m * 8 / bits]."""
    if bits == 8:
        return packed
    if bits == 3:
        low = packed.shape[-1] * 2 // 3
        return unpack(packed[..., :low], 2) | (unpack(packed[..., low:], 1) << 2)
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shift) & (2**bits - 1)).flatten(-2)
