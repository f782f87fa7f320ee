"""KIVI: keys in few bits per channel, values per token, the newest tokens exact."""

from kvloom.core.card import Card
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.core.segment import Kind, Tail
from kvloom.errors import RecipeError
from kvloom.segments.minmax import MinMax

CARD = Card(
    name="kivi",
    title="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
    year=2024,
    arxiv="2402.02750",
    code="jy-yuan/KIVI",
    idea="Keys have outlier channels, so groups of tokens share a scale inside each channel; values have none, so "
    "groups of channels share a scale inside each token. The newest tokens stay exact.",
    claims="2 bits with almost unchanged quality on Llama-2, Falcon and Mistral; 2.6x less peak memory.",
    differs="1, 3 and 8 bits as well as 2 and 4. Scale and minimum are fp16 for fp32 models. A constant group is stored "
    "with scale 0 instead of dividing by it.",
    open="Nothing: the algorithm was checked against the official code.",
    measured="`kvloom demo`, bundled model, 3,899 tokens, kivi(bits=2): cache 8.7x smaller, 4 of 4 answers right, "
    "KL to the full cache 0.172 nats per token, same top token 75%. Prefill of 8,192 tokens 1.04x stock. 2 bits of keys by channel "
    "lose less of the attention output than by token, as claimed, far less with planted outliers. But the bundled model's values have "
    "channels that stand out too: by channel they would lose 0.17 of it, by token they lose 0.20.",
    bytes="frozen, per token and KV head: D*bits/8 + 4*D/group for keys and again for values; exact: at most residual - 1 "
    "keys and residual values",
    points=("bits=2", "bits=4"),
)


@recipe(CARD)
def kivi(bits: int = 2, group: int = 32, residual: int = 128) -> Recipe:
    """Quantizes what is older than the residual.

    Args:
        bits: bits per number, 1, 2, 3, 4 or 8; the authors advise 2 for MHA models and 4 for GQA.
        group: numbers that share one scale: tokens for keys, channels for values; must divide the head size.
        residual: newest tokens kept exact; keys are frozen that many at a time; a multiple of `group`.
    """
    keys, values = MinMax(bits, group, "tokens"), MinMax(bits, group, "channels")
    if not isinstance(residual, int) or residual < group or residual % group:
        raise RecipeError(f"residual={residual!r} must be a multiple of group={group}, for example {4 * group}.")
    return Recipe("kivi", kinds={"main": Kind(keys, values, Tail(every=residual), Tail(keep=residual))})
