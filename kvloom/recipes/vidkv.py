"""VidKV: keys in 1.5 bits, half of their channels as signs in frequency space; values in 1.58 bits, channel by channel."""

from kvloom.core.card import Card
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.registry import recipe
from kvloom.core.segment import Kind, Tail
from kvloom.errors import RecipeError
from kvloom.policies.budgets import Nothing
from kvloom.policies.modality import Protect, Relevance
from kvloom.segments.fewbits import Sign, Ternary
from kvloom.segments.minmax import MinMax
from kvloom.segments.rotate import Rotate
from kvloom.segments.split import ByRange

CARD = Card(
    name="vidkv",
    title="Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models",
    year=2025,
    arxiv="2503.16257",
    code="KD-TAO/VidKV",
    idea="Frames repeat, so a channel varies little over a video's tokens: both keys and values share scales along tokens. Key "
    "channels of large range take 2 bits, the others the sign of their Fourier transform across channels; values are -1, 0 or "
    "1 times their size. Tokens that the question is about keep 2 bits.",
    claims="Keys in 1.5 and values in 1.58 bits with almost no loss on six video benchmarks (LLaVA-OV-7B, Qwen2.5-VL-7B).",
    differs="Signs and zeros are read back times their size, as the paper means it; the official code leaves that out. A real "
    "Fourier transform, so a number takes one bit, not two; five ternary codes take a byte. Nothing is encoded twice: tokens are "
    "frozen a group at a time, and the official code encodes all of them anew. Channels are chosen by the first prompt.",
    open="Which tokens are of images comes from `cache.tokens(...)`, as does their relevance (`kvloom.policies.modality.relevance` "
    "computes it from embeddings). What is not given is text, and for text alone nothing is protected. Of each prompt chunk its "
    "own image tokens are judged.",
    measured="Bundled model, two held-out Wikipedia texts of 1,024 tokens, then 32 tokens one by one, in fp32; KL to the full "
    "cache in nats per token and same top token, bits per number with all constants: defaults 0.392, 67 % at 2.2 bits; key_bits=2.0: 0.328, "
    "73 % at 2.6. kivi(residual=32) beside it: 1 bit 2.598, 11 % at 2.5; 2 bits 0.083, 80 % at 3.4. So far better than kivi's one "
    "bit at fewer bytes; on text, which does not repeat as frames do, it loses what the paper does not. There is no bundled "
    "model that sees images. Decoding takes 2.5 times kivi's time: codes of three values are looked up in torch.",
    bytes="per token and KV head: keys D*hard/4 + 4*D*hard/group + D*easy/8 + 2*D*easy/group, with shares hard = key_bits - 1 and easy "
    "= 2 - key_bits; values D/5 + 2*D/group, or D/4 + 4*D/group where protected; 4 for the place in the text with images",
)


@recipe(CARD)
def vidkv(key_bits: float = 1.5, group: int = 32, protect: float = 0.2) -> Recipe:
    """Stores keys and values in less than two bits.

    Args:
        key_bits: bits per number of keys on average, 1.0 to 2.0: the share of channels with 2 bits, plus one.
        group: consecutive tokens of a channel that share a size; so many tokens are frozen at a time.
        protect: share of image tokens, the most relevant ones, whose values take 2 bits; 0.0: none, and placements compose.
    """
    if isinstance(key_bits, bool) or not isinstance(key_bits, int | float) or not 1 <= key_bits <= 2:
        raise RecipeError(f"key_bits={key_bits!r} must be between 1.0 and 2.0.")
    if isinstance(protect, bool) or not isinstance(protect, int | float) or not 0 <= protect <= 1:
        raise RecipeError(f"protect={protect!r} must be a share of the image tokens, 0.0 to 1.0.")
    key = ByRange(MinMax(2, group, "tokens"), Rotate(Sign(group), "fourier"), key_bits - 1)
    tail = Tail(every=group)
    main = Kind(key, Ternary(group), tail, tail)
    if not protect:
        return Recipe("vidkv", kinds={"main": main})
    policy = Policy(Nothing(), Protect(protect, "clear", group), Relevance())
    return Recipe(
        "vidkv", {"prompt": policy}, {"main": main, "clear": Kind(key, MinMax(2, group, "tokens"), tail, tail)}
    )
