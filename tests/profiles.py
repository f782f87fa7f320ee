"""Profiles of the small random models, made on the spot for recipes that need one."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kvloom import parse
from kvloom.core import profile as profiles
from kvloom.core.sample import managed
from kvloom.core.view import fingerprint, sites_of
from kvloom.policies.token_gates import fresh

NEEDY = (  # recipes that can't do without
    "attention-gate",
    "compresskv",
    "cskv",
    "duoattention",
    "effectively-compress-kv-heads",
    "fireq",
    "kvquant",
    "kvtuner",
    "matryoshkakv",
    "million",
    "rotatekv",
    "uncomp",
)


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """Where they are, until the process ends."""
    return tempfile.TemporaryDirectory()


def profiled(model: PreTrainedModel, recipe: str) -> str:
    """The recipe with a profile of this model where it needs one: "kvquant(bits=2)" -> "kvquant(bits=2, profile='...')"."""
    name, _, options = recipe.partition("(")
    name = name.replace("_", "-")
    if name not in NEEDY or "|" in recipe:
        return recipe
    options = options.rstrip(")")
    path = Path(folder().name) / f"{fingerprint(model)}-{name}-{abs(hash(options))}.safetensors"
    if not path.exists():
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(3, vocabulary, (256,), generator=torch.Generator().manual_seed(1))
        calibrate = parse(recipe).calibrate
        assert calibrate is not None
        if name == "duoattention":  # training takes its time, and any gates will do
            layers, heads = len(sites_of(model)), next(iter(sites_of(model).values())).kv_heads
            gates = torch.rand(layers, heads, generator=torch.Generator().manual_seed(2))
            profiles.save(path, model, name, {"gates": gates})
        elif name == "attention-gate":  # gates that are open
            sites = list(sites_of(model).values())
            gates = fresh(len(managed(model)), sites[0].kv_heads, 2 * sites[0].key_dim)
            profiles.save(path, model, name, gates)
        else:
            calibrate(model, ids, path, lambda text: None)
    return f"{name}({', '.join(x for x in (options, f'profile={str(path)!r}') if x)})"
