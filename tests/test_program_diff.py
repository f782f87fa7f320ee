"""The finders of reuse: what a new text shares with an old one."""

from __future__ import annotations

from difflib import SequenceMatcher

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvloom.programs import diff
from kvloom.programs.diff import Edit, Match, edits, matches

texts = st.lists(st.integers(0, 4), max_size=40)


@settings(max_examples=100, deadline=None)
@given(texts, texts, st.integers(1, 5))
def test_matches_are_common_ordered_and_long_enough(old: list[int], new: list[int], least: int) -> None:
    at = (0, 0)
    for m in matches(old, new, least):
        assert m.n >= least and m.old >= at[0] and m.new >= at[1]
        assert old[m.old : m.old + m.n] == new[m.new : m.new + m.n]
        at = (m.old + m.n, m.new + m.n)


@settings(max_examples=100, deadline=None)
@given(texts, texts, st.integers(1, 5))
def test_edits_make_the_new_text(old: list[int], new: list[int], least: int) -> None:
    got, at = [], 0
    for edit in edits(old, new, least):
        assert at <= edit.start <= edit.stop <= len(old) and (edit.stop > edit.start or edit.tokens)
        got += [*old[at : edit.start], *edit.tokens]
        at = edit.stop
    assert [*got, *old[at:]] == new
    assert bool(edits(old, new, least)) == (old != new)


@settings(max_examples=100, deadline=None)
@given(texts, texts)
def test_few_differences_means_fewest(old: list[int], new: list[int]) -> None:
    """As many tokens in common as the longest common subsequence has, by dynamic programming."""
    row = [0] * (len(new) + 1)
    for x in old:
        before = 0
        for j, y in enumerate(new):
            before, row[j + 1] = row[j + 1], before + 1 if x == y else max(row[j + 1], row[j])
    assert sum(m.n for m in matches(old, new)) == row[-1]


def test_edits_in_several_places() -> None:
    old = list(range(100))
    new = [*old[:20], 500, 501, *old[20:50], *old[60:90], 777, *old[91:]]
    assert edits(old, new) == [Edit(20, 20, (500, 501)), Edit(50, 60), Edit(90, 91, (777,))]
    assert edits(old, old) == [] and edits([], [1]) == [Edit(0, 0, (1,))] and edits([1], []) == [Edit(0, 1)]
    assert edits(old, [*old[:50], 9, *old[51:53], 8, *old[54:]]) == [Edit(50, 54, (9, 51, 52, 8))]  # 2 are too few


def test_different_texts_fall_back_to_longest_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "FEW", 3)
    old, new = [1, 2, 3, 9, 9, 4, 5, 6, 7], [8, 8, 8, 4, 5, 6, 7, 0, 0, 0]
    want = [Match(*x) for x in SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks() if x.size]
    assert matches(old, new) == want == [Match(5, 3, 4)]
