"""Beginnings of prompts that are kept: a tree of parts of a fixed size, with a sequence to fork at borders.

A prompt that begins like an earlier one goes on from a fork. Where a recipe drops tokens, what is held at one border is no part
of what is held at the next, so only the last border of a prompt is kept, and those at which prompts were seen to part.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from collections.abc import Sequence as List
from itertools import count

from kvloom.engine.pool import Pool
from kvloom.engine.sequence import Sequence

__all__ = ["Prefix"]


class _Node:
    def __init__(self, parent: _Node | None, key: Hashable) -> None:
        self.parent, self.key = parent, key
        self.children: dict[Hashable, _Node] = {}
        self.sequence: Sequence | None = None
        self.used = 0


class Prefix:
    """`part`: tokens between borders."""

    def __init__(self, part: int, pool: Pool) -> None:
        self.part, self.pool = part, pool
        self._root = _Node(None, None)
        self._clock = count(1)
        self._kept: dict[_Node, None] = {}
        self.changes = 0  # how often something was kept or forgotten

    def __len__(self) -> int:
        return len(self._kept)

    def _walk(self, space: Hashable, tokens: List[int], make: bool = False) -> Iterator[tuple[int, _Node]]:
        node, border = self._root, 0
        keys: List[Hashable] = [
            space,
            *(tuple(tokens[i : i + self.part]) for i in range(0, self._last(tokens), self.part)),
        ]
        for i, key in enumerate(keys):
            found = node.children.get(key)
            if found is None:
                if not make:
                    return
                found = node.children[key] = _Node(node, key)
            node, border = found, i * self.part
            if border:
                yield border, node

    def _last(self, tokens: List[int]) -> int:
        """The last border before the last token, whose logits a request needs."""
        return (len(tokens) - 1) // self.part * self.part

    def find(self, space: Hashable, tokens: List[int]) -> tuple[int, Sequence | None]:
        """The longest beginning that is kept, forked, and its length. `space`: what else has to be equal."""
        best: tuple[int, _Node | None] = (0, None)
        for border, node in self._walk(space, tokens):
            if node.sequence is not None:
                best = border, node
        length, kept = best
        if kept is None or kept.sequence is None:
            return 0, None
        kept.used = next(self._clock)
        return length, kept.sequence.fork()

    def length(self, space: Hashable, tokens: List[int]) -> int:
        """How long the longest beginning is that is kept."""
        return max((border for border, node in self._walk(space, tokens) if node.sequence is not None), default=0)

    def borders(self, space: Hashable, tokens: List[int], chains: bool) -> frozenset[int]:
        """The borders of a prompt at which it should be kept."""
        last = self._last(tokens)
        if chains:
            return frozenset(range(self.part, last + 1, self.part))
        known = [border for border, _ in self._walk(space, tokens)]
        return frozenset(x for x in (last, *known[-1:]) if x)

    def keep(self, space: Hashable, tokens: List[int], sequence: Sequence) -> Sequence | None:
        """Keeps a fork of a sequence that has just been fed exactly these tokens, a whole number of parts. The fork, if it is new."""
        *_, (_, node) = self._walk(space, [*tokens, -1], make=True)
        if node.sequence is not None:
            return None
        node.sequence, node.used = sequence.fork(), next(self._clock)
        self._kept[node] = None
        self.changes += 1
        self.pool.hold(node, node.sequence.storages())
        return node.sequence

    def evict(self) -> bool:
        """Forgets the least recently used beginning that no longer one follows. False if there is none."""
        leaves = [node for node in self._kept if not any(x in self._kept for x in node.children.values())]
        if not leaves:
            return False
        self._forget(min(leaves, key=lambda node: node.used))
        return True

    def forget(self, space: Hashable, tokens: List[int]) -> None:
        """Forgets what is kept of exactly these tokens."""
        for border, node in list(self._walk(space, [*tokens, -1])):
            if border == len(tokens) and node.sequence is not None:
                self._forget(node)

    def _forget(self, node: _Node) -> None:
        node.sequence = None
        del self._kept[node]
        self.changes += 1
        self.pool.drop(node)
        while node.parent is not None and not node.children and node.sequence is None:
            del node.parent.children[node.key]
            node = node.parent

    def clear(self) -> None:
        """Forgets everything."""
        while self.evict():
            pass
