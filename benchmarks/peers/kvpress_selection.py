"""kvpress 0.5.5 and kvloom on the same model, prompts and budgets: what each keeps, forgets, holds and costs.

    python benchmarks/peers/kvpress_selection.py [--env FOLDER] [--prompts 4] [--length 1024] [--ratio 0.2] [--json]

Makes an environment in FOLDER (a temporary one by default, reused if it is there) with kvpress==0.5.5 and what it requires,
among it an older transformers than kvloom's, so each side runs in a process of its own, one thread, one after the other. Needs a
package index, no GPU. The model is the bundled one.

A context with planted facts is read and compressed; then a question and its right answer are read token by token (KL against the
side's own full cache), and three questions are answered from copies of the cache (recall). Kept slots are found by their keys.
Bytes are those of every storage that the cache holds. Times are processor time: of reading the context, and of one decoded token.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
NANO = REPOSITORY / "kvloom" / "models" / "nano"
VERSION = "0.5.5"
# name -> (press, kvloom's recipe at the same settings); {n}: slots, the same number on both sides
METHODS = {
    "full": ("", "full"),
    "snapkv": ("SnapKVPress", "snapkv(budget={n}, window=64, kernel=5, pool='avg', interval=None)"),
    "h2o": ("ObservedAttentionPress", "h2o(budget={n}, window=0)"),
    "streamingllm": ("StreamingLLMPress", "streamingllm(budget={n}, sinks=4)"),
    "tova": ("TOVAPress", "tova(budget={n})"),
    "pyramidkv": ("PyramidKVPress", "pyramidkv(budget={n}, window=64, kernel=5, pool='avg', interval=None)"),
    "adakv": ("AdaKVPress", "adakv(budget={n}, window=64, kernel=5, pool='avg', interval=None)"),
    "keydiff": ("KeyDiffPress", "keydiff(budget={n})"),
    "expected-attention": ("ExpectedAttentionPress", "expected-attention(budget={n})"),
}
LIMIT = 40  # tokens of an answer


def make(folder: Path) -> Path:
    """The Python of an environment with kvpress."""
    python, marker = folder / "bin" / "python", folder / f"kvpress-{VERSION}"
    if not marker.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pins = str(REPOSITORY / "constraints" / "base.txt")
        subprocess.run([str(python), str(REPOSITORY / "scripts" / "install_torch.py"), pins], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", f"kvpress=={VERSION}"], check=True)
        marker.touch()
    return python


def prompts(count: int, length: int) -> list[dict[str, Any]]:
    """Contexts and questions as token ids, with what is needed to grade answers."""
    from kvloom.lab.measure import load_model
    from kvloom.lab.tasks import Kit, find

    tokenizer = load_model("nano")[1]

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    found = []
    for example in find("selection").examples(Kit(tokenizer), length, count):
        parts = [example.parts(tokenizer, i) for i in range(3)]
        asked = [{"ids": ids(tail), "right": ids(f" {turn.right}")} for (_, tail), turn in zip(parts, example.turns)]
        turns = [{"keys": turn.extra["keys"], "values": turn.extra["values"]} for turn in example.turns]
        found.append({"context": ids(parts[0][0]), "asked": asked, "turns": turns})
    return found


class Peer:
    """kvpress, as its pipeline calls it: a context manager around the prefill, positions by the true length afterwards."""

    def __init__(self) -> None:
        import kvpress
        import torch
        from transformers import AutoModelForCausalLM

        self.presses, self.torch = kvpress, torch
        self.models = {
            kind: AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32, attn_implementation=kind).eval()
            for kind in ("sdpa", "eager")
        }

    def read(self, press: str, context: Any, n: int) -> tuple[Any, Any]:
        """A cache and the model that goes with it."""
        from transformers import DynamicCache

        ratio = 1 - n / context.shape[1]
        self.model = self.models["eager" if press == "ObservedAttentionPress" else "sdpa"]
        cache = DynamicCache()
        if press == "AdaKVPress":
            made = self.presses.AdaKVPress(self.presses.SnapKVPress(compression_ratio=ratio))
        else:
            made = getattr(self.presses, press)(compression_ratio=ratio) if press else None
        if made is None:
            self.model.model(context, past_key_values=cache)
            return cache, []
        with made(self.model):
            self.model.model(context, past_key_values=cache)
        masks = [getattr(layer.self_attn, "masked_key_indices", None) for layer in self.model.model.layers]
        return cache, masks if press == "AdaKVPress" else []

    def step(self, cache: Any, masks: Any, token: int, place: int) -> Any:
        for layer, mask in zip(self.model.model.layers, masks or [None] * len(self.model.model.layers)):
            layer.self_attn.masked_key_indices = mask
        ids, at = self.torch.tensor([[token]]), self.torch.tensor([[place]])
        return self.model(ids, past_key_values=cache, position_ids=at).logits[0, -1]

    def nbytes(self, cache: Any) -> int:
        held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}.values())

    def kept(self, cache: Any, masks: Any, full: Any) -> list[list[list[int]]]:
        """Places in the text by layer and head: keys as they were, looked up; or all but the masked ones."""
        found = []
        for i, (layer, whole) in enumerate(zip(cache.layers, full.layers)):
            heads = []
            for h in range(layer.keys.shape[1]):
                if masks:
                    _, head, place = masks[i]
                    gone = set(place[head == h].tolist())
                    heads.append([at for at in range(whole.keys.shape[2]) if at not in gone])
                else:
                    heads.append(sorted(self.torch.cdist(layer.keys[0, h], whole.keys[0, h]).argmin(-1).tolist()))
            found.append(heads)
        return found


class Ours:
    """kvloom."""

    def __init__(self) -> None:
        import torch

        from kvloom.lab.measure import load_model

        self.torch, self.model = torch, load_model("nano")[0]

    def read(self, recipe: str, context: Any, n: int) -> tuple[Any, Any]:
        from kvloom import KVCache

        cache = KVCache(self.model, recipe.format(n=n))
        self.model.model(context, past_key_values=cache)
        return cache, None

    def step(self, cache: Any, masks: Any, token: int, place: int) -> Any:
        return self.model(self.torch.tensor([[token]]), past_key_values=cache).logits[0, -1]

    def nbytes(self, cache: Any) -> int:
        return int(cache.nbytes)

    def kept(self, cache: Any, masks: Any, full: Any) -> list[list[list[int]]]:
        found = []
        for layer in cache.managed():
            heads: list[list[int]] = [[] for _ in range(layer.site.kv_heads)]
            for group in layer.rows[0].layer.groups:
                numbers = range(len(heads)) if group.heads is None else group.heads.tolist()
                for segment in group:
                    for head, index in zip(numbers, segment.index.expand(len(numbers), -1).tolist()):
                        heads[head] += index
            found.append([sorted(head) for head in heads])
        return found


def measure(side: str, given: list[dict[str, Any]], ratio: float) -> dict[str, Any]:
    """All methods on all prompts by one side."""
    import torch

    torch.set_num_threads(1)
    own: Any = Peer() if side == "kvpress" else Ours()
    found: dict[str, Any] = {}
    with torch.no_grad():
        for prompt in given:
            context = torch.tensor([prompt["context"]])
            n, reference, full = int(context.shape[1] * ratio), None, None
            for name, both in METHODS.items():
                line = found.setdefault(
                    name, {"kept": [], "kl": [], "answers": [], "bytes": [], "prefill": [], "decode": []}
                )
                clock = time.process_time()
                cache, masks = own.read(both[side == "kvloom"], context, n)
                line["prefill"].append(time.process_time() - clock)
                line["bytes"].append(own.nbytes(cache))
                full = cache if name == "full" else full
                line["kept"].append([] if name == "full" else own.kept(cache, masks, full))
                rows, first = [], prompt["asked"][0]
                twin, place, times = copy.deepcopy(cache), context.shape[1], []
                for token in [*first["ids"], *first["right"]]:
                    clock = time.process_time()
                    rows.append(own.step(twin, masks, token, place).log_softmax(-1))
                    times.append(time.process_time() - clock)
                    place += 1
                line["decode"].append(1000 * statistics.median(times))
                logp = torch.stack(rows)
                reference = logp if reference is None else reference
                line["kl"].append(float((reference.exp() * (reference - logp)).sum(-1).mean()))
                answers = []
                for asked in prompt["asked"]:
                    twin, place, got, logits = copy.deepcopy(cache), context.shape[1], [], None
                    for token in asked["ids"]:
                        logits, place = own.step(twin, masks, token, place), place + 1
                    while len(got) < LIMIT and (token := int(logits.argmax())) != 1:
                        got.append(token)
                        logits, place = own.step(twin, masks, token, place), place + 1
                    answers.append(got)
                line["answers"].append(answers)
    return found


def right(given: list[dict[str, Any]], answers: list[list[list[int]]]) -> list[float]:
    """The share of answers that are right, prompt by prompt."""
    from kvloom.lab.measure import load_model
    from kvloom.lab.metrics import score
    from kvloom.lab.tasks import Turn

    tokenizer = load_model("nano")[1]
    found = []
    for prompt, mine in zip(given, answers, strict=True):
        turns = [Turn("", (), LIMIT, "recalled", extra=extra) for extra in prompt["turns"]]
        found.append(statistics.mean(score(tokenizer.decode(ids), turn) for ids, turn in zip(mine, turns, strict=True)))
    return found


def overlap(a: list[Any], b: list[Any]) -> float:
    """Of the slots that either side keeps, the share that both keep; mean over prompts, layers and heads."""
    shares = []
    for one, other in zip(a, b, strict=True):
        for mine, its in zip(one, other, strict=True):
            shares += [len(set(x) & set(y)) / max(1, len(set(x) | set(y))) for x, y in zip(mine, its, strict=True)]
    return statistics.mean(shares) if shares else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--given", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        given = json.loads(options.given.read_text())
        result = measure(options.side, given, options.ratio)
        options.given.with_suffix(f".{options.side}").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        python = make(options.env or Path(folder) / "env")
        given, path = prompts(options.prompts, options.length), Path(folder) / "given.json"
        path.write_text(json.dumps(given))
        sides = {}
        for side, runs in (("kvpress", python), ("kvloom", Path(sys.executable))):
            command = [str(runs), __file__, "--side", side, "--given", str(path), "--ratio", str(options.ratio)]
            subprocess.run(command, check=True)
            sides[side] = json.loads(path.with_suffix(f".{side}").read_text())
    lines = []
    for name in METHODS:
        line: dict[str, Any] = {
            "method": name,
            "overlap": overlap(sides["kvpress"][name]["kept"], sides["kvloom"][name]["kept"]),
        }
        for side, found in sides.items():
            mine = found[name]
            line[side] = {
                "recall": statistics.mean(right(given, mine["answers"])), "kl": statistics.mean(mine["kl"]),
                "MiB": statistics.mean(mine["bytes"]) / 2**20, "prefill": statistics.median(mine["prefill"]),
                "decode_ms": statistics.median(mine["decode"]),
            }  # fmt: skip
        lines.append(line)
    if options.json:
        print(json.dumps(lines, indent=2))
        return
    print(
        "| method | same slots | KL | recall | MiB | prefill, s | decode, ms |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for line in lines:
        a, b = line["kvpress"], line["kvloom"]
        cells = [f"{100 * line['overlap']:.0f} %" if line["method"] != "full" else ""]
        cells += [f"{a['kl']:.3f} / {b['kl']:.3f}", f"{100 * a['recall']:.0f} / {100 * b['recall']:.0f}"]
        cells += [f"{a['MiB']:.2f} / {b['MiB']:.2f}", f"{a['prefill']:.2f} / {b['prefill']:.2f}"]
        print(f"| {line['method']} | {' | '.join([*cells, f'''{a['decode_ms']:.1f} / {b['decode_ms']:.1f}'''])} |")


if __name__ == "__main__":
    main()
