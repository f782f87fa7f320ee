"""Does a model work with a recipe? Short random prompts in five ways of running, against the stock cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvloom import KVCache
from kvloom.errors import KvloomError

__all__ = ["MODES", "Verdict", "check"]

NEW = 8
TOLERANCE = 1e-3  # logits in fp32; half precision gets more
Outcome = tuple[list[Tensor], list[Tensor]]  # tokens, logits


@dataclass
class Verdict:
    """`result`: "exact" (same tokens, logits up to rounding), "lossy", or "refused" with the reason in `detail`."""

    recipe: str
    mode: str
    result: str
    error: float | None
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _ids(model: PreTrainedModel, length: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(10, vocabulary, (1, length), generator=draw).to(model.device)


def _generate(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Outcome:
    options |= {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        past_key_values=cache,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return [out.sequences], [torch.stack(out.logits).float()]


def _greedy(model: PreTrainedModel, make: Callable[[], Any]) -> Outcome:
    return _generate(model, make(), _ids(model, 48, 1))


def _batch(model: PreTrainedModel, make: Callable[[], Any]) -> Outcome:
    rows = [_ids(model, length, length) for length in (48, 37, 21)]
    ids = torch.cat([torch.nn.functional.pad(row, (48 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (48 - row.shape[1], 0)) for row in rows])
    return _generate(model, make(), ids, mask)


def _beams(model: PreTrainedModel, make: Callable[[], Any]) -> Outcome:
    return _generate(model, make(), _ids(model, 48, 2), num_beams=3)


def _turns(model: PreTrainedModel, make: Callable[[], Any]) -> Outcome:
    cache = make()
    tokens, logits = _generate(model, cache, _ids(model, 40, 3))
    again = _generate(model, cache, torch.cat([tokens[0], _ids(model, 12, 4)], 1))
    return tokens + again[0], logits + again[1]


@torch.no_grad()
def _copied(model: PreTrainedModel, make: Callable[[], Any]) -> Outcome:
    cache, ids = make(), _ids(model, 48, 5)
    model(ids[:, :-1], past_key_values=cache)
    twin = copy.deepcopy(cache)
    first = _generate(model, cache, ids)
    second = _generate(model, twin, ids)
    return first[0] + second[0], first[1] + second[1]


MODES: dict[str, Callable[[PreTrainedModel, Callable[[], Any]], Outcome]] = {
    "greedy": _greedy,
    "padded batch of 3": _batch,
    "3 beams": _beams,
    "two turns": _turns,
    "deepcopy": _copied,
}


def check(
    model: PreTrainedModel, recipes: Sequence[str], tell: Callable[[str], None] = lambda text: None
) -> list[Verdict]:
    """Every recipe in every mode. A refusal (KvloomError) is a verdict; any other error is a defect and is raised."""
    tolerance = TOLERANCE if model.dtype == torch.float32 else 0.15
    wanted = {name: run(model, lambda: DynamicCache(config=model.config)) for name, run in MODES.items()}
    verdicts = []
    for recipe in recipes:
        for name, run in MODES.items():
            tell(f"{recipe}, {name}")
            try:
                tokens, logits = run(model, lambda recipe=recipe: KVCache(model, recipe))  # type: ignore[misc]
            except KvloomError as error:
                verdicts.append(Verdict(recipe, name, "refused", None, str(error)))
                continue
            same = all(torch.equal(a, b) for a, b in zip(tokens, wanted[name][0]))
            worst = max(float((a - b).abs().max()) for a, b in zip(logits, wanted[name][1]))
            exact = same and worst <= tolerance
            verdicts.append(Verdict(recipe, name, "exact" if exact else "lossy", worst, "" if same else "other tokens"))
    return verdicts
