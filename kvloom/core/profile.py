"""A profile: what a calibration run learned about one model, in a safetensors file that knows whose it is."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.view import fingerprint
from kvloom.errors import ProfileError

__all__ = ["default_path", "find", "load", "save"]


def default_path(model: PreTrainedModel, recipe: str) -> Path:
    """Where a model's profile for a recipe is looked for: in the model's folder, else under ~/.cache/kvloom/profiles."""
    name, folder = f"{recipe}.profile.safetensors", Path(model.config.get_text_config()._name_or_path or ".missing")
    if (folder / "config.json").is_file():
        return folder / name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "kvloom" / "profiles" / fingerprint(model) / name


def find(
    path: str | Path | None,
    model: PreTrainedModel,
    recipe: str,
    shapes: dict[str, tuple[int, ...]],
    options: str | None = None,
) -> dict[str, Tensor]:
    """`load` of the path given, or of the default one. Raises ProfileError, with the command that makes a profile.

    `options`: the recipe with the options that the profile is to be made for, where it hangs on them.
    """
    made = f"'{options}'" if options else recipe
    held = default_path(model, recipe) if path is None else Path(path)
    if path is None and not held.is_file():
        source = model.config._name_or_path or "MODEL"
        raise ProfileError(
            f"{recipe} needs a profile of this model, and {str(held)!r} does not exist. Make it with: "
            f"kvloom calibrate {source} --cache {made}"
        )
    return load(held, model, recipe, shapes, made)


def save(path: str | Path, model: PreTrainedModel, recipe: str, tensors: dict[str, Tensor], **settings: object) -> None:
    """Writes a profile atomically. `settings` say how it was made and are stored as text."""
    path = Path(path)
    about = {
        "kvloom": "profile 1",
        "recipe": recipe,
        "model": fingerprint(model),
        "settings": json.dumps(settings),
        "digest": _digest(tensors),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        save_file({key: x.contiguous() for key, x in tensors.items()}, name, metadata=about)
        os.chmod(name, 0o644)  # a temporary file is its owner's alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        found.update(x.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def load(
    path: str | Path, model: PreTrainedModel, recipe: str, shapes: dict[str, tuple[int, ...]], made: str | None = None
) -> dict[str, Tensor]:
    """Reads a profile made for this model and recipe, with tensors of these shapes. Raises ProfileError otherwise.

    `made`: what `kvloom calibrate --cache` is to be given to make it.
    """
    remedy = f"kvloom calibrate MODEL --cache {made or recipe} -o FILE"
    if not Path(path).is_file():
        raise ProfileError(f"profile={str(path)!r} is no file. Make one with: {remedy}")
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ProfileError(f"profile={str(path)!r} cannot be read as safetensors ({error}). Make it again.") from error
    if about.get("recipe") != recipe:
        raise ProfileError(f"profile={str(path)!r} is for {about.get('recipe')!r}, not for {recipe!r}.")
    if about.get("digest") != _digest(tensors):
        raise ProfileError(f"profile={str(path)!r} is damaged: its content does not match its digest. Make it again.")
    if about.get("model") != fingerprint(model):
        raise ProfileError(f"profile={str(path)!r} was made on another model. Make one for this model with: {remedy}")
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            held = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ProfileError(
                f"profile={str(path)!r} holds {held} for {name!r} where {shape} is needed. Make one with: {remedy}"
            )
    return tensors
