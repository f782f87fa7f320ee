"""MPCache: what the end of the prompt ignores leaves once; of the rest each decoded token reads a few clusters."""

from dataclasses import dataclass, replace

from torch import Tensor

from kvloom.core.card import Card
from kvloom.core.group import Table
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.registry import recipe
from kvloom.core.segment import Kind
from kvloom.core.step import Step
from kvloom.errors import RecipeError
from kvloom.policies.budgets import Tokens
from kvloom.policies.placements import Keep
from kvloom.policies.selectors import Bounds

CARD = Card(
    name="mpcache",
    title="MPCache: MPC-Friendly KV Cache Eviction for Efficient Private Large Language Model Inference",
    year=2025,
    arxiv="2501.06807",
    code="zwxandy/MPCache",
    idea="Tokens that the end of the prompt hardly looks at leave for good, the same in all heads of a layer. Of what stays, each decoded "
    "token reads only clusters whose keys can match its query, found by bounds of clusters of 32, then of 16 keys.",
    claims="1.8-2.01x less decoding latency and 3.39-8.37x less communication in secure two-party computation, with better "
    "quality than earlier eviction methods.",
    differs="The cryptographic protocol is left out. What stays after the prompt is a ranked share, as the paper says (the code "
    "compares unscaled scores with a threshold for each data set). Attention is scaled and causal. The first cluster is read besides the "
    "share even where it is among the best, so that heads read equally many. Layers do not share selections.",
    open="GQA: ranks are added up over the query heads of a KV head. While decoding nothing leaves. At later turns and prompt chunks the new "
    "part is compressed at its end to the same share of the whole prompt. Tokens that come several at a time read everything.",
    measured="The document of `kvloom demo`, bundled model, 3,899 tokens: cache 2.3x smaller, 0 of 4 answers right, KL to the full "
    "cache 0.37 nats per token, same top token 72%. Each half alone: all tokens kept and a fifth read 0.15 (84%, 1 right), two "
    "fifths kept and all read 0.06 (83%, 0 right): questions asked later find their needles gone, or in clusters whose bounds say little.",
    bytes="(budget + generated) * ((D_k + D_v) * itemsize + 4) per KV head, and 2 * D_k * itemsize for every 16 of them",
)


@dataclass(frozen=True)
class Ending:
    """Attention of the last `share` of a prompt's queries (half of that beyond 24,000 tokens), the mean over all heads."""

    share: float = 0.2
    queries = -1
    columns = 0

    def __call__(self, step: Step, table: Table) -> Tensor:
        rows = step.q.shape[2]
        share = self.share / 2 if step.prompt > 24_000 else self.share
        w = max(1, int(share * rows))
        last = replace(step, q=step.q[:, :, rows - w :], lse=step.lse[:, :, rows - w :], first=step.length - w)
        return last.mass(table).mean((0, 1)).expand(step.heads, -1)


@recipe(CARD)
def mpcache(
    budget: int | float | str = 0.4,
    coarse: float = 0.5,
    fine: float = 0.2,
    mix: float = 0.6,
    skip: int = 2,
    unit: int = 16,
) -> Recipe:
    """Drops once after the prompt, then reads a selection at every decoded token.

    Args:
        budget: slots kept of the prompt: tokens, a ratio of the prompt, or bytes ("64MiB").
        coarse: share of the large clusters that a token looks into.
        fine: share of the small clusters that it reads.
        mix: weight of a cluster's largest numbers against its smallest, 0.0 to 1.0.
        skip: layers from the bottom that read everything.
        unit: slots of a small cluster; a large one has two.
    """
    if isinstance(unit, bool) or not isinstance(unit, int) or unit < 1:
        raise RecipeError(f"unit={unit!r} must be a number of slots, at least 1.")
    policy = Policy(Tokens(budget), Keep(scope="layer"), Ending())
    return Recipe("mpcache", {"prompt": policy}, {"main": Kind(select=Bounds(coarse, fine, mix, skip, unit))})
