"""A conversation in episodes: windows of utterances, embedded and clustered, each cluster with the text that stands for it."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvloom.errors import KvloomError

__all__ = ["Embedder", "Episodes", "Ngrams", "clusters", "episodes"]

Embedder = Callable[[Sequence[str]], Tensor]  # texts -> [n, dim]


class Ngrams:
    """Words and pairs of words, hashed into `dim` cells, the rarer in the texts it was made for the heavier (TF-IDF)."""

    def __init__(self, texts: Sequence[str], dim: int = 1 << 14) -> None:
        self.dim = dim
        counts = torch.stack([self._count(text) for text in texts]) if texts else torch.zeros(1, dim)
        self.weight = ((1 + len(counts)) / (1 + (counts > 0).sum(0))).log() + 1

    def _count(self, text: str) -> Tensor:
        words = re.findall(r"\w+", text.lower())
        grams = [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]
        cells = torch.tensor([zlib.crc32(gram.encode()) % self.dim for gram in grams], dtype=torch.long)
        return torch.bincount(cells, minlength=self.dim).float()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        counts = torch.stack([self._count(text) for text in texts])
        return torch.where(counts > 0, counts.clamp_min(1).log() + 1, 0.0) * self.weight


def clusters(x: Tensor, count: int, seed: int = 42, restarts: int = 10, rounds: int = 100) -> tuple[Tensor, Tensor]:
    """k-means of x [n, dim]: centres [count, dim] and the cluster of each row [n], the best of several starts (k-means++)."""
    draw = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(restarts):
        centres = x[torch.randint(len(x), (1,), generator=draw)]
        while len(centres) < count:
            far = torch.cdist(x, centres).amin(1).square()
            spread = far if float(far.sum()) else torch.ones(len(x))
            centres = torch.cat([centres, x[torch.multinomial(spread, 1, generator=draw)]])
        for _ in range(rounds):
            own = torch.cdist(x, centres).argmin(1)
            sums = torch.zeros_like(centres).index_add_(0, own, x)
            sizes = torch.bincount(own, minlength=count)[:, None]
            moved = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        distance = torch.cdist(x, centres).amin(1)
        error = float(distance.square().sum())
        if best is None or error < best[0]:
            best = error, centres, torch.cdist(x, centres).argmin(1)
    assert best is not None
    return best[1:]


@dataclass(frozen=True)
class Episodes:
    """`centres` [k, dim]; `texts`: what stands for each episode; `of`: the episode of each window of utterances."""

    embed: Embedder
    centres: Tensor
    texts: tuple[str, ...]
    of: tuple[int, ...]

    def match(self, question: str) -> int:
        """The episode that a question is about: the centre with the largest dot product."""
        return int((self.centres @ F.normalize(self.embed([question]), dim=-1)[0]).argmax())


def episodes(
    utterances: Sequence[str],
    count: int = 4,
    window: int = 4,
    shown: int = 4,
    seed: int = 42,
    embed: Embedder | None = None,
) -> Episodes:
    """Cuts a conversation into windows of `window` utterances and clusters them into at most `count` episodes.

    The `shown` windows nearest to a centre, in the order of time, stand for an episode. `embed`: texts to vectors; None: `Ngrams`.
    Raises KvloomError for bad numbers or no utterances.
    """
    for name, value in (("count", count), ("window", window), ("shown", shown)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise KvloomError(f"{name}={value!r} must be a whole number, at least 1.")
    if not utterances:
        raise KvloomError("utterances is empty; give the turns of the conversation, oldest first.")
    windows = ["\n".join(utterances[at : at + window]) for at in range(0, len(utterances), window)]
    embed = embed or Ngrams(windows)
    x = F.normalize(torch.as_tensor(embed(windows)).float(), dim=-1)
    centres, of = clusters(x, min(count, len(windows)), seed)
    used = of.unique()  # equal windows may leave a cluster empty
    centres, of = centres[used], torch.searchsorted(used, of)
    texts = []
    for which, centre in enumerate(centres):
        mine = (of == which).nonzero()[:, 0]
        near = F.cosine_similarity(x[mine], centre[None]).topk(min(shown, len(mine))).indices
        texts.append("\n".join(windows[i] for i in sorted(mine[near].tolist())))
    return Episodes(embed, centres, tuple(texts), tuple(of.tolist()))
