"""A model with a store: prompts begin with what was computed before, here or in another process, and the rest is computed.

How a prompt is fed depends on the recipe alone, never on what the store happens to have, so a hit gives what no hit gives:

- rows: every token is stored by itself (`full`). What is missing is fed at once; any beginning of a block can be used, and what
  follows the last whole block is left to `generate`.
- blocks: tokens are encoded the same way whatever follows (`kivi`). The prompt is fed in blocks; each attends exactly to itself and to
  earlier ones as they are stored.
- whole: what is kept depends on what follows (`snapkv`, `h2o`). The prompt but for its last token is one piece, and serves
  that very prompt only.

The last part of a prompt is left to `generate`, which needs its logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.blocks import blockwise, rowwise
from kvloom.core.cache import KVCache
from kvloom.core.recipe import Recipe
from kvloom.core.registry import parse
from kvloom.errors import StoreError, unknown
from kvloom.store import snapshot
from kvloom.store.coding import CODINGS
from kvloom.store.fill import Filler, Program, Report
from kvloom.store.identity import Identity
from kvloom.store.prompt import Prompt, read_prompt
from kvloom.store.radix import Radix
from kvloom.store.store import Store

__all__ = ["Attached", "Program", "Reply", "Report", "Session", "attach"]

WIDE = ("num_beams", "num_return_sequences")  # options of `generate` that make several rows of one prompt


@dataclass
class Reply:
    """What was generated: new tokens, their text (if there is a tokenizer), the cache and the report of the prefill."""

    tokens: list[int]
    text: str
    cache: KVCache
    report: Report
    sequences: Tensor


def attach(
    model: PreTrainedModel,
    tokenizer: Any = None,
    recipe: Recipe | str = "full",
    *,
    store: Store | None = None,
    block: int = 256,
    coding: str = "raw",
    adapter: str = "",
    program: Program | None = None,
) -> Attached:
    """A model whose prompts are looked for in a store, and saved there.

    Args:
        tokenizer: needed for prompts that are text.
        recipe: how caches hold slots; chunks of one recipe never serve another.
        store: without it, memory over files in the user's cache folder, written to in the background.
        block: tokens of a chunk.
        coding: how chunks are packed: "raw", "zstd" or "rans", all exact. Chunks in any of them are read.
        adapter: says what was done to the model, where weights, buffers and PEFT's layers do not show it.
        program: uses documents that are no prefix. What it makes is given to `generate`, but never stored as exact.

    Raises StoreError for a model that cannot be served: sliding windows, frequencies that vary with the text's length.
    """
    return Attached(model, tokenizer, recipe, store, block, coding, adapter, program)


class Attached:
    """See `attach`. `mode`: "rows", "blocks" or "whole", by the recipe."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        recipe: Recipe | str,
        store: Store | None,
        block: int,
        coding: str,
        adapter: str,
        program: Program | None,
    ) -> None:
        if coding not in CODINGS:
            raise StoreError(
                f"{unknown('coding', coding, CODINGS)} A lossy one changes what is computed behind it: use it with Store.put and get."
            )
        self.coding = coding
        self.model, self.tokenizer, self.block, self.adapter, self.program = model, tokenizer, block, adapter, program
        self.recipe = parse(recipe) if isinstance(recipe, str) else recipe
        Identity.of(model, tokenizer, self.recipe, adapter=adapter, block=block)  # refuses what cannot be served
        ready = KVCache(model, self.recipe).recipe
        self.mode: Literal["rows", "blocks", "whole"] = (
            "rows" if rowwise(ready) else "blocks" if blockwise(ready) else "whole"
        )
        self._own = store is None
        self.store = Store.open(write="back", queue=256) if store is None else store
        self.radix, self.reader = Radix(), snapshot.Reader(self.store)

    def identity(self, tenant: str = "") -> Identity:
        """Of the model as it is now."""
        return Identity.of(
            self.model, self.tokenizer, self.recipe, adapter=self.adapter, tenant=tenant, block=self.block
        )

    def session(self, tenant: str = "") -> Session:
        """Prompts of one tenant, one after another. `tenant`: a secret; other tenants can't find what it stored."""
        return Session(self, tenant)

    def close(self) -> None:
        """Ends background work; closes the store if it was opened here."""
        self.reader.close()
        if self._own:
            self.store.close()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Session:
    """Not to be used by several threads at once. `cache` and `tokens`: of the last prompt and answer."""

    def __init__(self, attached: Attached, tenant: str = "") -> None:
        self.attached, self.tenant = attached, tenant
        self.cache: KVCache | None = None
        self.tokens: list[int] = []
        self._filler = Filler(attached, tenant)
        self._mixed = False

    def prefill(self, prompt: Prompt, *, deadline: float | None = None) -> tuple[KVCache, Report]:
        """A cache that holds the prompt but for its last part, ready for `model.generate(ids, past_key_values=cache)`.

        `prompt`: text, token ids, a Document, or a list of such parts. `deadline`: seconds after which nothing is loaded
        any more. Tiers that fail cost time only. Raises StoreError for a prompt that cannot be read.
        """
        tokens, spans = read_prompt(prompt, self.attached.tokenizer)
        if not tokens:
            raise StoreError("the prompt is empty; give at least one token.")
        mode, block = self.attached.mode, self.attached.block
        target = (len(tokens) - 1) // block * block if mode == "blocks" else len(tokens) - 1
        self.cache, report = self._filler.fill(tokens, target, spans, deadline)
        self.tokens, self._mixed = tokens, report.mixed
        return self.cache, report

    @torch.no_grad()
    def generate(self, prompt: Prompt, *, keep: bool = False, deadline: float | None = None, **options: Any) -> Reply:
        """`prefill`, then `model.generate` with those options; `keep`: see there."""
        cache, report = self.prefill(prompt, deadline=deadline)
        tokens, model = self.tokens, self.attached.model
        ids = torch.tensor([tokens], device=model.device)
        rows = max(options.get(name) or getattr(model.generation_config, name, None) or 1 for name in WIDE)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        sequences = found if isinstance(found, Tensor) else found.sequences
        new = sequences[0, len(tokens) :].tolist()
        self.tokens = tokens + new
        if keep:
            self.keep()
        elif self.attached.mode == "rows" and not self._mixed and len(next(cache.managed()).rows) == 1:
            self._filler.keep(cache, tokens)  # the block that the prompt's last token completed
        tokenizer = self.attached.tokenizer
        text = "" if tokenizer is None else str(tokenizer.decode(new, skip_special_tokens=True))
        return Reply(new, text, cache, report, sequences)

    def keep(self) -> int:
        """Stores the chunks that the last answer completed, so that the next turn begins with them. Bytes stored.

        A recipe that encodes reads the answer once more, in blocks, as a prompt would be. One whose caches serve one prompt
        only stores nothing, nor does a prompt that a program filled. Raises StoreError for several answers at once.
        """
        cache, mode = self.cache, self.attached.mode
        if cache is None or mode == "whole" or self._mixed:
            return 0
        rows = next(cache.managed()).rows
        if len(rows) > 1:
            raise StoreError(f"the cache holds {len(rows)} sequences; keep() stores the turn of exactly one.")
        done = min(cache.get_seq_length(), len(self.tokens)) // self.attached.block * self.attached.block
        if mode == "blocks":
            return self._filler.fill(self.tokens[:done], done)[1].saved_bytes if done else 0
        return self._filler.keep(cache, self.tokens[:done])
