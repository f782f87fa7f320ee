"""Directions of keys and values from the projections' weights, with inputs of every size alike or as they come (ASVD)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvloom.core.codec import Plane
from kvloom.core.sample import managed
from kvloom.errors import ModelError

__all__ = ["projections", "weight_directions"]


def projections(model: PreTrainedModel) -> dict[tuple[int, Plane], nn.Linear]:
    """The layers k_proj and v_proj of every managed layer. Raises ModelError where there are none of that name."""
    names = {"k_proj": "key", "v_proj": "value"}
    found: dict[tuple[int, Plane], nn.Linear] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-1] in names and isinstance(module, nn.Linear) and (layer := _number(parts)) is not None:
            found[layer, "key" if names[parts[-1]] == "key" else "value"] = module
    wanted = managed(model)
    planes: tuple[Plane, Plane] = ("key", "value")
    missing = [layer for layer in wanted if any((layer, plane) not in found for plane in planes)]
    if missing:
        raise ModelError(
            f"{type(model).__name__} has no k_proj and v_proj of its own in layer {missing[0]}. Directions from what is "
            "cached need none: use start='data'."
        )
    return {(layer, plane): found[layer, plane] for layer in wanted for plane in planes}


def _number(parts: list[str]) -> int | None:
    return next((int(part) for part in reversed(parts) if part.isdigit()), None)


@torch.no_grad()
def weight_directions(
    model: PreTrainedModel, texts: list[Tensor], scaled: bool, tell: Callable[[str], None]
) -> dict[Plane, Tensor]:
    """[layers, H * D, H * D] fp32: right singular vectors of diag(s) W^T, columns by falling weight.

    s of an input channel: the root of the sum over texts of its mean size, if `scaled`, else 1.
    """
    linear = projections(model)
    sizes = {key: torch.zeros(module.in_features) for key, module in linear.items()}
    hooks = []
    for key, module in linear.items():

        def note(_: nn.Module, inputs: tuple[Tensor, ...], key: tuple[int, Plane] = key) -> None:
            sizes[key] += inputs[0].detach().float().abs().flatten(0, -2).mean(0).cpu()

        hooks.append(module.register_forward_pre_hook(note))
    try:
        for at, ids in enumerate(texts if scaled else []):
            tell(f"inputs of text {at + 1} of {len(texts)}")
            model(ids.to(model.device), logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[Plane, list[Tensor]] = {"key": [], "value": []}
    for (layer, plane), module in linear.items():
        wide = module.weight.detach().double().cpu().T
        if scaled:
            wide = wide * sizes[layer, plane].double().sqrt().clamp_min(1e-6)[:, None]
        found[plane].append(torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(-1).float())
    return {plane: torch.stack(x) for plane, x in found.items()}
