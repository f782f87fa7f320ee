"""n-bit codes in bytes, in planes, so that a vector of bytes unpacks into vectors of neighbouring codes.

A row of n codes of b bits takes m = n * b / 8 bytes; byte i holds codes i, m + i, 2 m + i, ... from its lowest bits up.
3 bits do not divide a byte: a row of 2 bits is followed by a row of 1 bit.
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
    planes = codes.unflatten(-1, (per, -1))
    out = planes[..., 0, :].clone()
    for j in range(1, per):
        out |= planes[..., j, :] << (bits * j)
    return out


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: uint8 bytes [..., m] -> uint8 codes [..., m * 8 / bits]."""
    if bits == 8:
        return packed
    if bits == 3:
        low = packed.shape[-1] * 2 // 3
        return unpack(packed[..., :low], 2) | (unpack(packed[..., low:], 1) << 2)
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None, :] >> shift[:, None]) & (2**bits - 1)).flatten(-2)
