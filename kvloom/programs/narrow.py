"""Narrows a model's residual stream between layers, by hooks; no model code is copied or changed."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kvloom.errors import ModelError

__all__ = ["Narrow", "Way", "decoder_layers"]

Way = Literal["inside", "behind"]
ROWS = ("position_ids", "position_embeddings", "cache_position")  # keywords of a decoder layer with one entry per row


def decoder_layers(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """Each decoder layer and the attention module in it. Raises ModelError where they cannot be told."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for blocks in lists:
        if len(blocks) == count:
            found = [
                (block, [m for m in block.modules() if m is not block and getattr(m, "layer_idx", None) == i])
                for i, block in enumerate(blocks)
            ]
            if all(len(inner) == 1 for _, inner in found):
                return [(block, inner[0]) for block, inner in found]
    raise ModelError(f"{type(model).__name__} has no list of {count} decoder layers with one attention module each.")


class Narrow:
    """The rows of one feed on their way through the layers: `index` [m] holds the places of those at hand.

    "inside": rows leave between attention and what follows it. The layer keeps its input in a variable of its own, to add
    it to what attention gives; that very tensor is given the data of the rows that stay. "behind": rows leave with the
    layer's output, for models that read their input for more than that before attention.
    """

    def __init__(self, model: PreTrainedModel, index: Tensor, way: Way) -> None:
        self.model, self.index, self.way = model, index, way
        self.at: Tensor | None = None  # the rows at hand among all that were fed; None: all
        self.took: list[int] = []
        self.went: list[int] = []
        self._fed = len(index)
        self._chosen: tuple[int, Tensor] | None = None
        self._input: Tensor | None = None
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Narrow:
        for i, (block, attention) in enumerate(decoder_layers(self.model)):
            self._hooks.append(block.register_forward_pre_hook(self._before(i), with_kwargs=True))
            self._hooks.append(attention.register_forward_hook(self._attended(i)))
            self._hooks.append(block.register_forward_hook(self._after(i)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def chose(self, layer: int, chosen: Tensor | None) -> None:
        """Attention tells which rows at hand go on (None: all)."""
        self.took.append(len(self.index))
        self.went.append(len(self.index) if chosen is None else len(chosen))
        if chosen is not None:
            self._chosen = (layer, chosen)

    def _leave(self, chosen: Tensor) -> None:
        self.index = self.index[chosen]
        self.at = chosen if self.at is None else self.at[chosen]
        self._chosen = None

    def _before(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] != len(self.index):
                raise ModelError(
                    f"layer {layer} got {hidden.shape[1]} rows where {len(self.index)} are at hand: this model's code adds "
                    "something between layers that partial prefill does not know."
                )
            self._input = hidden
            if self.at is not None:
                kwargs = {n: self._narrowed(x) if n in ROWS else x for n, x in kwargs.items()}
            return args, kwargs

        return hook

    def _narrowed(self, x: Any) -> Any:
        if isinstance(x, tuple | list):
            return type(x)(self._narrowed(each) for each in x)
        if not isinstance(x, Tensor):
            return x
        dim = 0 if x.dim() == 1 else 1  # [m], [1, m] or [1, m, D]
        if x.shape[dim] != self._fed:
            raise ModelError(
                f"positions of shape {tuple(x.shape)} where {self._fed} rows were fed; cannot narrow them."
            )
        assert self.at is not None
        return x.index_select(dim, self.at.to(x.device))

    def _attended(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self.way != "inside" or self._chosen is None or self._chosen[0] != layer:
                return None
            chosen, hidden = self._chosen[1], self._input
            assert hidden is not None
            found = output[0] if isinstance(output, tuple) else output
            at = chosen.to(found.device)
            hidden.data = hidden.index_select(1, at)
            self._leave(chosen)
            found = found.index_select(1, at)
            return (found, *output[1:]) if isinstance(output, tuple) else found

        return hook

    def _after(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            self._input = None
            if self._chosen is None:
                return None
            chosen = self._chosen[1]
            found = output[0] if isinstance(output, tuple) else output
            self._leave(chosen)
            found = found.index_select(1, chosen.to(found.device))
            return (found, *output[1:]) if isinstance(output, tuple) else found

        return hook
