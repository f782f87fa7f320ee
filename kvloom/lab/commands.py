"""The commands `kvloom lab run`, `report`, `harness`, `tasks` and `suites`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from kvloom.errors import KvloomError
from kvloom.lab.terminal import Json, print_json, progress, read_text

__all__ = ["app"]

HELP = """Measure recipes on tasks: quality against bytes, with intervals.

A run is a folder. Each finished example is a line in its results.jsonl; a run that was stopped goes on where it was when the
same command is given again. Recipes take turns at every example, so comparisons are paired.

Start with: kvloom lab run smoke --model nano
"""
app = App(name="lab", help=HELP)
Numbers = Annotated[list[int] | None, Parameter(consume_multiple=True, negative="")]
Words = Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")]


@app.command
def run(
    suite: str,
    *,
    model: Annotated[list[str] | None, Parameter(negative="")] = None,
    cache: Annotated[list[str] | None, Parameter(negative="")] = None,
    lengths: Numbers = None,
    examples: int | None = None,
    mode: Words = None,
    seed: int = 0,
    text: Path | None = None,
    workers: int = 1,
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Run a suite under recipes, and write results and a report into a folder.

    The full cache always runs too: everything is compared with it. Give the same command again to go on after a stop.

    Examples:
        kvloom lab run small --model nano --cache "snapkv(budget=256)" --cache "kivi(bits=2)"
        kvloom lab run "ruler/niah_*,needle" --model ./my-model --lengths 4096 8192 --examples 50
        kvloom lab run smoke --cache "my_method.py:my_recipe(budget=256)"

    Args:
        suite: A suite (`kvloom lab suites`), or tasks (`kvloom lab tasks`): names and patterns, with commas between.
        model: Folder, hub id or "nano"; give it once per model.
        cache: A recipe, also "FILE.py:FUNCTION(...)"; give it once per recipe. Without it: those of `kvloom demo`.
        lengths: Tokens of a prompt and its answer, instead of the suite's.
        examples: Examples of each task and length, instead of the suite's.
        mode: multi-turn (the question is seen before the cache is compressed), multi-request (it is not), or both.
        seed: Another number draws other examples.
        text: A text file to hide things in, instead of the book that comes with kvloom.
        workers: Processes that share the examples and torch's threads. Small models run faster so, but times then are those
            of a busy machine.
        out: The folder of the run. Default: lab/SUITE.
    """
    from kvloom.lab import custom, report
    from kvloom.lab.demo import RECIPES
    from kvloom.lab.records import Results, load
    from kvloom.lab.suites import choose
    from kvloom.lab.workers import Order, go

    chosen = choose(suite, lengths, examples, mode)
    recipes = list(dict.fromkeys(["full", *(cache or RECIPES)]))
    for recipe in recipes:
        custom.parse(recipe)
    if workers < 1:
        raise KvloomError(f"--workers {workers} must be at least 1.")
    book = "" if text is None else read_text(text, "--text")
    folder = out or Path("lab") / "".join(c if c.isalnum() or c in "-_" else "-" for c in suite)
    with Results(folder) as results:
        for name in model or ["nano"]:
            order = Order(name, recipes, chosen, seed, book, whole=bool(lengths))
            job = order.load()
            with progress(left := job.left(results), live=workers == 1) as tell:
                go(order, workers, results, tell) if workers > 1 and left else job.go(results, tell)
    records = load([folder])
    page = report.write(records, folder / "report.html", folder / "report.md")
    if json:
        print_json({"folder": str(folder), "report": str(page), **report.summary(records)})
        return
    report.show(records)
    Console().print(f"Results: {folder / 'results.jsonl'}\nReport:  {page}", highlight=False)


@app.command(name="report")
def report_(
    folders: Annotated[list[Path], Parameter(consume_multiple=True, negative="")],
    *,
    out: Path = Path("report.html"),
    markdown: Path | None = None,
    json: Json = False,
) -> None:
    """One page and one Markdown file from the results of one or more runs.

    Args:
        folders: Folders that `kvloom lab run` wrote.
        out: The HTML page to write; it needs no network and no other file.
        markdown: The Markdown file to write. Default: the page's name with .md.
    """
    from kvloom.lab import report
    from kvloom.lab.records import load

    records = load(folders)
    page = report.write(records, out, markdown or out.with_suffix(".md"))
    if json:
        print_json({"report": str(page), **report.summary(records)})
        return
    report.show(records)
    Console().print(f"Report: {page}", highlight=False)


@app.command
def harness(
    tasks: Annotated[list[str], Parameter(consume_multiple=True, negative="")],
    *,
    model: str = "nano",
    cache: Annotated[list[str] | None, Parameter(negative="")] = None,
    limit: float | None = None,
    fewshot: int | None = None,
    folder: Path | None = None,
    json: Json = False,
) -> None:
    """Run tasks of the lm-evaluation-harness under recipes, beside the full cache.

    A context is read once into each cache; every continuation is then read token by token behind the compressed cache.
    Needs `pip install "kvloom[harness]"`, and the harness' data sets: from the hub, or YAML files over files of your own.

    Example: kvloom lab harness arc_easy hellaswag --model ./my-model --cache "kivi(bits=2)" --limit 100

    Args:
        tasks: Names of tasks (`lm_eval ls tasks`).
        model: Folder, hub id or "nano".
        cache: A recipe; give it once per recipe.
        limit: Documents of each task; below 1: a share.
        fewshot: Examples in front of each question.
        folder: A folder with YAML files of your own tasks.
    """
    import importlib.util

    from kvloom.lab import custom
    from kvloom.lab.measure import load_model

    if importlib.util.find_spec("lm_eval") is None:
        raise KvloomError("`kvloom lab harness` needs the package lm-eval. Run: pip install 'kvloom[harness]'.")
    from kvloom.lab.harness import run as evaluate

    recipes = list(dict.fromkeys(["full", *(cache or [])]))
    for recipe in recipes:
        custom.parse(recipe)
    network, tokenizer = load_model(model)
    found = evaluate(network, tokenizer, recipes, tasks, limit, fewshot, folder)
    if json:
        print_json(found)
        return
    names = [(task, figure) for task, row in found["full"].items() for figure, x in row.items() if isinstance(x, float)]
    rows = [(*name, *(f"{found[r][name[0]].get(name[1], float('nan')):.4f}" for r in recipes)) for name in names]
    _table(("task", "figure", *recipes), rows)


@app.command
def codecs(
    *,
    model: Annotated[list[str] | None, Parameter(negative="")] = None,
    cache: Annotated[list[str] | None, Parameter(negative="")] = None,
    workers: int = 2,
    out: Path = Path("lab") / "codecs.jsonl",
    markdown: Path | None = None,
    json: Json = False,
) -> None:
    """One table of all recipes that store numbers in fewer bits, at their papers' operating points.

    True bits per number, KL and top-1 agreement with the full cache, change of perplexity, recall of planted facts and time of
    a decoded token. Profiles that a model lacks are made first. Give the same command again to go on after a stop.

    Args:
        model: Give it once per model. Without it: "nano" and "nano+outliers".
        cache: A recipe; give it once per recipe. Without it: all that encode.
        workers: Processes, each with one thread.
        out: The file of results; what stands there is not measured again.
        markdown: A page to write the table to, such as docs/codecs.md.
    """
    from kvloom.lab import codecs as table

    if workers < 1:
        raise KvloomError(f"--workers {workers} must be at least 1.")
    chosen, models = cache or table.codecs(), model or list(table.MODELS)
    with progress(len(models) * (len(chosen) + 1), live=False) as tell:
        lines = table.go(models, chosen, out, workers, tell)
    if markdown is not None:
        command = " ".join(["kvloom lab codecs", *(f'--cache "{x}"' for x in cache or []), f"--markdown {markdown}"])
        markdown.write_text(table.markdown(lines, command), encoding="utf-8")
    if json:
        print_json([asdict(line) for line in lines])
        return
    heads, *rows = table.table(lines)
    _table(heads, rows)


@app.command
def selection(
    *,
    model: str = "nano",
    cache: Annotated[list[str] | None, Parameter(negative="")] = None,
    ratios: Annotated[list[float] | None, Parameter(consume_multiple=True, negative="")] = None,
    examples: int = 20,
    length: int = 4096,
    workers: int = 2,
    out: Path = Path("lab") / "selection",
    markdown: Path | None = None,
    json: Json = False,
) -> None:
    """One table of all recipes that choose or merge tokens: recall when the question is seen early, late, or second; KL; bytes.

    Give the same command again to go on after a stop.

    Args:
        model: Folder, hub id or "nano".
        cache: A recipe without a budget; give it once per recipe. Without it: all that keep fewer tokens.
        ratios: Budgets, as shares of the prompt. Default: 0.2 0.05.
        examples: Prompts of each cell.
        length: Tokens of a prompt and its answers.
        workers: Processes that share the examples and torch's threads.
        out: The folder of the run.
        markdown: A page to write the tables to, such as docs/selection.md.
    """
    from kvloom.lab import selection as table
    from kvloom.lab.records import Results, load

    if workers < 1 or examples < 1:
        raise KvloomError(f"--workers {workers} and --examples {examples} must be at least 1.")
    shares = tuple(ratios or table.RATIOS)
    chosen, refused = table.recipes_at(model, shares, cache)
    with Results(out) as results, progress(0, live=False) as tell:
        table.go(model, chosen, examples, length, workers, results, tell)
    records = load([out])
    if markdown is not None:
        said = [f'--cache "{x}"' for x in cache or []]
        said += [f"--ratios {' '.join(map(str, ratios))}"] if ratios else []
        said += [
            f"--{name} {x}" for name, x, usual in (("examples", examples, 20), ("length", length, 4096)) if x != usual
        ]
        page = table.markdown(
            records, shares, " ".join(["kvloom lab selection", *said, f"--markdown {markdown}"]), refused
        )
        markdown.write_text(page, encoding="utf-8")
    if json:
        print_json([asdict(line) for line in table.lines(records)])
        return
    heads, *rows = table.table(table.lines(records))
    _table(heads, rows)


@app.command
def tasks(name: str | None = None, *, json: Json = False) -> None:
    """All tasks, or one of them with an example.

    Args:
        name: A task: a short example of it is printed.
    """
    from kvloom.lab.tasks import TASKS, find

    if name is not None:
        _example(find(name), json)
        return
    if json:
        print_json([{"task": t.name, "about": t.about, "data": t.path or None} for t in TASKS.values()])
        return
    _table(("task", "what it asks", "data"), [(t.name, t.about, t.path or "generated") for t in TASKS.values()])


def _example(task: Any, json: bool) -> None:
    from kvloom.lab.measure import load_model
    from kvloom.lab.tasks import Kit

    example = next(iter(task.examples(Kit(load_model("nano")[1]), 1024, 1)), None)
    if example is None:
        raise KvloomError(f"task {task.name!r} has no example.")
    if json:
        print_json(asdict(example))
        return
    text = example.context if len(example.context) < 1600 else f"{example.context[:800]} [...] {example.context[-800:]}"
    print(f"{task.name}: {task.about}\n\n{text}\n")
    for turn in example.turns:
        print(f"question: {turn.question}{turn.prefix}\nright:    {', '.join(turn.answers)}   ({turn.metric})")


@app.command
def suites(*, json: Json = False) -> None:
    """All suites: which tasks, at which lengths, how many examples."""
    from kvloom.lab.suites import SUITES

    if json:
        print_json([asdict(suite) for suite in SUITES.values()])
        return
    rows = [
        (s.name, s.about, " ".join(s.tasks), " ".join(map(str, s.lengths)), str(s.examples)) for s in SUITES.values()
    ]
    _table(("suite", "for", "tasks", "lengths", "examples"), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*heads)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
