"""One table for all recipes that choose or merge tokens: what is recalled when the question comes early, late, or second."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from kvloom import KVCache, parse
from kvloom.core.card import Card
from kvloom.core.registry import recipes
from kvloom.core.view import text_config
from kvloom.errors import KvloomError, RecipeError
from kvloom.lab.measure import load_model
from kvloom.lab.records import Record, Results
from kvloom.lab.session import MODES
from kvloom.lab.suites import Suite
from kvloom.lab.workers import Order
from kvloom.lab.workers import go as share_out

__all__ = ["FORMS", "KINDS", "RATIOS", "Line", "go", "lines", "markdown", "recipes_at", "table"]

RATIOS = (0.2, 0.05)
FORMS = {
    "look-m": "look-m(text_first=False)",
    "zipvl": "zipvl(bits=None, low_bits=None)",
}  # recipes that would drop no text
KINDS = ("needle", "multi-key", "multi-value")  # in the order of the task `selection`
HEAD = """\
# Choosing and merging tokens

Every recipe that keeps fewer tokens, at the same share of the prompt, on the bundled model and {length:,} tokens of a book. Made by

```bash
{command}
```

One prompt holds three kinds of planted facts: a **needle** that stands alone, eight keys with one value of which one is asked
(**multi-key**), and a key whose three values are asked at once (**multi-value**). {examples} prompts; figures are answers that are right, in %.

- **in the window**: the question stands at the end of the prompt, before anything is given up. This is how papers mostly measure, and
  it flatters methods that look at the end of the prompt. A third of the prompts asks for each kind.
- **only after**: the context alone is read and compressed; every question then starts from a copy of that cache. The next three columns are its kinds.
- **second**: another kind is asked behind the first question and its right answer, then the third, in the cache that the first one left.
- **KL**, **top-1**: nats per token from the full cache's predictions over 64 tokens behind {length:,} tokens of plain text, and how often the
  likeliest token is the same. **MiB**: what the cache holds after the prompt.

Recipes without a budget, whose text, heads or gates decide how much stays, stand in a table of their own, at their usual options.

Intervals are wide: with {examples} answers, 50 % is known to about 20 points. The full cache's own row is the most that can be reached.

"""


@dataclass(frozen=True)
class Line:
    """One recipe. `early`: the question in the prompt; `late`: only after compression, by kind; `second`: later turns."""

    recipe: str
    mib: float | None
    early: float | None
    late: tuple[float | None, ...]
    second: float | None
    kl: float | None
    top1: float | None
    prompts: int
    error: str


def recipes_at(
    model: str, ratios: Sequence[float], names: Sequence[str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Every recipe that keeps fewer tokens, oldest first, at these budgets, then, once, those that have none; and why some can't run
    on this model.
    """
    network, _ = load_model(model)
    cards = recipes()
    if names is None:
        by_age = sorted(cards, key=lambda name: (cards[name].year, cards[name].arxiv))
        names = [form for form in (FORMS.get(name, name) for name in by_age) if _chooses(form, network)]
    free = [name for name in names if _plain(name) in cards and not _budgeted(cards[_plain(name)])]
    wanted = [_at(name, ratio) for ratio in ratios for name in names if name not in free] + free
    found, refused = [], {}
    for recipe in wanted:
        try:
            KVCache(network, recipe)
            found.append(recipe)
        except KvloomError as error:
            refused[recipe] = str(error)
    return found, refused


def _budgeted(card: Card) -> bool:
    return "budget" in {option.name for option in card.options}


def _plain(recipe: str) -> str:
    return recipe.partition("(")[0].replace("_", "-")


def _at(recipe: str, ratio: float) -> str:
    return f"{recipe[:-1]}, budget={ratio})" if recipe.endswith(")") else f"{recipe}(budget={ratio})"


def _without(recipe: str, ratio: float) -> str:
    """The inverse."""
    return recipe.replace(f"(budget={ratio})", "").replace(f", budget={ratio})", ")")


def _chooses(name: str, model: object) -> bool:
    """Whether a recipe gives up or merges tokens and stores what is left exactly."""
    try:
        outline = parse(name).sketched(text_config(model))
    except RecipeError:
        outline = parse(name)
    return bool(outline.policy) and all(kind.exact for kind in outline.kinds.values())


def go(
    model: str,
    chosen: Sequence[str],
    examples: int,
    length: int,
    workers: int,
    results: Results,
    tell: Callable[[str], None],
) -> None:
    """Runs what the results lack."""
    names = list(dict.fromkeys(["full", *chosen]))
    for task, modes in (("selection", MODES), ("text/fidelity", MODES[:1])):
        suite = Suite(task, "", (task,), (length,), examples, modes)
        order = Order(model, names, suite, 0, "", whole=True)
        job = order.load()
        if job.left(results):
            share_out(order, workers, results, tell) if workers > 1 else job.go(results, tell)


def lines(records: Sequence[Record]) -> list[Line]:
    """A line for each recipe, in the order in which they ran."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[record.recipe].append(record)
    return [_line(recipe, mine) for recipe, mine in found.items()]


def _line(recipe: str, records: list[Record]) -> Line:
    good = [r for r in records if not r.error]
    turns = [r for r in good if r.task == "selection" and r.mode == "multi-turn"]
    alone = [r for r in good if r.task == "selection" and r.mode == "multi-request"]
    kinds: list[list[float]] = [[], [], []]
    for r in alone:
        for at, score in enumerate(r.scores):
            kinds[(int(r.about["first"]) + at) % 3].append(score)
    near = [r.fidelity for r in good if r.fidelity]
    plain = recipe == "full" and any(r.task == "text/fidelity" for r in good)
    return Line(
        recipe,
        _mean([r.used / 2**20 for r in turns]),
        _mean([r.scores[0] for r in turns]),
        tuple(_mean(scores) for scores in kinds),
        _mean([score for r in turns for score in r.scores[1:]]),
        0.0 if plain else _mean([x["kl"] for x in near]),
        1.0 if plain else _mean([x["top1"] for x in near]),
        len(turns),
        next((r.error for r in records if r.error), ""),
    )


def _mean(x: Sequence[float]) -> float | None:
    return fmean(x) if x else None


def table(found: Sequence[Line]) -> list[list[str]]:
    """Rows of cells, the heads first."""

    def cell(x: float | None, form: str, factor: float = 1.0) -> str:
        return "" if x is None else form.format(factor * x)

    rows = [["recipe", "MiB", "in the window", "only after", *KINDS, "second", "KL", "top-1"]]
    for line in found:
        known = [x for x in line.late if x is not None]
        recall = [line.early, _mean(known), *line.late, line.second]
        rows.append(
            [
                f"`{line.recipe}`",
                cell(line.mib, "{:.2f}"),
                *(cell(x, "{:.0f}", 100) for x in recall),
                cell(line.kl, "{:.3f}"),
                cell(line.top1, "{:.0f} %", 100),
            ]
        )
    return rows


def markdown(records: Sequence[Record], ratios: Sequence[float], command: str, refused: dict[str, str]) -> str:
    """The page: a table for each budget, best KL first."""
    found = lines(records)
    full = [line for line in found if line.recipe == "full"]
    lengths = {r.length for r in records}
    page = HEAD.format(
        command=command, examples=max((x.prompts for x in found), default=0), length=max(lengths, default=0)
    )
    parts = [
        (f"{100 * ratio:.3g} % of the tokens", {line.recipe: _without(line.recipe, ratio) for line in found})
        for ratio in ratios
    ]
    parts = [(title, {recipe: short for recipe, short in names.items() if short != recipe}) for title, names in parts]
    free = {line.recipe: line.recipe for line in found if "budget=" not in line.recipe and line not in full}
    for title, names in [*parts, *([("As many as they like", free)] if free else [])]:
        mine = [replace(line, recipe=names[line.recipe]) for line in found if line.recipe in names]
        mine.sort(key=lambda line: float("inf") if line.kl is None else line.kl)
        heads, *rows = table([*full, *mine])
        marks = ["---", *["---:"] * (len(heads) - 1)]
        page += f"## {title}\n\n"
        page += (
            "\n".join(f"| {' | '.join(x.replace('|', chr(92) + '|') for x in row)} |" for row in (heads, marks, *rows))
            + "\n\n"
        )
    errors = {line.recipe: line.error for line in found if line.error} | refused
    if errors:
        page += "Not run:\n\n" + "\n".join(f"- `{recipe}`: {error}" for recipe, error in errors.items()) + "\n"
    return page.rstrip() + "\n"
