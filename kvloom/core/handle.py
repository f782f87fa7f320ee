"""What `cache.update` returns: a tensor without storage that knows where its numbers are.

The registered attention function recognizes it. A model that calls `scaled_dot_product_attention` itself gets the same
attention through `__torch_function__`; one that asks for anything else gets the numbers, if the recipe still has them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from kvloom.core.update import Update

__all__ = ["Handle"]

_SHAPE = {Tensor.size, Tensor.dim} | {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device")}


class Handle(Tensor):
    """Keys (`which` 0) or values (1) of one layer after an update: [B, H, positions, D] in shape only."""

    update: Update
    which: int

    @staticmethod
    def of(update: Update, which: int, new: Tensor, positions: int) -> Handle:
        shape = (new.shape[0], new.shape[1], positions, new.shape[3])
        handle: Handle = Tensor._make_wrapper_subclass(Handle, shape, dtype=new.dtype, device=new.device)
        handle.update, handle.which = update, which
        return handle

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Handle({'value' if self.which else 'key'}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            found = _sdpa(*args, **kwargs)
            if found is not None:
                return found
        elif func in _SHAPE:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        real = torch.utils._pytree.tree_map(
            lambda x: x.update.tensor(x.which) if isinstance(x, Handle) else x, (args, kwargs)
        )
        return func(*real[0], **real[1])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        real = torch.utils._pytree.tree_map(
            lambda x: x.update.tensor(x.which) if isinstance(x, Handle) else x, (args, kwargs or {})
        )
        return func(*real[0], **real[1])


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if not (isinstance(key, Handle) and isinstance(value, Handle) and key.update is value.update):
        return None
    return key.update.sdpa(query, attn_mask, scale if scale is not None else query.shape[-1] ** -0.5)
