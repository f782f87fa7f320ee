"""Trains the byte-level BPE tokenizer of the bundled model and wraps it for Hugging Face.

``python -m kvloom.models.training.tokenizer --out FOLDER`` reads ``$KVLOOM_DATA/text/*_00.txt``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BOS, EOS, PAD, USER, ASSISTANT, SYSTEM = (
    "<|begin|>",
    "<|end|>",
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)
SPECIAL_TOKENS = [BOS, EOS, PAD, USER, ASSISTANT, SYSTEM]
DOCUMENT_END = "<|endoftext|>"  # a line of the training text, never a token

# An answer starts with a space, so that its first word has the same token as in running text, where a
# space precedes it: copying then needs no change of token.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|> {{ message['content'] | trim }}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] | trim }}{% endif %}"
    "{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def data_folder() -> Path:
    """The folder with the training text, ``$KVLOOM_DATA/text``."""
    root = os.environ.get("KVLOOM_DATA")
    if not root:
        raise SystemExit("set KVLOOM_DATA to the folder that holds text/*.txt")
    return Path(root) / "text"


def sample_text(path: Path, share: float, block: int = 1 << 18) -> Iterator[str]:
    """Evenly spread blocks of ``block`` bytes, together about ``share`` of the file."""
    size = path.stat().st_size
    count = max(1, int(size * share / block))
    with path.open("rb") as file:
        for index in range(count):
            file.seek(size * index // count)
            yield file.read(block).decode("utf-8", "ignore").replace(DOCUMENT_END, "\n")


def train_bpe(texts: Iterator[str], vocab_size: int = 4096) -> Any:
    """A ``tokenizers.Tokenizer``: byte-level BPE in which each digit is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrap(tokenizer: Any, max_length: int = 8192) -> Any:
    """The same tokenizer as a ``PreTrainedTokenizerFast`` with the chat template."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main() -> None:
    """Command line: train and save into ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--share", type=float, default=0.12, help="share of the text that is read")
    args = parser.parse_args()
    files = sorted(data_folder().glob("*_00.txt"))
    texts = (text for path in files for text in sample_text(path, args.share))
    fast = wrap(train_bpe(texts, args.vocab_size))
    fast.save_pretrained(args.out)
    probe = "The magic number for cedar is 48213."
    print(len(fast), fast.tokenize(probe))


if __name__ == "__main__":
    main()
