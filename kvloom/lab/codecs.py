"""One table for all recipes that store numbers in fewer bits: bits, damage, recall and time, at the papers' settings."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom import KVCache, parse
from kvloom.core.profile import default_path
from kvloom.core.registry import recipes
from kvloom.core.view import fingerprint, text_config
from kvloom.errors import KvloomError, ProfileError, RecipeError
from kvloom.lab import session
from kvloom.lab.chat import encode
from kvloom.lab.measure import load_model
from kvloom.lab.tasks import Kit, find

__all__ = ["MODELS", "Line", "Lines", "codecs", "go", "markdown"]

MODELS = ("nano", "nano+outliers")
SETTINGS = {"length": 1024, "texts": 4, "facts": 4}  # tokens of a prompt, how many texts, how many examples of facts
HEAD = """\
# Codecs beside one another

Every recipe that stores numbers in fewer bits, at its paper's operating points, on the bundled model as it is and with
planted outlier channels (the same model to the last bit, but a few channels of its keys are 8 to 32 times as large; [lab.md](lab.md)).
Made by

```bash
{command}
```

- **bits**: of each stored number, with scales, codebooks, outliers and indices, in what is encoded after a prompt of {length:,} tokens.
- **cache**: bits of all that the cache holds then, its exact tail (32-bit here) and constants such as profiles too, for each number of the text.
- **KL**, **top-1**: nats per token from the full cache's predictions, and how often the likeliest token is the same, over {texts} texts of
  {length:,} tokens, each followed by 64 tokens read one by one. **PPL**: change of the perplexity of these tokens.
- **recall**: planted facts found, of {asked}; a third of them is asked in the prompt, the others in later turns.
- **ms**: processor time of one decoded token behind these prompts, one thread.

"""


@dataclass(frozen=True)
class Line:
    """One recipe on one model. `kl` in nats per token, `perplexity` as a factor on the full cache's, `error`: why it did not run."""

    model: str
    fingerprint: str
    recipe: str
    bits: float = 0.0
    cache_bits: float = 0.0
    kl: float = 0.0
    top1: float = 0.0
    perplexity: float = 1.0
    right: int = 0
    asked: int = 0
    ms: float = 0.0
    error: str = ""


def codecs() -> list[str]:
    """Every registered recipe that encodes, at its operating points, oldest first."""
    found: list[str] = []
    config = text_config(_loaded("nano").model)
    for name, card in sorted(recipes().items(), key=lambda item: (item[1].year, item[1].arxiv)):
        try:
            outline = parse(name).sketched(config)
        except RecipeError:
            outline = parse(name)
        if not all(kind.exact for kind in outline.kinds.values()):
            found += card.recipes
    return found


@dataclass
class _Loaded:
    """A model with its texts: ids [1, length] and what follows them, and examples of facts."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    kit: Kit

    @functools.cached_property
    def texts(self) -> list[tuple[Tensor, list[int]]]:
        examples = find("text/bits").examples(self.kit, SETTINGS["length"], SETTINGS["texts"])
        return [
            (
                encode(self.tokenizer, x.parts(self.tokenizer)[0]),
                encode(self.tokenizer, x.turns[0].answers[0])[0].tolist(),
            )
            for x in examples
        ]

    @functools.cached_property
    def facts(self) -> list[Any]:
        return list(find("recall/single").examples(self.kit, SETTINGS["length"], SETTINGS["facts"]))

    @functools.cached_property
    def full(self) -> Tensor:
        """Log probabilities of the full cache over all texts."""
        return self.read("full")[0]

    @torch.inference_mode()
    def read(self, recipe: str) -> tuple[Tensor, float, tuple[float, float]]:
        """Log probabilities [n, V] behind the prompts and after each token but the last, ms of a token, bits of a number."""
        rows, spent, bits = [], [], (0.0, 0.0)
        for ids, after in self.texts:
            held = session.Session(self.model, self.tokenizer, recipe)
            logits = [held.read(held.cache, ids)]
            bits = _bits(held.cache)
            clock = time.process_time()
            logits += [held.step(held.cache, token) for token in after[:-1]]
            spent.append((time.process_time() - clock) / (len(after) - 1))
            rows.append(torch.stack(logits).float().log_softmax(-1))
        return torch.cat(rows), 1000 * min(spent), bits

    def measure(self, recipe: str) -> Line:
        """All figures of one recipe."""
        line = functools.partial(Line, self.name, fingerprint(self.model), recipe)
        try:
            mine, ms, (bits, cache_bits) = self.read(recipe)
            replies = [
                reply
                for example in self.facts
                for reply in session.run(self.model, self.tokenizer, parse(recipe), example)[0].replies
            ]
        except KvloomError as error:
            return line(error=str(error))
        truth = torch.tensor([token for _, after in self.texts for token in after])[:, None]
        lost = float((self.full.gather(1, truth) - mine.gather(1, truth)).mean())
        return line(
            bits=bits,
            cache_bits=cache_bits,
            kl=max(0.0, float((self.full.exp() * (self.full - mine)).sum(-1).mean())),
            top1=float((self.full.argmax(-1) == mine.argmax(-1)).float().mean()),
            perplexity=math.exp(lost),
            right=sum(reply.score == 1 for reply in replies),
            asked=len(replies),
            ms=ms,
        )

    def profile(self, recipe: str, tell: Callable[[str], None]) -> None:
        """Makes the profile that a recipe lacks for this model."""
        made = parse(recipe)
        try:
            made.ready(self.model)
        except ProfileError:
            if made.calibrate is None:
                raise
            ids = torch.tensor(self.tokenizer.encode(self.kit.text, add_special_tokens=False, verbose=False))
            path = default_path(self.model, recipe.partition("(")[0])
            made.calibrate(self.model, ids, path, lambda text: tell(f"profile of {recipe}: {text}"))
        except KvloomError:
            return  # it will say so in its line


@functools.cache
def _loaded(name: str) -> _Loaded:
    model, tokenizer = load_model(name)
    return _Loaded(name, model, tokenizer, Kit(tokenizer))


def _bits(cache: KVCache) -> tuple[float, float]:
    """Bits of each number in what is encoded, and bits of the whole cache for each number of the text."""
    report = cache.report()
    used = sum(e.nbytes for e in report.entries if e.segment != "stock")
    exact = sum(e.nbytes for e in report.entries if e.field == "exact")
    besides = sum(
        e.nbytes for e in report.entries if e.plane in ("constant", "column", "state") or e.segment == "heads"
    )
    encoded = numbers = 0
    for layer in cache.managed():
        site = layer.site
        numbers += cache.get_seq_length() * site.kv_heads * (site.key_dim + site.value_dim)
        for group in layer.rows[0].layer.groups:
            heads = site.kv_heads if group.heads is None else len(group.heads)
            for segment in group:
                for plane, dim in ((segment.key, site.key_dim), (segment.value, site.value_dim)):
                    encoded += heads * dim * sum(run.n for run in plane.runs if not run.codec.exact)
    return 8 * (used - exact - besides) / max(1, encoded), 8 * used / numbers


class Lines:
    """Lines in a file, one JSON object each: what stands there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):  # its process died while writing
            path.write_text(text := text[: text.rfind("\n") + 1], encoding="utf-8")
        rows = text.splitlines()
        kept = map(json.loads, rows)
        self.found = {(x["fingerprint"], x["recipe"]): Line(**x) for x in kept if not x["error"]}

    def add(self, line: Line) -> None:
        """Appends one."""
        self.found[line.fingerprint, line.recipe] = line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")


def _work(model: str, recipe: str) -> Line:
    torch.set_num_threads(1)
    return _loaded(model).measure(recipe)


def go(
    models: Sequence[str], wanted: Sequence[str], path: Path, workers: int, tell: Callable[[str], None]
) -> list[Line]:
    """Measures what the file lacks, in so many processes of one thread each, and gives the lines in order."""
    lines, keys = Lines(path), []
    for model in models:
        keys += [(model, fingerprint(_loaded(model).model), recipe) for recipe in ["full", *wanted]]
    missing = [(model, recipe) for model, mark, recipe in keys if (mark, recipe) not in lines.found]
    for model, recipe in missing:
        _loaded(model).profile(recipe, tell)
    if workers == 1:
        for model, recipe in missing:
            tell(f"{model}: {recipe}")
            lines.add(_loaded(model).measure(recipe))
    elif missing:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            jobs = [(model, recipe, pool.submit(_work, model, recipe)) for model, recipe in missing]
            for model, recipe, job in jobs:
                tell(f"{model}: {recipe}")
                lines.add(job.result())
    return [lines.found[mark, recipe] for _, mark, recipe in keys]


def cells(line: Line | None) -> list[str]:
    """What a table shows of one recipe on one model."""
    if line is None or line.error:
        return ["", "", "", ""]
    change = 100 * (line.perplexity - 1)
    return [f"{line.kl:.3f}", f"{100 * line.top1:.0f} %", f"{change:+.1f} %", f"{line.right}/{line.asked}"]


def table(lines: Sequence[Line]) -> list[list[str]]:
    """Rows of cells, the heads first: bits, then the figures of each model, then time."""
    models = list(dict.fromkeys(line.model for line in lines))
    rows = [
        [
            "recipe",
            "bits",
            "cache",
            *(f"{x}{mark}" for mark in ("", "*")[: len(models)] for x in ("KL", "top-1", "PPL", "recall")),
            "ms",
        ]
    ]
    for recipe in dict.fromkeys(line.recipe for line in lines):
        mine = {line.model: line for line in lines if line.recipe == recipe}
        first = next((line for line in mine.values() if not line.error), None)
        shown = [f"`{recipe}`", "", ""]
        if first is not None:
            shown[1:] = [f"{first.bits:.2f}" if first.bits else "", f"{first.cache_bits:.2f}"]
        rows.append(
            [*shown, *(x for model in models for x in cells(mine.get(model))), f"{first.ms:.1f}" if first else ""]
        )
    return rows


def markdown(lines: Sequence[Line], command: str) -> str:
    """The page."""
    heads, *rows = table(lines)
    models = list(dict.fromkeys(line.model for line in lines))
    page = HEAD.format(command=command, asked=max((line.asked for line in lines), default=0), **SETTINGS)
    if len(models) > 1:
        page += f"Columns with a star are those of `{models[1]}`; bits and times those of `{models[0]}`.\n\n"
    marks = ["---", *["---:"] * (len(heads) - 1)]
    page += (
        "\n".join(f"| {' | '.join(x.replace('|', chr(92) + '|') for x in row)} |" for row in (heads, marks, *rows))
        + "\n"
    )
    errors = dict.fromkeys(f"- `{line.recipe}` on `{line.model}`: {line.error}" for line in lines if line.error)
    return page + ("\nNot run:\n\n" + "\n".join(errors) + "\n" if errors else "")
