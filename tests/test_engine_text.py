"""Tokens to text, token by token: the same text as all at once, and stops wherever it is cut."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from kvloom.engine.text import LETTERS, Detokenizer, Stops, Vocabulary


@pytest.fixture(scope="module")
def words(nano: Any) -> Vocabulary:
    return Vocabulary(nano[1], 4099)


@pytest.fixture(scope="module")
def pieces() -> Vocabulary:
    """As SentencePiece's: "▁" for a space, bytes for what has no token, and no space where a text begins."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁The", "▁cat", "s", "."]
    rust = Tokenizer(BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(steps)
    rust.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>"), len(names))


def told(vocabulary: Vocabulary, tokens: list[int], before: list[int] = [], skip: bool = True) -> list[str]:  # noqa: B006
    reader = Detokenizer(vocabulary, before, skip)
    return [*(reader.push(token) for token in tokens), reader.end()]


@given(text=st.text())
def test_any_text_comes_out_as_it_is(words: Vocabulary, text: str) -> None:
    tokens = words.tokenizer.encode(text, add_special_tokens=False)
    whole = words.decode(tokens)
    parts = told(words, tokens)
    assert "".join(parts) == whole
    assert b"".join(map(words.piece, tokens)).decode() == words.decode(tokens, skip=False)


@given(tokens=st.lists(st.integers(0, 4098), max_size=40))
def test_any_tokens_give_the_text_of_all_at_once(words: Vocabulary, tokens: list[int]) -> None:
    assert "".join(told(words, tokens)) == words.decode(tokens)
    assert "".join(told(words, tokens, skip=False)) == words.decode(tokens, skip=False)
    assert b"".join(map(words.piece, tokens)).decode(errors="replace") == words.decode(tokens, skip=False)


@given(text=st.text(alphabet="aé€😀 ", max_size=20), n=st.integers(0, 3))
def test_a_character_in_single_bytes_comes_whole(words: Vocabulary, text: str, n: int) -> None:
    names = {byte: letter for letter, byte in LETTERS.items()}
    ids = words.tokenizer.convert_tokens_to_ids
    tokens = [ids(names[byte]) for byte in text.encode()]
    parts = told(words, tokens, before=tokens[:n] * 3)
    assert "".join(parts) == text
    assert [part for part in parts if part] == list(text)


def test_pieces_of_sentences(pieces: Vocabulary) -> None:
    ids = pieces.tokenizer.convert_tokens_to_ids
    euro = [ids(f"<0x{b:02X}>") for b in "€".encode()]
    tokens = [ids("▁The"), ids("▁cat"), ids("s"), *euro, ids("▁cat"), ids(".")]
    assert told(pieces, tokens) == ["The", " cat", "s", "", "", "€", " cat", ".", ""]
    # behind a prompt the space stays, also behind tokens without a text
    assert told(pieces, tokens[:2], before=[ids("▁The")]) == [" The", " cat", ""]
    assert "".join(told(pieces, [ids("▁The"), ids("</s>"), ids("▁cat")])) == "The cat"
    assert [pieces.piece(ids(x)) for x in ("▁cat", "<0xE2>", "s", "</s>")] == [b" cat", b"\xe2", b"s", b"</s>"]
    assert "".join(told(pieces, euro[:2])) == "\N{REPLACEMENT CHARACTER}" * 2


def test_a_token_that_the_tokenizer_does_not_have(words: Vocabulary) -> None:
    assert words.piece(4099 + 5) == b"" and told(words, [4099 + 5]) == ["", ""]


def test_broken_bytes_cost_the_same_however_many_came(words: Vocabulary) -> None:
    broken = words.tokenizer.convert_tokens_to_ids({b: c for c, b in LETTERS.items()}[0xFF])
    reader = Detokenizer(words)
    begin = time.process_time()
    text = "".join(reader.push(broken) for _ in range(20_000)) + reader.end()
    assert time.process_time() - begin < 3 and text == "\N{REPLACEMENT CHARACTER}" * 20_000


@given(
    text=st.text(alphabet="ab", max_size=12),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 12)),
    include=st.booleans(),
)
def test_a_stop_is_found_wherever_the_text_is_cut(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    reader, out, ended = Stops(stops, include), "", False
    for begin, end in itertools.pairwise(edges):
        part, ended = reader.push(text[begin:end])
        out += part
        assert ended or (out + reader.held == text[:end] and not any(stop in out for stop in stops))
        if ended:
            break
    else:
        out += reader.push("", last=True)[0]
    # the one that is complete first ends it
    first = next((n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)), None)
    assert ended == (first is not None)
    if first is None:
        assert out == text
    else:
        found = [stop for stop in stops if stop in out] if include else []
        assert text.startswith(out) and (any(out.endswith(stop) for stop in found) if include else not found)
        if not include:
            assert any(text[len(out) :].startswith(stop) for stop in stops)


def test_text_goes_out_as_soon_as_it_can() -> None:
    reader = Stops(["\n\nUser:"])
    assert reader.push("Hello.\n") == ("Hello.", False)
    assert reader.push("Bye") == ("\nBye", False)
    assert reader.push("\n\nUser") == ("", False)
    assert reader.push(": and more") == ("", True)
    assert Stops([]).push("any") == ("any", False)
