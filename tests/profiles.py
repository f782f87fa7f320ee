"""Profiles of the small random models, made on the spot for recipes that need one."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kvloom import parse
from kvloom.core.view import fingerprint

# recipes that can't do without
NEEDY = ("kvquant", "kvtuner", "matryoshkakv", "compresskv", "uncomp", "million", "fireq")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # deleted with the process


def profiled(model: PreTrainedModel, recipe: str) -> str:
    """The recipe with a profile of this model where it needs one: "kvquant(bits=2)" -> "kvquant(bits=2, profile='...')"."""
    name, _, options = recipe.partition("(")
    if name not in NEEDY or "|" in recipe:
        return recipe
    options = options.rstrip(")")
    path = Path(_folder().name) / f"{fingerprint(model)}-{name}-{abs(hash(options))}.safetensors"
    if not path.exists():
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(3, vocabulary, (256,), generator=torch.Generator().manual_seed(1))
        calibrate = parse(recipe).calibrate
        assert calibrate is not None
        calibrate(model, ids, path, lambda text: None)
    return f"{name}({', '.join(x for x in (options, f'profile={str(path)!r}') if x)})"
