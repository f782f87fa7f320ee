"""Key-driven GQA's rule in a cache: pooled KV heads, read by more of the model's heads where keys are larger."""

from typing import Literal

from kvloom.core.card import Card
from kvloom.core.codec import Exact
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.core.segment import Kind
from kvloom.errors import RecipeError
from kvloom.segments.pooled import Pooled

CARD = Card(
    name="key-driven-gqa",
    title="Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention",
    year=2024,
    arxiv="2408.08454",
    code="zohaib-khan5040/key-driven-gqa",
    idea="GQA gives every KV head equally many query heads. Here pooled heads with larger keys get more of them.",
    claims="Up-trained vision transformers: up to 8 % more accuracy than GQA (ViT-L, in the form that follows norms in training).",
    differs="Up-training, which the paper relies on, is left out, and so are the forms that follow norms in training (DGQA) or add "
    "noise (PGQA): this is the rule alone, for language models, which the paper does not try. The model's KV heads with their query "
    "heads are what is allotted; on MHA models that is the paper's rule. Norms are those of one sequence, not of a batch.",
    open="The allotment is made from the first prompt and then frozen, since cached keys would change hands. Tokens are pooled on "
    "arrival, in prompts, later turns and while decoding alike; a token sees itself and its own forward exactly. A pooled head that "
    "gets no reader is stored still, as in the paper.",
    measured="Bundled model, three held-out Wikipedia texts of 1,536 tokens, then 48 tokens one by one"
    ", in fp32; KL to the full cache in nats per token and same top token: "
    "heads=2: 3.178, 17 % at 16 of 32 bits per number; heads=1, the rule alone: 0.924, 47 % and nothing saved. Of two heads the one "
    "with smaller keys always gets no reader. Without up-training it is no way to save memory: at the same bytes "
    "effectively-compress-kv-heads loses 0.280, cskv 0.029.",
    bytes="per token: (D_k + D_v) * itemsize for every `heads` KV heads; 8 per KV head and plane",
)


@recipe(CARD)
def key_driven_gqa(heads: int = 2, share: Literal["norms", "even"] = "norms") -> Recipe:
    """Stores the mean of adjacent KV heads, and lets the model's heads read them by key norm.

    Args:
        heads: adjacent KV heads that are pooled; 1 pools nothing.
        share: "norms": more readers for pooled heads with larger keys; "even": each is read by its own heads, as in GQA.
    """
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise RecipeError(f"heads={heads!r} must be a number of heads, at least 1.")
    if share not in ("norms", "even"):
        raise RecipeError(f"share={share!r} must be 'norms' or 'even'.")
    return Recipe("key-driven-gqa", kinds={"main": Kind(Pooled(Exact(), heads, share), Pooled(Exact(), heads, share))})
