"""Bits for keys and bits for values, layer by layer: how much each pair costs a model, and which tables are worth having
(KVTuner, arXiv 2502.04420).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvloom.core.attention import Logits
from kvloom.core.cache import KVCache
from kvloom.core.codec import Plane
from kvloom.core.sample import managed
from kvloom.core.segment import Kind
from kvloom.core.update import watched
from kvloom.core.view import text_config
from kvloom.policies.pareto import Costs, Genome, front, search

__all__ = ["BITS", "PAIRS", "Found", "Text", "clusters", "find", "read", "sensitivity", "survivors"]

BITS = (2, 4, 8)
PAIRS = tuple(product(BITS, BITS))  # (bits of keys, bits of values)
NEAR = 0.5  # errors of layers that share a decision differ by at most so many powers of two
Pair = tuple[int, int]
Base = Callable[[Pair], Kind]  # the quantizer whose bits are sought
Tell = Callable[[str], None]


@dataclass
class Text:
    """A text that a model has read: `prompt` is what the stock cache held then, `ids` [1, m] what comes after, `want` [m, V] the
    log probabilities there, `queries` of each managed layer [Hq, m, D], `forms`: how it makes logits.
    """

    prompt: DynamicCache
    ids: Tensor
    want: Tensor
    queries: dict[int, Tensor]
    forms: dict[int, Logits]
    stored: dict[tuple[int, Plane, int], Tensor] = field(default_factory=dict)

    def plane(self, layer: int, which: Plane, bits: int, base: Base) -> Tensor:
        """Keys or values [H, n, D] of the prompt as they are read back from so many bits."""
        if (layer, which, bits) not in self.stored:
            kind, held = base((bits, bits)), self.prompt.layers[layer]
            codec, tail = (kind.key, kind.key_tail) if which == "key" else (kind.value, kind.value_tail)
            x = (held.keys if which == "key" else held.values)[0]
            due = tail.due(x.shape[1])
            back = codec.decode(codec.encode(x[:, :due], {}), {}).to(x.dtype) if due else x[:, :0]
            self.stored[layer, which, bits] = torch.cat([back, x[:, due:]], 1)
        return self.stored[layer, which, bits]


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, ahead: int) -> Text:
    """Reads a text [1, T], all but the last `ahead` tokens as the prompt."""
    ids = ids.to(model.device)
    prompt, rest = ids[:, :-ahead], ids[:, -ahead:]
    cache, mine = DynamicCache(config=text_config(model)), KVCache(model, "full")
    model(prompt, past_key_values=cache, logits_to_keep=1)
    model(prompt, past_key_values=mine, logits_to_keep=1)
    queries: dict[int, Tensor] = {}
    forms: dict[int, Logits] = {}

    def note(layer: int, query: Tensor, output: Tensor, form: Logits, *_: object) -> None:
        queries[layer], forms[layer] = query[0].float(), form

    with watched(note):
        model(rest, past_key_values=mine)
    want = model(rest, past_key_values=copy.deepcopy(cache)).logits[0].float().log_softmax(-1)
    return Text(cache, rest, want, queries, forms)


def sensitivity(layers: list[int], texts: list[Text], base: Base) -> Tensor:
    """Error of the attention output of every layer under every pair [L, 9]: its norm over the output's, mean of the texts.

    Attention of the queries behind the prompt to the prompt.
    """

    def output(text: Text, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        q, form = text.queries[layer], text.forms[layer]
        groups = q.unflatten(0, (len(keys), -1)).flatten(1, 2)
        p = form.cap(groups @ keys.float().transpose(1, 2) * form.scale).softmax(-1)
        mixed: Tensor = p @ values.float()
        return mixed

    found = torch.zeros(len(layers), len(PAIRS))
    for text in texts:
        for at, layer in enumerate(layers):
            held = text.prompt.layers[layer]
            want = output(text, layer, held.keys[0], held.values[0])
            for i, (k, v) in enumerate(PAIRS):
                got = output(text, layer, text.plane(layer, "key", k, base), text.plane(layer, "value", v, base))
                found[at, i] += ((got - want).norm() / want.norm() / len(texts)).cpu()
    return found


def survivors(errors: Tensor) -> list[int]:
    """The pairs of one layer [9] that no other beats in both mean bits and error, by their bits."""
    return front({i: (sum(pair) / 2, float(errors[i])) for i, pair in enumerate(PAIRS)})


def clusters(errors: Tensor) -> list[list[int]]:
    """Layers [L, 9] that decide together: the same pairs survive, and errors are near to those of another of them."""
    kept = [survivors(row) for row in errors]
    groups: list[list[int]] = []
    for at, row in enumerate(errors):
        mine = [at]
        for group in list(groups):
            gaps = [float((row / errors[i]).log2()[kept[at]].abs().max()) for i in group]
            if kept[group[0]] == kept[at] and min(gaps) <= NEAR:
                groups.remove(group)
                mine += group
        groups.append(sorted(mine))
    return sorted(groups)


@dataclass(frozen=True)
class Found:
    """Tables [P, L, 2] that no other beats, by mean bits [P], and their loss [P]: KL to the full cache in nats per token. `errors`
    [L, 9], `groups` [L]: which layers decided together.
    """

    tables: Tensor
    bits: Tensor
    loss: Tensor
    errors: Tensor
    groups: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """For a profile."""
        return vars(self)


def find(model: PreTrainedModel, texts: list[Text], base: Base, trials: int, tell: Tell, seed: int = 0) -> Found:
    """Sensitivity, pruning, clustering and search."""
    layers = list(managed(model))
    for text in texts:
        text.stored.clear()
    tell("how sensitive layers are")
    errors = sensitivity(layers, texts, base)
    groups = clusters(errors)
    choices = [survivors(errors[group].mean(0)) for group in groups]
    known: dict[tuple[Pair, ...], Costs] = {}

    def cost(table: tuple[Pair, ...]) -> Costs:
        if table not in known:
            bits = sum(map(sum, table)) / (2 * len(table))
            known[table] = bits, _loss(model, texts, dict(zip(layers, table, strict=True)), base)
            tell(f"table {len(known)}: {known[table][0]:.2f} bits, KL {known[table][1]:.4f}")
        return known[table]

    def table_of(genome: Genome) -> tuple[Pair, ...]:
        pairs = {layer: PAIRS[choice[gene]] for gene, choice, group in zip(genome, choices, groups) for layer in group}
        return tuple(pairs[at] for at in range(len(layers)))

    for pair in PAIRS:  # what every table has to be measured by
        cost((pair,) * len(layers))
    sizes = [len(choice) for choice in choices]
    even = {tuple(min(i, n - 1) for n in sizes) for i in range(max(sizes))}
    search(sizes, lambda genome: cost(table_of(genome)), even, trials, seed=seed)
    best = front(known)
    return Found(
        torch.tensor(best, dtype=torch.uint8),
        torch.tensor([known[table][0] for table in best]),
        torch.tensor([known[table][1] for table in best]),
        errors,
        torch.tensor([next(i for i, group in enumerate(groups) if at in group) for at in range(len(layers))]),
    )


@torch.no_grad()
def _loss(model: PreTrainedModel, texts: list[Text], table: Mapping[int, Pair], base: Base) -> float:
    """KL of the predictions behind prompts that are stored so, in nats per token."""
    total = 0.0
    for text in texts:
        cache = copy.copy(text.prompt)
        cache.layers = [copy.copy(layer) for layer in text.prompt.layers]
        for layer, (k, v) in table.items():
            held = cache.layers[layer]
            held.keys = text.plane(layer, "key", k, base)[None]
            held.values = text.plane(layer, "value", v, base)[None]
        got = model(text.ids, past_key_values=cache).logits[0].float().log_softmax(-1)
        total += float((text.want.exp() * (text.want - got)).sum(-1).mean())
    return max(0.0, total / len(texts))
