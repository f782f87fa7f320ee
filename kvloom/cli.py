"""The command line: `kvloom demo`, `compare`, `generate`, `recipes`, `check`, `doctor`, `calibrate`, `inspect`, `bench`, `store`, `load`, `serve`, `batch`.

Results go to stdout (tables, or JSON with --json), progress and errors to stderr. An error of kvloom ends with code 2.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich import box
from rich.console import Console
from rich.table import Table

from kvloom.bench.commands_coding import app as bench
from kvloom.core.registry import Registry
from kvloom.engine.batch_command import batch
from kvloom.engine.commands import serve
from kvloom.engine.load.commands import app as load
from kvloom.errors import KvloomError, StoreError
from kvloom.lab.calibrate import calibrate
from kvloom.lab.commands import app as lab
from kvloom.lab.inspect.commands import inspect
from kvloom.lab.terminal import Json, print_json, progress, read_text
from kvloom.plan.commands import plan


def _store() -> App:
    """`kvloom store`, or, where its libraries are not installed, one that says so."""
    try:
        from kvloom.store.commands import app as found
    except StoreError as error:
        why = str(error)
        found = App(name="store", help=f"Look at what a store holds. {why}")

        @found.default
        def missing(*_: str) -> None:
            raise StoreError(why)

    return found


HELP = """Compress the key-value cache of a language model with published methods, and see what it costs.

A RECIPE is a name with options, such as "snapkv(budget=1024)"; two compose with a bar: "snapkv | kivi(bits=4)".
A MODEL is a local folder, a hub id, or "nano", the small model that comes with kvloom.

Start with: kvloom demo
"""
app = App(name="kvloom", help=HELP, version_flags=["--version"])
app.command(bench)
app.command(plan)
app.command(inspect)
app.command(calibrate)
app.command(lab)
app.command(_store())
app.command(load)
app.command(serve)
app.command(batch)
Limit = Annotated[int, Parameter(help="Tokens of one answer, at most.")]
Page = Annotated[Path | None, Parameter(help="Write the result as a self-contained HTML page to this file.")]


def _prepare(model: str) -> tuple[Any, Any]:
    import transformers

    from kvloom.lab.measure import load_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return load_model(model)


def _show(rows: Sequence[Any], model: str, out: Path | None, as_json: bool, title: str) -> None:
    from kvloom.lab import page

    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page.html(rows, model, title), encoding="utf-8")
    if as_json:
        about = {"model": model, "page": None if out is None else str(out), "versions": page.versions()}
        print_json(about | {"recipes": [row.to_dict() for row in rows]})
        return
    console = Console()
    # In 80 columns numbers stay whole, heads and names wrap, and the room for growth is left out.
    table = Table(title=f"{model}, {rows[0].tokens:,} tokens of prompt", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    cells = [page.cells(row) for row in rows]
    shown = [i for i, head in enumerate(page.HEADS) if console.width >= 100 or head != "with room"]
    for i in shown:
        width = max(len(row[i]) for row in cells)
        head = page.HEADS[i].replace(" ", "\n")
        table.add_column(head, justify="right" if i else "left", overflow="fold", min_width=width if i else 18)
    for row in cells:
        table.add_row(*(row[i] for i in shown))
    console.print(table)
    for row in rows:
        console.print(f"[bold]{row.recipe}[/bold]", highlight=False)
        for a in row.answers:
            mark = {True: "[green]right[/green]", False: "[red]wrong[/red]", None: ""}[a.right]
            console.print(f"  {a.question} ", end="", markup=False, highlight=False)
            console.print(f"{a.got or '(nothing)'} ", end="", markup=False, highlight=False)
            console.print(mark)
    if out is not None:
        console.print(f"Page: {out}", highlight=False)


@app.command
def demo(*, out: Path = Path("demo.html"), tokens: int = 4000, seed: int = 0, json: Json = False) -> None:
    """Eight recipes on one document, with the bundled model: bytes, times, answers, damage.

    Facts are hidden in pages of a book. Two questions stand in the prompt; two come later, when the cache is
    already compressed, which is where methods that drop tokens fail. Takes a few minutes at most and needs no network.

    Args:
        out: The HTML page to write.
        tokens: Length of the document.
        seed: Another number gives another document and other facts.
    """
    from kvloom.lab.demo import RECIPES, demo_task
    from kvloom.lab.measure import compare as run

    model, tokenizer = _prepare("nano")
    task = demo_task(tokenizer, tokens, seed)
    with progress(len(RECIPES)) as tell:
        rows = run(model, tokenizer, RECIPES, task, tell=tell)
    _show(rows, "nano", out, json, "kvloom demo: facts in a book")


@app.command
def compare(
    model: str,
    *,
    cache: list[str],
    document: Path,
    question: list[str],
    answer: list[str] | None = None,
    max_new_tokens: Limit = 48,
    continuation: int = 64,
    out: Page = None,
    json: Json = False,
) -> None:
    """Recipes on your own model, document and questions, against the full cache.

    The first question is asked with the document, the others as later turns on the same cache. The last tokens of
    the document are held back and read token by token to compare predictions (KL, same top token).

    Example: kvloom compare nano --cache "h2o(budget=256)" --document book.txt --question "Who?" --answer Anna

    Args:
        model: Folder, hub id or "nano".
        cache: A recipe; give it once per recipe.
        document: A text file.
        question: A question; give it once per question.
        answer: The right answer of each question, in the same order; without it nothing is marked.
        continuation: Tokens held back from the document's end.
    """
    from kvloom import parse
    from kvloom.lab.measure import Question, Task
    from kvloom.lab.measure import compare as run

    for recipe in cache:
        parse(recipe)  # before a model is loaded
    text = read_text(document, "--document")
    if answer is not None and len(answer) != len(question):
        raise KvloomError(
            f"--answer was given {len(answer)} times for {len(question)} questions; give one each, or none."
        )
    network, tokenizer = _prepare(model)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not 1 <= continuation < len(ids):
        raise KvloomError(
            f"--continuation {continuation} must be at least 1 and less than the document's {len(ids)} tokens."
        )
    asks = [Question(q, answer[i] if answer else None) for i, q in enumerate(question)]
    task = Task(
        document=tokenizer.decode(ids[:-continuation]),
        first=tuple(asks[:1]),
        later=tuple(asks[1:]),
        continuation=tokenizer.decode(ids[-continuation:]),
    )
    with progress(len({"full", *cache})) as tell:
        rows = run(network, tokenizer, cache, task, max_new_tokens, tell)
    _show(rows, model, out, json, f"kvloom compare: {document.name}")


@app.command
def generate(
    model: str,
    *,
    cache: str = "full",
    prompt: str | None = None,
    prompt_file: Path | None = None,
    max_new_tokens: Limit = 64,
    json: Json = False,
) -> None:
    """One greedy answer with a recipe. The answer goes to stdout, the size of the cache to stderr.

    Example: kvloom generate nano --cache "snapkv(budget=256)" --prompt-file book.txt

    Args:
        model: Folder, hub id or "nano".
        cache: The recipe.
        prompt: The prompt; the model's chat template is put around it.
        prompt_file: A file with the prompt instead.
    """
    from kvloom import KVCache, parse
    from kvloom.lab.chat import encode, first_turn

    if (prompt is None) == (prompt_file is None):
        raise KvloomError("give either --prompt TEXT or --prompt-file FILE.")
    parse(cache)  # before a model is loaded
    text = prompt if prompt_file is None else read_text(prompt_file, "--prompt-file")
    network, tokenizer = _prepare(model)
    held = KVCache(network, cache)
    ids = encode(tokenizer, first_turn(tokenizer, text or "")).to(network.device)
    options = {"attention_mask": ids.new_ones(ids.shape), "do_sample": False, "max_new_tokens": max_new_tokens}
    out = network.generate(ids, past_key_values=held, **options)
    answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    if json:
        report = held.report().to_dict()
        print_json({"model": model, "prompt_tokens": ids.shape[1], "answer": answer, "cache": report})
        return
    print(answer)
    Console(stderr=True).print(str(held.report()), highlight=False, markup=False, style="dim")


@app.command
def recipes(name: str | None = None, *, json: Json = False) -> None:
    """All recipes, or the card of one: what its paper claims, what differs here, its options and bytes.

    Args:
        name: A recipe's name.
    """
    from kvloom.core import registry

    _cards(registry.RECIPES, name, json)


@app.command
def methods(name: str | None = None, *, json: Json = False) -> None:
    """All methods that reuse text wherever it stands (docs/reuse.md), or the card of one.

    Args:
        name: A method's name.
    """
    from kvloom.programs.cards import everything

    _cards(everything(), name, json)


def _cards(found: Registry[Any], name: str | None, as_json: bool) -> None:
    if name is not None:
        card = found.find(name)[1]
        print_json(_card(card)) if as_json else print(card.text())
        return
    cards = found.cards()
    if as_json:
        print_json({key: _card(card) for key, card in cards.items()})
        return
    table = Table("name", "year", "idea", "options")
    for key, card in cards.items():
        options = ", ".join(f"{o.name}={o.default!r}" for o in card.options)
        table.add_row(key, str(card.year), card.idea, options)
    Console().print(table)


def _card(card: Any) -> dict[str, Any]:
    return dataclasses.asdict(card)


@app.command
def check(model: str, *, cache: list[str] | None = None, json: Json = False) -> None:
    """Whether a model works with recipes: five ways of running, each against the stock cache.

    exact: same tokens, logits equal up to rounding. lossy: it runs and differs, as a method that drops or rounds
    should (with the largest error of a logit). refused: kvloom says why it won't. Code 1 if "full" is not exact.

    Args:
        model: Folder, hub id or "nano".
        cache: A recipe; give it once per recipe. Without it: all of them, with their default options.
    """
    from kvloom.core import registry
    from kvloom.lab.check import MODES
    from kvloom.lab.check import check as run

    chosen = cache or list(registry.recipes())
    for recipe in chosen:
        registry.parse(recipe)
    network, _ = _prepare(model)
    with progress(len(chosen) * len(MODES)) as tell:
        verdicts = run(network, chosen, tell)
    if json:
        print_json([v.to_dict() for v in verdicts])
    else:
        table = Table("recipe", "way", "result", "logit error", "")
        color = {"exact": "green", "lossy": "yellow", "refused": "red"}
        for v in verdicts:
            error = "" if v.error is None else f"{v.error:.2g}"
            table.add_row(v.recipe, v.mode, f"[{color[v.result]}]{v.result}[/]", error, v.detail)
        Console().print(table)
    if any(v.recipe == "full" and v.result != "exact" for v in verdicts):
        sys.exit(1)


@app.command
def doctor(
    *,
    measure: Annotated[bool, Parameter(negative="")] = False,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    json: Json = False,
) -> None:
    """What kvloom found on this machine: versions, threads, and which attention kernels run.

    KVLOOM_KERNELS=torch switches kernels off, those for GPUs too; KVLOOM_ISA=portable, avx2, avx512, avx512vnni or
    avx512bf16 picks an instruction set. KVLOOM_DOT=float multiplies packed codes of few bits by floats, not by 8-bit
    integers.
    KVLOOM_KERNELS=triton with TRITON_INTERPRET=1 is for tests: the GPU's kernels on the CPU, interpreted.

    Example: kvloom doctor --measure, then kvloom plan nano --hardware cpu

    Args:
        measure: Measure this CPU for `kvloom plan`: bandwidths, arithmetic, decode attention by codec. Under a minute.
        output: The file for what was measured (JSON). Without it: where `kvloom plan --hardware cpu` looks.
    """
    from kvloom.plan.commands import measured

    if output is not None and not measure:
        raise KvloomError(f"--output {str(output)!r} is for what --measure finds. Give both, or neither.")
    if measure:
        measured(output, json)
        return
    import platform

    import torch
    import transformers

    from kvloom import __version__
    from kvloom.kernels import gpu, native

    found = {
        "kvloom": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "machine": platform.machine(), "threads": torch.get_num_threads(),
        "instruction sets": torch.backends.cpu.get_cpu_capability(), "kernels": native.ISA or "torch",
        "why": native.WHY, "packed codes times": f"{native.DOT}, up to {native.WHOLE_BITS} bits" if native.DOT == "int8" else native.DOT, **gpu.found(),
    }  # fmt: skip
    if json:
        print_json(found)
        return
    table = Table("", "found", show_header=False)
    for name, value in found.items():
        table.add_row(name, str(value))
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. An error of kvloom is one red line on stderr and exit code 2."""
    try:
        app(None if arguments is None else list(arguments), result_action="return_value")
    except KvloomError as error:
        line = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(f"error: {line}", style="red", markup=False, highlight=False)
        sys.exit(2)
