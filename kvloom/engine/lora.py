"""Folders of LoRA adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kvloom.errors import ModelError

__all__ = ["Outline", "Pair", "read_outline", "read_tensors"]

Refuse = Callable[[str], NoReturn]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_LIMIT, HEADER_LIMIT = 1 << 20, 4 << 20  # bytes; real ones have some 2 KB and some 200 KB
RANK_LIMIT = 4096
NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
# what an adapter may say and only plain LoRA layers can't do
UNSERVED = {
    "use_dora": "DoRA's norms depend on the merged weights",
    "modules_to_save": "it replaces whole modules of the model",
    "lora_bias": "it adds biases",
    "target_parameters": "it changes parameters that are no linear module's",
    "trainable_token_indices": "it changes the embedding",
    "layer_replication": "it changes how many layers there are",
    "use_qalora": "its layers pool their inputs",
    "alora_invocation_tokens": "it is switched on in the middle of a text",
}  # fmt: skip
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # these begin by changing the weights below them


@dataclass(frozen=True)
class Pair:
    """A [r, in], B [out, r]: a module's output gets scale * x A^T B^T."""

    rank: int
    ins: int
    outs: int
    scale: float


@dataclass(frozen=True)
class Outline:
    """An adapter without its numbers. `dtype`: that of the model, in which they are kept."""

    path: Path
    modules: Mapping[str, Pair]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return sum(x.rank * (x.ins + x.outs) for x in self.modules.values())

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


def read_outline(name: str, path: Path, linear: Mapping[str, nn.Linear]) -> Outline:
    """What a folder holds, checked against the linear modules of a model. Raises ModelError, with the reason."""

    def refuse(why: str) -> NoReturn:
        raise ModelError(f"adapter {name!r} ({path}): {why}")

    config = _config(path, refuse)
    shapes = _shapes(path, refuse)
    halves: dict[str, dict[str, list[int]]] = {}
    for key, shape in shapes.items():
        found = NAME.fullmatch(key)
        if found is None:
            refuse(f"tensor {key!r} is none of a LoRA layer for a linear module. Only plain LoRA can be served.")
        halves.setdefault(found["module"], {})[found["half"]] = shape
    modules = {}
    for module, half in sorted(halves.items()):
        if module not in linear:
            refuse(
                f"it targets {module!r}, which is no linear module of this model that every token goes through once."
            )
        ins, outs = linear[module].in_features, linear[module].out_features
        rank = _of(config, "rank_pattern", module, config["r"])
        alpha = _of(config, "alpha_pattern", module, config["lora_alpha"])
        want = {"A": [rank, ins], "B": [outs, rank]}
        if half != want:
            refuse(f"{module}: shapes {half} where this model and rank {rank} need {want}. Is it for another model?")
        modules[module] = Pair(rank, ins, outs, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    if not modules:
        refuse("it holds no tensors.")
    return Outline(path, modules, next(iter(linear.values())).weight.dtype)


def read_tensors(name: str, outline: Outline) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module, A, B) of an adapter's file. Raises ModelError if it is not what it was when its outline was read."""
    try:
        with safe_open(outline.path / WEIGHTS, "pt") as file:
            for module, pair in outline.modules.items():
                a, b = (file.get_tensor(f"base_model.model.{module}.lora_{half}.weight") for half in "AB")
                if a.shape != (pair.rank, pair.ins) or b.shape != (pair.outs, pair.rank):
                    raise ModelError(
                        f"adapter {name!r}: {outline.path / WEIGHTS} has changed. Add it under another name."
                    )
                yield module, a, b
    except (OSError, SafetensorError) as error:
        raise ModelError(f"adapter {name!r}: {outline.path / WEIGHTS} cannot be read any more ({error}).") from error


def _config(path: Path, refuse: Refuse) -> dict[str, Any]:
    try:
        with (path / CONFIG).open("rb") as file:
            text = file.read(CONFIG_LIMIT + 1)
        if len(text) > CONFIG_LIMIT:
            refuse(f"{CONFIG} is longer than {CONFIG_LIMIT:,} bytes.")
        config = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        refuse(f"{CONFIG} cannot be read ({error}). Give a folder that PEFT's save_pretrained wrote.")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        refuse(f"{CONFIG} is of no LoRA adapter; other kinds can't be served.")
    for option, why in UNSERVED.items():
        if config.get(option):
            refuse(f"{option}={config[option]!r}: {why}. Only plain LoRA can be served; merge this one into the model.")
    if config.get("bias", "none") != "none":
        refuse(
            f"bias={config['bias']!r}: it adds biases. Only bias='none' can be served; merge this one into the model."
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(REBASED):
        refuse(
            f"init_lora_weights={start!r} changed the weights below it. Save it with path_initial_model_for_weight_conversion."
        )
    _number(config.setdefault("r", 8), "r", refuse, whole=True)
    _number(config.setdefault("lora_alpha", 8), "lora_alpha", refuse)
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(option) or {}
        if not isinstance(patterns, dict) or len(patterns) > 10_000:
            refuse(f"{option} is no table of at most 10,000 patterns.")
        for pattern, value in patterns.items():
            _number(value, f"{option}[{pattern!r}]", refuse, whole=option == "rank_pattern")
            if len(pattern) > 500 or re.search(r"\)[*+{]", pattern):
                refuse(f"{option}[{pattern!r}]: repeated groups are not read. Name the modules.")
            try:
                re.compile(pattern)
            except re.error as error:
                refuse(f"{option}[{pattern!r}] is no regular expression ({error}).")
    return config


def _number(x: Any, what: str, refuse: Refuse, whole: bool = False) -> None:
    good = isinstance(x, int if whole else int | float) and not isinstance(x, bool) and math.isfinite(x)
    if not good or (whole and not 1 <= x <= RANK_LIMIT):
        refuse(f"{what}={x!r} is no " + (f"rank of 1 to {RANK_LIMIT}." if whole else "number."))


def _of(config: dict[str, Any], option: str, module: str, default: Any) -> Any:
    """The value of the first pattern that names a module or the end of its name, as PEFT reads them."""
    patterns = config.get(option) or {}
    return next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", module)), default)


def _shapes(path: Path, refuse: Refuse) -> dict[str, list[int]]:
    file = path / WEIGHTS
    if not file.is_file():
        other = next(path.glob("adapter_model.*"), None)
        refuse(
            f"there is no {WEIGHTS}"
            + (f", and {other.name} is not read. Save it again as safetensors." if other else ".")
        )
    try:
        with file.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
        if size > HEADER_LIMIT:
            refuse(f"the header of {WEIGHTS} has {size:,} bytes, more than {HEADER_LIMIT:,}.")
        with safe_open(file, "pt") as tensors:
            found = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            odd = next((k for k, x in found.items() if x.get_dtype() not in ("F32", "F16", "BF16")), None)
            if odd is not None:
                refuse(f"tensor {odd!r} is {found[odd].get_dtype()}; 32- or 16-bit floats are read.")
            return {key: x.get_shape() for key, x in found.items()}
    except (OSError, SafetensorError) as error:
        refuse(f"{WEIGHTS} cannot be read ({error}).")
