"""What `tile` says, as numbers and addresses for the compiled kernels: every shape and dtype is checked before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvloom.kernels.tile import NEAR, Stage, Term, Tile

__all__ = ["SUM", "TILE", "Unread", "described"]

Described = tuple[Any, ...]
TABLE, TILE, SUM, TRITS = 5, 6, 7, 11  # these and the following as in native/job.h
MOST, WIDEST = 512, 8192
_KIND = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PLACES = {torch.int16: 8, torch.int32: 9}
_SCALES = {**_KIND, torch.uint8: 10}
_OPS = ("affine", "permute", "places", "slots", "product", "expand", "turn", "unit")


class Unread(Exception):
    """The kernels can't read this."""


def _must(*facts: bool) -> None:
    if not all(facts):
        raise Unread


def _field(x: tuple[Tensor, int] | None, n: int, kinds: dict[torch.dtype, int], *shape: int) -> tuple[int, ...] | None:
    """A tensor [h or 1, rows, ...] whose rows span `per` slots each; `shape` of a row."""
    if x is None:
        return None
    data, per = x
    _must(data.dtype in kinds, data.device.type == "cpu", tuple(data.shape[2:]) == shape, data.shape[0] > 0)
    _must(data.shape[1] * per >= n if per else data.shape[1] == 1, data[0, :1].is_contiguous())
    size, one = data.itemsize, data.shape[0] == 1
    count = data.shape[2:].numel()
    return kinds[data.dtype], data.data_ptr(), 0 if one else data.stride(0) * size, data.stride(1) * size, per, count


def _base(tile: Tile, packed: Callable[..., Described | None]) -> Described:
    if tile.kind == "dense":
        (x,) = tile.base
        kind, at, head, row, *_ = _field((x, 1), tile.n, _KIND, tile.base_width) or ()
        return kind, tile.n, at, head, 0, row
    if tile.kind == "minmax":
        _must(tile.base[0] == "tokens" or tile.base_width % 8 == 0)
        return _groups(tile, packed, None)
    if tile.kind == "trits":
        codes, group, size = tile.base
        _must(size.dtype in _KIND, codes.shape[2] * 5 >= group * tile.base_width, size[0].is_contiguous())
        _, at, head, row, *_ = _field((codes, group), tile.n, {torch.uint8: 0}, codes.shape[2]) or ()
        wide = 0 if len(size) == 1 else size.stride(0) * size.itemsize
        return TRITS, tile.n, at, head, 0, row, group, size.data_ptr(), wide, _KIND[size.dtype]
    codes, bits, table, each = tile.base
    count = tile.base_width // each
    _must(bits in (1, 2, 3, 4, 8), codes.dtype == torch.uint8, codes.shape[2] * 8 == count * bits, count % 8 == 0)
    table = table.reshape(table.shape[0], 1, -1)
    _must(table.shape[2] in (2**bits * each, 2**bits * each * count), table.dtype == torch.float32)
    _, at, head, row, *_ = _field((codes, 1), tile.n, {torch.uint8: 0}, codes.shape[2]) or ()
    return TABLE, tile.n, at, head, 0, row, bits, count, _field((table, 0), tile.n, _KIND, table.shape[2])


def _groups(tile: Tile, packed: Callable[..., Described | None], q: Tensor | None) -> Described:
    """A base in groups; strides of 0 for what heads share."""
    along, _, group, codes, scale, zero = tile.base
    shape = (tile.n // group, tile.base_width) if along == "tokens" else (tile.n, tile.base_width // group)
    _must(tuple(scale.shape[1:]) == tuple(zero.shape[1:]) == shape)
    found = packed(*tile.base, q=q) or ()
    _must(bool(found), codes.device.type == "cpu")
    return found


def _stage(stage: Stage, n: int, width: int) -> tuple[Any, ...]:
    x, y, z = stage.numbers
    a, b, c, d = (*stage.fields, None, None, None, None)[:4]
    none: tuple[int, ...] | None = None
    fields = [none, none, none, none]
    if stage.op == "affine":
        counts = [each[0].shape[2] for each in (a, b) if each is not None]
        _must(len(set(counts)) == 1, width % counts[0] == 0)
        fields[:2] = _field(a, n, _SCALES, counts[0]), _field(b, n, _KIND, counts[0])
    elif stage.op == "permute":
        fields[0] = _field(a, n, {torch.int32: _PLACES[torch.int32]}, width)
    elif stage.op == "places" and a is not None:
        fields[:2] = _field(a, n, _PLACES, a[0].shape[2]), _field(b, n, _KIND, a[0].shape[2])
    elif stage.op == "slots" and a is not None:
        k = a[0].shape[2]
        _must(width <= MOST)
        fields[:2] = _field(a, n, _PLACES, k, width), _field(b, n, _KIND, k, width)
    elif stage.op == "product":
        fields[:2] = _field(a, n, _KIND, x), _field(b, n, _KIND, width, x)
    elif stage.op == "expand":
        _must(x <= MOST)
        fields[0] = _field(a, n, _KIND, width, x)
    elif stage.op == "turn" and a is not None and c is not None:
        _must(x + 2 * y <= width, a[0].dtype == torch.float32)
        last = int(d[0].max()) if d is not None else stage.start + n - 1
        _must(stage.start >= 0, last < a[0].shape[1] * NEAR, d is None or int(d[0].min()) >= 0)
        padded = c[0].shape[2]
        fields[0] = 0, a[0].data_ptr(), 0, 8 * padded, 0, 2 * padded
        fields[1] = 0, b[0].data_ptr() if b is not None else 0, 0, 8 * padded, 0, 2 * padded
        fields[2] = 0, c[0].data_ptr(), 0, 4 * padded, 0, padded
        fields[3] = _field(d, n, _PLACES, 1)
    return _OPS.index(stage.op), *fields, x, y, int(z), stage.start, _KIND[stage.rounded]


def described(term: Term, n: int, packed: Callable[..., Described | None], kept: list[Tensor]) -> Described:
    """One term for the compiled kernels. `packed` describes groups of codes. Raises Unread."""
    tile, right = term.tile, None
    tensors = [x for x in tile.base if isinstance(x, Tensor)]
    tensors += [each[0] for stage in tile.stages if stage.op != "turn" for each in stage.fields if each is not None]
    tensors += [x for x in (term.q, None if term.right is None else term.right[0]) if x is not None]
    heads = {x.shape[0] for x in tensors} - {1}
    reads, whose = tile.heads, 0
    if reads is not None:
        own = (term.q, None if term.right is None else term.right[0])  # of who reads
        held = {x.shape[0] for x in tensors if all(x is not mine for mine in own)} - {1}
        _must(len(held) <= 1, int(reads.min()) >= 0, int(reads.max()) < max(held, default=1))
        _must(all(mine is None or len(mine) in (1, len(reads)) for mine in own))
        kept.append(reads)
        heads, whose = {len(reads)}, reads.data_ptr()
    _must(len(heads) <= 1)
    if (
        tile.kind == "minmax" and not tile.stages and term.right is None and reads is None
    ):  # codes that are multiplied as they are
        found = _groups(tile, packed, term.q)
        _must(tile.width <= MOST)
        kept.extend(x for x in (*tile.base, term.q) if isinstance(x, Tensor))
        return (*found[:12], found[12] and tile.width % 8 == 0, tile.width if term.q is not None else 0)
    _must(tile.n == n, tile.base_width <= WIDEST, tile.width <= MOST)
    base, width, stages = _base(tile, packed), tile.base_width, []
    for stage in tile.stages:
        stages.append(_stage(stage, n, width))
        width = stage.numbers[0] if stage.op == "expand" else width
        kept.extend(each[0] for each in stage.fields if each is not None)
    if term.right is not None:
        right = _field(term.right, n, _KIND, term.right[0].shape[2], width)
        kept.append(term.right[0])
    kept.extend(x for x in tile.base if isinstance(x, Tensor))
    q = 0
    if term.q is not None:
        _must(term.q.dtype == torch.float32, term.q.is_contiguous(), right is not None or term.q.shape[2] == width)
        kept.append(term.q)
        q = term.q.data_ptr()
    return TILE, n, (base,), q, tile.base_width, width, tuple(stages), right, max(heads, default=1), whose
