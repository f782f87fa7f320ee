"""LOOK-M (arXiv 2406.18139): text stays, image tokens are ranked by attention and merged into what stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvloom import CacheError, KVCache, RecipeError, parse
from tests.families import build, prompt
from tests.reference import Full, Slots, held, kept, layers_of, run, run_cache
from tests.test_modality import example, llava, read


def images(n: int) -> Tensor:
    """Two images in a text of n tokens; the second one ends among the newest."""
    kinds = torch.zeros(n, dtype=torch.long)
    kinds[n // 8 : n // 2] = 1
    kinds[n // 2 + 5 : n - 4] = 2
    return kinds


class Look(Full):
    """Behind prompts: everything that is text or new, and the best image tokens; the others merge, one by one."""

    def __init__(self, model: Any, kinds: Tensor, budget: int | float, window: float, merge: str | None) -> None:
        super().__init__(model)
        self.kinds, self.budget, self.window, self.merge = kinds, budget, window, merge
        self.todo: list[tuple[Slots, list[int], list[int], list[tuple[float, int]]]] = []

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        if p.shape[1] == 1:
            return
        s.score = s.score + p.sum((0, 1))
        n, length = len(s.k), int(s.index[-1]) + 1
        size = int(self.budget * self.prompt + 1e-9) if isinstance(self.budget, float) else self.budget
        recent = int(self.window * size)
        text = [int(i) >= len(self.kinds) or self.kinds[int(i)] == 0 for i in s.index]
        older = [i for i in range(n) if s.index[i] < length - recent]
        room = recent + max(sum(text[i] for i in older), size - recent)
        stay = [i for i in range(n) if text[i] or i not in older]
        free = sorted((i for i in older if not text[i]), key=lambda i: -float(s.score[i]))
        stay = sorted(stay + free[: max(0, room - len(stay))])
        gone = [i for i in range(n) if i not in stay]
        near = []
        for i in gone:
            alike = F.cosine_similarity(s.k[i], s.k[stay], dim=-1)
            near.append((float(alike.max()), stay[int(alike.argmax())]))
        self.todo = [] if head == 0 else self.todo
        self.todo.append((s, stay, gone, near))
        if head == self.config.num_key_value_heads - 1:
            mean = torch.tensor([[a for a, _ in near] for *_, near in self.todo]).mean(0)
            enough = mean >= mean.mean() if self.merge == "weighted" else torch.ones_like(mean, dtype=torch.bool)
            for each in self.todo:
                self.absorb(*each, enough.tolist())

    def absorb(
        self, s: Slots, stay: list[int], gone: list[int], near: list[tuple[float, int]], enough: list[bool]
    ) -> None:
        k, v, score = s.k.clone(), s.v.clone(), s.score.clone()
        for j in set() if self.merge is None else {to for _, to in near}:
            mine = [(i, a) for (a, to), i, good in zip(near, gone, enough, strict=True) if to == j and good]
            for new, x in ((k, s.k), (v, s.v)):
                if self.merge == "pivot":
                    more = [(x[i] + x[j]) / 2 for i, _ in mine]
                elif self.merge == "mean":
                    more = [x[i] for i, _ in mine]
                else:
                    more = [a * x[i] for i, a in mine]
                new[j] = torch.stack([x[j], *more]).mean(0)
            score[j] += sum(float(s.score[i]) for i, _ in mine)
        s.k, s.v, s.score = k, v, score
        s.keep(torch.tensor(stay))


@pytest.mark.parametrize("merge", ["pivot", "mean", "weighted", None])
@pytest.mark.parametrize(
    ("sizes", "budget", "window"),
    [([80] + [1] * 12, 0.2, 0.5), ([80, 1, 1], 60, 0.3), ([60, 30, 1, 1, 1, 12, 1], 0.3, 0.5)],
    ids=["much text", "room for images", "chunks and turns"],
)
def test_text_stays_and_images_merge(sizes: list[int], budget: int | float, window: float, merge: str | None) -> None:
    """The slots and logits of a plain re-implementation, while decoding, at chunks of a prompt and at a later turn."""
    model, ids, kinds = build("llama"), prompt(sum(sizes)), images(80)
    reference = Look(model, kinds, budget, window, merge)
    cache = KVCache(model, f"look-m(budget={budget}, window={window}, merge={merge!r})").tokens(kinds)
    want, got = run(reference, ids, sizes), run_cache(model, cache, ids, sizes)
    for i, layer in enumerate(kept(cache)):
        for h, index in enumerate(layer):
            assert index == reference.slots[i, h].index.tolist(), f"layer {i}, head {h}"
            assert set(range(sum(sizes))) - set(kinds.nonzero()[:, 0].tolist()) <= set(index)
    torch.testing.assert_close(got, want, atol=4e-4, rtol=1e-3)


@pytest.mark.parametrize("recipe", ["look-m(budget=90)", "look-m(budget=1.0)", "look-m(budget=0.1)", "look-m"])
def test_exact_where_everything_fits_or_is_text(recipe: str) -> None:
    model, ids, sizes = build("llama"), prompt(90), [60, 20] + [1] * 10
    cache, full = KVCache(model, recipe), run_cache(model, KVCache(model), ids, sizes)
    if "90" in recipe or "1.0" in recipe:
        cache.tokens(images(80))
    elif recipe == "look-m":
        cache.tokens(torch.zeros(80, dtype=torch.long))
    torch.testing.assert_close(run_cache(model, cache, ids, sizes), full, atol=1e-4, rtol=1e-4)


def test_doubles_of_a_slot_leave_it_as_it_is() -> None:
    """A slot that absorbs copies of itself, and all that absorb nothing."""
    from kvloom.core.rows import Rows
    from kvloom.policies.mergers import Blend

    x, into = torch.randn(2, 3, 8), torch.tensor([[0, 0, 2], [1, 1, 1]])
    gone = torch.stack([x[h, at] for h, at in enumerate(into)])
    for weight in ("pivot", "mean", "cosine"):
        got = Blend(weight)(Rows(x, x * 2, 0), Rows(gone, gone * 2, 0), into)
        torch.testing.assert_close(got.k, x)
        torch.testing.assert_close(got.v, x * 2)
        assert torch.equal(got.k[0, 1], x[0, 1]) and torch.equal(got.k[1, 0], x[1, 0])


def test_all_tokens_alike() -> None:
    """Without merging and with all tokens alike it is H2O at the end of the prompt."""
    model, ids = build("llama"), prompt(90)
    caches = [
        KVCache(model, f"{name}(budget=20{more})")
        for name, more in (("h2o", ""), ("look-m", ", merge=None, text_first=False"))
    ]
    rows = [run_cache(model, cache, ids, [90]) for cache in caches]
    assert kept(caches[0]) == kept(caches[1])
    torch.testing.assert_close(rows[0], rows[1])


def test_bytes_are_freed() -> None:
    model, kinds = build("llama"), torch.zeros(400, dtype=torch.long)
    kinds[20:360] = 1
    full, small = KVCache(model), KVCache(model, "look-m").tokens(kinds)
    for cache in (full, small):
        run_cache(model, cache, prompt(400), [400])
    slots = 40 + max(20, 40)  # the newest 40 are text from 360 on
    site = layers_of(small)[0].site
    assert all(len(head) == slots for layer in kept(small) for head in layer)
    assert small.report().used == 3 * site.kv_heads * slots * (2 * 16 * 4 + 8)
    assert small.report().used < 0.22 * full.report().used


def test_a_model_that_sees_images() -> None:
    model, inputs = llava(), example()
    kinds = read(inputs["input_ids"])
    text, n = (kinds[0] == 0).nonzero()[:, 0].tolist(), kinds.shape[1]
    for recipe, slots in (("look-m(budget=0.2)", len(text)), ("look-m(budget=0.7)", int(0.7 * n))):
        cache = KVCache(model, recipe).tokens(kinds)
        out = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=6, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert bool(torch.isfinite(torch.stack(out.logits)).all())
        for layer in kept(cache):
            for head in layer:
                assert len(head) == slots + 5 and set(text) <= set(head)


def test_rows_go_by_their_own_images() -> None:
    model, kinds = build("llama"), torch.zeros(2, 60, dtype=torch.long)
    ids, mask = torch.cat([prompt(60), prompt(60, seed=1)]), torch.ones(2, 60, dtype=torch.long)
    ids[1, :20], mask[1, :20] = 0, 0
    kinds[0, 10:50], kinds[1, 5:35] = 1, 1
    cache = KVCache(model, "look-m(budget=0.2)").tokens(kinds)
    model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2, do_sample=False, num_beams=2
    )
    for row, n in enumerate((60, 60, 40, 40)):
        text = {i for i in range(n) if kinds[row // 2, i] == 0}
        assert all(
            text <= set(head["main"]) and len(head["main"]) < n - 10 for layer in held(cache, row) for head in layer
        )


def test_codecs() -> None:
    """Merged prompts may be encoded; a later turn would merge into codes, which is refused, and without merging goes on."""
    model, ids, kinds = build("llama"), prompt(220), images(200)
    codec = "kivi(bits=4, group=16, residual=16)"
    cache = KVCache(model, f"look-m | {codec}").tokens(kinds[:135])
    assert bool(run_cache(model, cache, ids, [135] + [1] * 40).isfinite().all())
    for merge, refused in (("'pivot'", True), (None, False)):
        cache = KVCache(model, f"look-m(merge={merge}) | {codec}").tokens(kinds)
        sizes = [135, 1, 1, 62, *[1] * 21]
        if refused:
            with pytest.raises(CacheError, match="nothing is encoded twice"):
                run_cache(model, cache, ids, sizes)
        else:
            assert bool(run_cache(model, cache, ids, sizes).isfinite().all())


def test_options() -> None:
    for wrong in ("budget='64MiB'", "budget=0", "window=1.5", "merge='sum'", "merge=True"):
        with pytest.raises(RecipeError):
            parse(f"look-m({wrong})")
