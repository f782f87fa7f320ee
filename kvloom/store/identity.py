"""What keys and values depend on, as digests: the identity of a cache, and the key of a chunk of tokens in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvloom.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kvloom.core.recipe import Recipe

__all__ = ["FORMAT", "ChunkKey", "Identity", "chunk_keys", "digest_of"]

FORMAT = 1  # of keys and frames; a reader knows exactly one
TOKEN_BYTES = 8
START = ""  # the context of the first chunk of a text


def digest_of(*parts: Any) -> str:
    """64 hex digits (BLAKE2b). Each part is written with its type and length, so that no two lists of parts look alike."""
    state = hashlib.blake2b(digest_size=32, person=b"kvloom store")
    for part in parts:
        if isinstance(part, bytes):
            data = part
        elif isinstance(part, tuple | list):
            data = digest_of(*part).encode()
        elif isinstance(part, str):
            data = part.encode("utf-8", "surrogatepass")
        elif part is None or isinstance(part, bool | int | float):
            data = repr(part).encode()
        else:
            raise StoreError(f"a {type(part).__name__} ({part!r}) has no digest: use text, bytes, numbers and tuples.")
        kind = {list: "tuple"}.get(type(part), type(part).__name__)
        state.update(f"{kind}:{len(data)}:".encode())
        state.update(data)
    return state.hexdigest()


@dataclass(frozen=True)
class Identity:
    """All that keys and values depend on besides the tokens. Chunks of different identities never meet.

    `Identity.of(model, ...)` makes it. `weights`: a digest of all of them. `layout`: (KV heads, key width, value width) of each layer.
    `rope`: name and value of whatever places depend on (base, scaling, share of the head). `recipe`: every codec and recipe
    that touched the numbers, "" for the model's own. `salt`: a secret of the tenant; other tenants cannot find its chunks.
    `shard`: (rank, ranks) of a model that is split.
    """

    weights: str
    tokenizer: str
    dtype: str
    layout: tuple[tuple[int, int, int], ...]
    rope: tuple[tuple[str, Any], ...] = ()
    adapter: str = ""
    recipe: str = ""
    salt: str = ""
    shard: tuple[int, int] = (0, 1)
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in ("weights", "tokenizer", "dtype"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise StoreError(f"identity: {name}={value!r} says nothing; give a text that tells two of them apart.")
        if not self.layout or any(len(layer) != 3 or min(layer) < 0 for layer in self.layout):
            raise StoreError(
                f"identity: layout={self.layout!r}; give (KV heads, key width, value width) for each layer."
            )
        rank, ranks = self.shard
        if not 0 <= rank < ranks:
            raise StoreError(f"identity: shard={self.shard!r}; give (rank, ranks) with 0 <= rank < ranks.")

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: Any = None,
        recipe: Recipe | str = "full",
        *,
        adapter: str = "",
        tenant: str = "",
        block: int = 256,
        shard: tuple[int, int] = (0, 1),
    ) -> Identity:
        """The identity of caches of a model under a recipe, fed `block` tokens at a time where that matters.

        Reads every weight once per model (`fingerprint`). `adapter`: says more of what was done to the model than its weights,
        buffers and adapter layers show. `tenant`: see `salt`. Raises StoreError for a model whose caches can't be stored.
        """
        from kvloom.store.fingerprint import identity_of

        return identity_of(model, tokenizer, recipe, adapter, tenant, block, shard)

    def check(self, key: ChunkKey, tensors: Mapping[Any, Tensor]) -> None:
        """Raises StoreError if tensors under a key cannot be what this identity stands for.

        Keys and values themselves (field "x") have to have a layer's heads, width and dtype; codes only a layer.
        """
        if key.identity != self.digest:
            raise StoreError("the chunk's key was made with another identity; use chunk_keys(identity, ...).")
        for (layer, plane, field), x in tensors.items():
            if not 0 <= layer < len(self.layout):
                raise StoreError(f"a tensor for layer {layer} of a model with {len(self.layout)} layers.")
            if plane not in ("key", "value") or field != "x":
                continue
            heads, *widths = self.layout[layer]
            dtype = str(x.dtype).removeprefix("torch.")
            if x.dim() != 3 or (x.shape[0], x.shape[2]) != (heads, widths[plane == "value"]) or dtype != self.dtype:
                want = f"{self.dtype} [{heads}, tokens, {widths[plane == 'value']}]"
                raise StoreError(f"layer {layer}, {plane}: {dtype} {tuple(x.shape)} is not the identity's {want}.")

    @cached_property
    def digest(self) -> str:
        return digest_of("identity", *((field.name, getattr(self, field.name)) for field in fields(self)))

    @cached_property
    def tenant(self) -> str:
        """A name for quotas that does not give the salt away; "" without one."""
        return digest_of("tenant", self.salt)[:16] if self.salt else ""


@dataclass(frozen=True)
class ChunkKey:
    """One chunk: tokens [start, start + n) of a text, computed after `context` (the previous chunk's digest, or START).

    `variant`: what was made of the numbers when they were stored, such as "cachegen(...)"; "" for as they are. Chunks that
    follow have the key without it as their context.
    """

    identity: str
    context: str
    start: int
    tokens: tuple[int, ...]
    tenant: str = ""
    variant: str = ""

    @cached_property
    def digest(self) -> str:
        # a tenant is a function of the identity: it adds nothing here
        try:
            tokens = b"".join(token.to_bytes(TOKEN_BYTES, "little", signed=True) for token in self.tokens)
        except OverflowError:
            raise StoreError(f"a token of more than 64 bits in {self.tokens[:4]}...; give token ids.") from None
        variant = (self.variant,) if self.variant else ()
        return digest_of("chunk", FORMAT, self.identity, self.context, self.start, tokens, *variant)

    def at(self, variant: str) -> ChunkKey:
        """The key of the same chunk, stored in another way."""
        return replace(self, variant=variant)


def chunk_keys(
    identity: Identity, tokens: Sequence[int], block: int = 256, *, context: str = START, start: int = 0
) -> list[ChunkKey]:
    """Keys of the whole blocks of a text, each with the one before as its context. A rest shorter than `block` has none."""
    if block < 1:
        raise StoreError(f"block={block} tokens in a chunk; give 1 or more.")
    keys: list[ChunkKey] = []
    for first in range(0, len(tokens) - block + 1, block):
        piece = tuple(int(token) for token in tokens[first : first + block])
        keys.append(ChunkKey(identity.digest, context, start + first, piece, identity.tenant))
        context = keys[-1].digest
    return keys
