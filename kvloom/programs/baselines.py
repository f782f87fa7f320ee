"""What methods of reuse are compared with: no repair at all, and no reuse but the prefix."""

from kvloom.core.card import Card
from kvloom.programs.method import Method, Plan, Text, method

__all__ = ["naive", "prefix"]

NAIVE = Card(
    name="naive",
    title="Full reuse of chunks, without repair",
    year=2023,
    arxiv="2311.04934",
    code="",
    idea="Chunks computed alone are moved to their places and taken as they are; only text without a chunk is computed.",
    claims="What Prompt Cache does, and Block-Attention (2409.15355) on weights that were tuned for it.",
    differs="Keys are rotated to their new places; Prompt Cache gives every module places of its own.",
    open="",
    measured="`kvloom bench rag`, bundled model, facts cut in two by the passages' borders: KL to a full prefill 1.24 nats per "
    "token of the answer, 2 of 10 answers right; whole facts: 0.0004, 10 of 10. Tables in docs/reuse.md.",
    bytes="a full cache",
)
PREFIX = Card(
    name="prefix",
    title="Prefix caching",
    year=2023,
    arxiv="2312.07104",
    code="",
    idea="Only what stands at the same place behind the same text is reused; the rest is computed. Exact.",
    claims="The logits of a full prefill.",
    differs="Only matching here; the store does the rest.",
    open="",
    measured="`kvloom bench rag`: docs/reuse.md; what the others are compared with.",
    bytes="a full cache",
)


@method(NAIVE)
def naive() -> Method:
    """Reuses all chunks, repairs nothing."""
    return Method("", lambda text: Plan(text.fed(~(text.stale | text.exact))))


@method(PREFIX)
def prefix() -> Method:
    """Reuses what is exact, computes the rest."""
    return Method("", _plan, reuse="exact")


def _plan(text: Text) -> Plan:
    return Plan(text.fed(~text.exact))
