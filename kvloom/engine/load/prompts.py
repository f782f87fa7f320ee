"""Prompts for requests: token ids or text, drawn from a seed, the same for the same source."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from kvloom.engine.load.work import Ask
from kvloom.errors import KvloomError

__all__ = ["Prompts", "words_of"]

# Short words that most tokenizers know as one token with the space before them.
WORDS = """
the and for are but not you all any can had her was one our out day get has him his how man new now old see two way who boy did
its let put say she too use that with have this will your from they know want been good much some time very when come here just
like long make many more only over such take than them well were
"""


class Prompts:
    """Draws from an alphabet: `ids`, and `words` (without their leading space), of which one or both are known.

    Where both are, ids and text of a request are the same tokens.
    """

    def __init__(self, seed: int, ids: Sequence[int] | None = None, words: Sequence[str] | None = None) -> None:
        self.ids = None if ids is None else np.asarray(ids)
        self.words = WORDS.split() if words is None else list(words)
        self._exact = ids is not None and words is not None
        if self._exact and len(self.words) != len(ids or ()):
            raise ValueError("ids and words of an alphabet must be as many")
        self._drawn = lru_cache(maxsize=4096)(lambda source, size: self._draw(seed, source, size))

    @staticmethod
    def _draw(seed: int, source: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        """So many numbers of 32 bits; a longer draw begins with a shorter one."""
        random = np.random.Philox(key=np.array([seed % 2**64, source], dtype=np.uint64))
        return random.random_raw((size + 1) // 2).view(np.uint32)[:size]

    def _indices(self, ask: Ask, alphabet: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        return np.concatenate([self._drawn(source, size) for source, size in ask.spans]) % np.uint32(alphabet)

    def tokens(self, ask: Ask) -> list[int]:
        """The prompt as token ids."""
        if self.ids is None:
            raise KvloomError("prompts of token ids need a range of ids")
        found: list[int] = self.ids[self._indices(ask, len(self.ids))].tolist()
        return found

    def text(self, ask: Ask) -> str:
        """The prompt as words. With a tokenizer's words it has exactly the tokens asked for, else about as many."""
        return " " + " ".join(self.words[i] for i in self._indices(ask, len(self.words)).tolist())


def words_of(folder: Path) -> tuple[list[int], list[str]]:
    """Tokens of a model's tokenizer that are a space and a word, and stay one token wherever they stand.

    Raises KvloomError if the folder has no tokenizer.json, or one with too few such tokens.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json" if folder.is_dir() else folder
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise KvloomError(f"--tokenizer {str(folder)!r}: {path.name} cannot be read ({error}).") from error
    found: list[tuple[int, str]] = []
    for token in range(tokenizer.get_vocab_size()):
        word = tokenizer.decode([token])
        plain = word[:1] == " " and word[1:].isascii() and word[1:].isalpha() and word.islower()
        if plain and tokenizer.encode(" it" + word * 2 + " it", add_special_tokens=False).ids[1:-1] == [token] * 2:
            found.append((token, word[1:]))
    ids, words = [i for i, _ in found], [w for _, w in found]
    prompt = "".join(" " + w for w in words)
    if len(found) < 64 or tokenizer.encode(prompt, add_special_tokens=False).ids != ids:
        raise KvloomError(
            f"--tokenizer {str(folder)!r} has no words that stay whole in any text; leave the option out, and prompts are "
            "token ids, or text of about the length."
        )
    return ids, words
