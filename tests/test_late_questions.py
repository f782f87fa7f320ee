"""Questions that come after compression, on the bundled model: heads and slots that find things survive them, windows do not."""

from __future__ import annotations

import pytest
import torch

from kvloom.lab.demo import demo_task
from kvloom.lab.measure import load_model, run_recipe

FIND = (
    "duoattention(sparsity=0.5, sinks=16, window=112)",
    "compresskv(budget=0.5)",
    "kvzip(budget=0.5)",
    "razorattention(budget=128)",
)
WATCH = ("snapkv(budget=0.5)", "adakv(budget=0.5)")


@pytest.mark.slow
@torch.no_grad()
def test_what_finds_answers_late_questions() -> None:
    model, tokenizer = load_model("nano")
    right, held = dict.fromkeys((*FIND, *WATCH), 0), dict.fromkeys((*FIND, *WATCH), 0)
    for seed in (0, 1):
        task = demo_task(tokenizer, 1200, seed, 16)
        for recipe in right:
            row, _ = run_recipe(model, tokenizer, recipe, task, None)
            right[recipe] += sum(bool(answer.right) for answer in row.answers if answer.turn > 1)
            held[recipe] += row.used
    assert all(right[recipe] >= 3 for recipe in FIND), right  # of 4
    assert all(right[recipe] <= 2 for recipe in WATCH), right
    assert max(held.values()) < 1.3 * min(held[recipe] for recipe in WATCH), held
