"""A model with a kvloom cache against the same model with a stock cache: same tokens, logits up to rounding.

The `full` recipe runs on every family in every mode. The other recipes, at settings that lose nothing, run on
a selection in which each pair of family, mode and recipe occurs; `make test-all` runs every combination.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvloom import detach
from tests.families import FAMILIES, SLIDING, build, pristine, prompt, subject
from tests.modes import LENGTHS, MODES, Result, difference, make_cache

pytestmark = pytest.mark.exactness

TOLERANCE = 3e-4  # of logits with a spread of 2, fp32

# Settings at which a recipe must reproduce the full cache.
LOSSLESS: dict[str, str] = {
    "streamingllm": "streamingllm(window=1000000)",
    "h2o": "h2o(budget=1000000)",
    "snapkv": "snapkv(budget=1000000)",
    "razorattention": "razorattention(induction=1.0)",
    "mikv": "mikv(budget=1.0)",
    "tova": "tova(budget=1000000)",
    "keydiff": "keydiff(budget=1000000)",
    "pyramidkv": "pyramidkv(budget=1000000)",
    "adakv": "adakv(budget=1000000)",
    "kvzip": "kvzip(budget=1000000)",
    "windowkv": "windowkv(budget=1000000)",
    "kvcrush": "kvcrush(budget=1000000)",
    "task-kv": "task-kv(budget=1000000)",
    "scissorhands": "scissorhands(budget=1000000)",
    "keyformer": "keyformer(budget=1000000)",
    "gui-kv": "gui-kv(budget=1000000)",
    "expected-attention": "expected-attention(budget=1000000)",
    "kivi": "kivi(group=8, residual=2048)",
    "snapkv-kivi": "snapkv(budget=1000000) | kivi(group=8, residual=2048)",
}
# (recipe, family) -> what the error must name. Both rotations change with the length of the text, so a
# stored key can't be turned to another position.
REFUSED: dict[tuple[str, str], str] = {
    ("streamingllm", "llama-dynamic"): "dynamic",
    ("streamingllm", "llama-longrope"): "longrope",
    ("expected-attention", "llama-dynamic"): "dynamic",
    ("expected-attention", "llama-longrope"): "longrope",
}
# On older transformers a sliding model is no good as an assistant, whatever the cache of the main model.
ASSISTED = ("assisted", "selfassisted")

# For tests in which the family matters less than the recipe.
SOME = ("llama", "qwen3", "gemma3", "gpt_neox", "gpt-oss", "falcon-gqa")


def run(model: PreTrainedModel, family: str, mode: str, recipe: str | None) -> Result:
    """Run `mode` with a cache of this recipe (None: a stock cache)."""
    # Dynamic RoPE remembers the longest text it saw; a short one resets it, test order must not matter.
    with torch.no_grad():
        model(prompt(2))
    return MODES[mode](model, pristine(family, assistant=True), lambda model: make_cache(model, recipe))


@functools.cache
def stock(family: str, mode: str) -> Result:
    """The result of the stock cache on a model that kvloom never touched; skips what that cache can't do."""
    try:
        return run(pristine(family), family, mode, None)
    except RuntimeError as error:
        if family in SLIDING and mode in ASSISTED:
            pytest.skip(f"the stock cache fails in this version of transformers: {error}")
        raise


def check(family: str, mode: str, recipe: str) -> None:
    want = stock(family, mode)
    model = subject(family)
    try:
        got = run(model, family, mode, recipe)
    finally:
        detach(model)
    assert difference(got, want) < TOLERANCE


def all_pairs(*axes: list[Any]) -> list[tuple[Any, ...]]:
    """A small selection of `product(*axes)` in which every pair of values of two axes occurs (greedy).

    Among rows that add equally many pairs, the one with the values used least so far is taken.
    """
    rows = list(itertools.product(*axes))
    pairs = [{(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(axes)), 2)} for row in rows]
    missing = set().union(*pairs)
    chosen: list[tuple[Any, ...]] = []
    used: Counter[Any] = Counter()
    while missing:
        best = max(range(len(rows)), key=lambda k: (len(pairs[k] & missing), -sum(used[v] for v in rows[k])))
        chosen.append(rows[best])
        used.update(rows[best])
        missing -= pairs[best]
    return chosen


def lossless_cases() -> list[Any]:
    combinations = list(itertools.product(FAMILIES, MODES, LOSSLESS))
    fast = set(all_pairs(list(FAMILIES), list(MODES), list(LOSSLESS)))
    return [
        pytest.param(*row, id="-".join(row), marks=[] if row in fast else pytest.mark.slow)
        for row in combinations
        if (row[2], row[0]) not in REFUSED
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_full(family: str, mode: str) -> None:
    check(family, mode, "full")


@pytest.mark.parametrize(("family", "mode", "recipe"), lossless_cases())
def test_lossless(family: str, mode: str, recipe: str) -> None:
    check(family, mode, LOSSLESS[recipe])


@pytest.mark.parametrize(("recipe", "family"), REFUSED)
def test_refused(recipe: str, family: str) -> None:
    model = subject(family)
    with pytest.raises(ValueError) as caught:
        make_cache(model, LOSSLESS[recipe])
    assert REFUSED[recipe, family] in str(caught.value).lower()
    # the refusal leaves the model as it was
    assert model.config._attn_implementation == pristine(family).config._attn_implementation


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16(family: str) -> None:
    """In bf16 kvloom is as close to the fp32 model as the stock cache is."""
    low = build(family).to(torch.bfloat16)
    high = build(family)
    high.load_state_dict({name: value.float() for name, value in low.state_dict().items()})

    def decode(model: Any, recipe: str | None) -> torch.Tensor:
        # the logits of the calls after the prompt: only they read what the cache holds
        return torch.cat(run(model, family, "forward", recipe).logits[1:]).float()

    want = decode(high, None)
    ordinary = (decode(low, None) - want).square().mean().sqrt()
    ours = (decode(low, "full") - want).square().mean().sqrt()
    assert ours <= 1.25 * ordinary + 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_control_the_middle_matters(family: str) -> None:
    """Hiding the middle of the prompt changes the last logits, so wrong attention can't pass unseen."""
    model, ids = pristine(family), prompt(LENGTHS[0])
    mask = torch.ones_like(ids)
    mask[:, 8:-8] = 0
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        whole = model(ids, position_ids=positions).logits[0, -1]
        holed = model(ids, attention_mask=mask, position_ids=positions).logits[0, -1]
    assert (whole - holed).abs().max() > 0.5


def _note_size(sizes: list[int], module: torch.nn.Module, args: tuple[torch.Tensor], output: Any) -> None:
    sizes.append(args[0].shape[1])


@pytest.mark.parametrize("mode", ["lookup", "assisted"])
def test_control_drafts_are_accepted_and_rejected(mode: str) -> None:
    calls = tokens = 0
    for family in SOME:
        model = build(family)
        sizes: list[int] = []
        model.get_input_embeddings().register_forward_hook(functools.partial(_note_size, sizes))
        try:
            run(model, family, mode, None)
        except RuntimeError:  # see stock()
            assert family in SLIDING
            continue
        calls += len(sizes) - 1  # less the call in run()
        tokens += sum(sizes) - 2 - LENGTHS[0]
    made = len(SOME) * 20
    assert calls < 0.9 * made, "no drafts were accepted"
    assert tokens > 1.1 * made, "no drafts were rejected"
