"""Makes the word lists ``words_keys.txt``, ``words_names.txt`` and ``words_fillers.txt`` from the training text.

``python -m kvloom.models.training.words`` counts words in ``$KVLOOM_DATA/text`` and writes the files next to this
module. Every eighth line of keys and names is held out: never a key or value in training (see ``recall.py``).
Fillers are what loose sentences are made of; no held-out key is among them.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

from kvloom.models.training.tokenizer import data_folder, sample_text

FOLDER = Path(__file__).parent
WORD = re.compile(r"(?<![.!?\"'“\u2018] )(?<=[a-z,] )([A-Za-z][a-z]{3,9})\b")


def main() -> None:
    """Write the lists: common words without the 350 commonest, always capitalised ones, and common words."""
    counts: Counter[str] = Counter()
    for path in sorted(data_folder().glob("[gw]*_00.txt")):
        for text in sample_text(path, 0.3):
            counts.update(WORD.findall(text))
    lower = [word for word, _ in counts.most_common() if word.islower() and len(word) <= 9]
    keys = [word for word in lower[350:9000] if counts[word] >= 15 and not word.endswith(("ing", "ed", "ly"))][:4000]
    names = [
        word
        for word, number in counts.most_common()
        if word[0].isupper() and number >= 15 and counts[word.lower()] * 20 < number
    ][:1200]
    for words in (keys, names):
        random.Random(0).shuffle(words)
    held = set(keys[7::8])
    fillers = sorted(word for word in lower[:3500] if word not in held)
    for name, words in (("keys", keys), ("names", names), ("fillers", fillers)):
        (FOLDER / f"words_{name}.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        print(name, len(words), words[:12])


if __name__ == "__main__":
    main()
