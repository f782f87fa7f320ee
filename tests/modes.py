"""The ways of running a model with a cache that the exactness matrix covers.

A mode is a function `(model, assistant, make_cache) -> Result`. It runs once with a stock cache and once with
the cache under test; `difference` compares the two results.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvloom import KVCache
from tests.families import VOCAB, prompt

MakeCache = Callable[[PreTrainedModel], Cache]
LENGTHS = (54, 41, 27)  # rows of a left-padded batch; the longest is three times the sliding window
NEW_TOKENS = 10
ALPHABET = 3  # of the texts that drafts are made for: small, so that some drafts are right and some are wrong
CHUNK = 20  # of a chunked prefill: longer than the sliding window, does not divide the prompt


@dataclass
class Result:
    """What a mode produced: token ids (compared for equality) and logits (compared up to rounding)."""

    tokens: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def add(self, output: Any) -> None:
        """Take tokens, logits and, from a beam search, scores from the output of `generate`."""
        self.tokens.append(output.sequences)
        self.logits.append(torch.stack(output.logits))
        if getattr(output, "sequences_scores", None) is not None:
            self.logits.append(output.sequences_scores)


def make_cache(model: PreTrainedModel, recipe: str | None) -> Cache:
    """A kvloom cache with this recipe, or with None the stock cache of transformers."""
    return DynamicCache(config=model.config) if recipe is None else KVCache(model, recipe)


def difference(got: Result, want: Result) -> float:
    """Largest absolute difference of the logits; raises AssertionError where tokens or shapes differ."""
    assert len(got.tokens) == len(want.tokens) and len(got.logits) == len(want.logits)
    worst = 0.0
    for part, (a, b) in enumerate(zip(got.logits, want.logits, strict=True)):
        assert a.shape == b.shape, f"logits of part {part}: shape {tuple(a.shape)}, stock {tuple(b.shape)}"
        assert bool(torch.isfinite(a).all()), f"logits of part {part}: not finite"
        worst = max(worst, float((a - b).abs().max()))
    for part, (a, b) in enumerate(zip(got.tokens, want.tokens, strict=True)):
        assert torch.equal(a, b), (
            f"tokens of part {part} differ (logits by {worst:.2e}): {a[:, -NEW_TOKENS:].tolist()}, "
            f"stock {b[:, -NEW_TOKENS:].tolist()}"
        )
    return worst


def pad_left(rows: list[Tensor]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, both `[rows, longest]`, of rows `[1, length]`; token 0 is padding."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), (longest - r.shape[1], 0)) for r in rows])
    return {"input_ids": ids, "attention_mask": mask}


def batch(rows: int = 3) -> dict[str, Tensor]:
    """The left-padded batch that several modes share."""
    return pad_left([prompt(length, seed=i) for i, length in enumerate(LENGTHS[:rows])])


def generate(model: PreTrainedModel, cache: Cache, inputs: Tensor | dict[str, Tensor], **options: Any) -> Any:
    """`model.generate` with `cache`, greedy unless `options` say otherwise; returns tokens and raw logits."""
    if isinstance(inputs, Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options}
    return model.generate(**inputs, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **options)


def _one(model: PreTrainedModel, make: MakeCache, inputs: Tensor | dict[str, Tensor], **options: Any) -> Result:
    result = Result()
    result.add(generate(model, make(model), inputs, **options))
    return result


def greedy(model: PreTrainedModel, assistant: PreTrainedModel, make: MakeCache) -> Result:
    return _one(model, make, prompt(LENGTHS[0]))


def padded(model: PreTrainedModel, assistant: PreTrainedModel, make: MakeCache) -> Result:
    return _one(model, make, batch())


def beams(model: PreTrainedModel, assistant: PreTrainedModel, make: MakeCache) -> Result:
    return _one(model, make, batch(2), num_beams=3)


def sampled(model: PreTrainedModel, assistant: PreTrainedModel, make: MakeCache) -> Result:
    torch.manual_seed(5)
    return _one(model, make, batch(2), do_sample=True, top_k=40, num_return_sequences=2)


def _drafted(model: PreTrainedModel, make: MakeCache, **options: Any) -> Result:
    ids = prompt(LENGTHS[0], distinct=ALPHABET)
    ids[:, 0] = 10
    others = [token for token in range(VOCAB) if not 10 <= token < 10 + ALPHABET]
    return _one(model, make, ids, suppress_tokens=others, max_new_tokens=2 * NEW_TOKENS, **options)


def lookup(model: PreTrainedModel, assistant: PreTrainedModel, make: MakeCache) -> Result:
    return _drafted(model, make, prompt_lookup_num_tokens=4)


def assisted(model: PreTrainedModel, assistant: PreTrainedModel, make: MakeCache) -> Result:
    return _drafted(model, make, assistant_model=assistant)


def selfassisted(model: PreTrainedModel, assistant: PreTrainedModel, make: MakeCache) -> Result:
    return _one(model, make, prompt(LENGTHS[0]), assistant_model=model)


def chunked(model: PreTrainedModel, assistant: PreTrainedModel, make: MakeCache) -> Result:
    return _one(model, make, prompt(LENGTHS[0]), prefill_chunk_size=CHUNK)


def chunkedpadded(model: PreTrainedModel, assistant: PreTrainedModel, make: MakeCache) -> Result:
    """The first chunk of the shortest row is padding only."""
    return _one(model, make, batch(), prefill_chunk_size=CHUNK)


def turns(model: PreTrainedModel, assistant: PreTrainedModel, make: MakeCache) -> Result:
    result, cache = Result(), make(model)
    first = generate(model, cache, prompt(LENGTHS[1]))
    result.add(first)
    result.add(generate(model, cache, torch.cat([first.sequences, prompt(13, seed=7)], dim=1)))
    return result


def forked(model: PreTrainedModel, assistant: PreTrainedModel, make: MakeCache) -> Result:
    """Two copies of a prefix go on differently; then the original goes on, unharmed."""
    result, cache, prefix = Result(), make(model), prompt(LENGTHS[1])
    with torch.no_grad():
        model(input_ids=prefix, attention_mask=torch.ones_like(prefix), past_key_values=cache)
    for seed, owner in ((7, copy.deepcopy(cache)), (8, copy.deepcopy(cache)), (9, cache)):
        assert owner.get_seq_length() == prefix.shape[1]
        result.add(generate(model, owner, torch.cat([prefix, prompt(9, seed=seed)], dim=1)))
    return result


def repeated(model: PreTrainedModel, assistant: PreTrainedModel, make: MakeCache) -> Result:
    """A prefix prefilled once is repeated for three different questions."""
    result, cache, prefix = Result(), make(model), prompt(LENGTHS[1])
    with torch.no_grad():
        model(input_ids=prefix, attention_mask=torch.ones_like(prefix), past_key_values=cache)
    cache.batch_repeat_interleave(3)
    questions = torch.cat([prompt(9, seed=seed) for seed in (7, 8, 9)])
    result.add(generate(model, cache, torch.cat([prefix.expand(3, -1), questions], dim=1)))
    return result


def forward(model: PreTrainedModel, assistant: PreTrainedModel, make: MakeCache) -> Result:
    """Plain calls, padded batch: the prompt, then runs of one and of several; logits of real tokens."""
    inputs, cache, result = batch(2), make(model), Result()
    more = torch.cat([prompt(9, seed=seed) for seed in (7, 8)])
    ids = torch.cat([inputs["input_ids"], more], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = [LENGTHS[0] + step for step in (0, 1, 2, 6, 7, 9)]
    for begin, stop in pairwise([0, *ends]):
        with torch.no_grad():
            logits = model(
                input_ids=ids[:, begin:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, begin:stop],
                past_key_values=cache,
                use_cache=True,
            ).logits
        result.logits.append(logits[mask[:, begin:stop].bool()])
        assert cache.get_seq_length() == stop
    return result


MODES: dict[str, Callable[[PreTrainedModel, PreTrainedModel, MakeCache], Result]] = {
    mode.__name__: mode
    for mode in (
        greedy,
        padded,
        beams,
        sampled,
        lookup,
        assisted,
        selfassisted,
        chunked,
        chunkedpadded,
        turns,
        forked,
        repeated,
        forward,
    )
}
