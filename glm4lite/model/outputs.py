"""What a forward pass and `generate` return, under the reference's names."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from glm4lite.model.cache import PastKeyValues


@dataclass
class ModelOutput:
    """Fields by attribute, and as Transformers' ModelOutput a mapping of those that are not None: `out["logits"]`,
    `out.keys()`, `"loss" in out`. An int or a slice takes from them in order: `out[0]`, `out[:2]`.

    A mapping, or pairs of names and values, may stand in place of the first field: so libraries that move outputs
    between devices make them anew.
    """

    def __post_init__(self) -> None:
        first = fields(self)[0].name
        given = getattr(self, first)
        if isinstance(given, Mapping | Iterator | list | tuple):
            setattr(self, first, None)
            for name, value in given.items() if isinstance(given, Mapping) else given:
                self[name] = value

    def _present(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return tuple(self._present().values())

    def __getitem__(self, key: int | slice | str) -> Any:
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in {field.name for field in fields(self)}:
            raise KeyError(f"{type(self).__name__} has no field {key!r}")
        setattr(self, key, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def __contains__(self, key: object) -> bool:
        return key in self._present()

    def keys(self) -> KeysView[str]:
        return self._present().keys()

    def values(self) -> ValuesView[Any]:
        return self._present().values()

    def items(self) -> ItemsView[str, Any]:
        return self._present().items()

    def get(self, key: str, default: Any = None) -> Any:
        return self._present().get(key, default)


# isinstance(out, Mapping) is how scripts (and Transformers' Trainer) tell an output from a tuple.
Mapping.register(ModelOutput)


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """last_hidden_state [B, T, H] after the final norm; hidden_states: embeddings, then each layer (last normed)."""

    last_hidden_state: Tensor | None = None
    past_key_values: PastKeyValues | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """logits [B, kept positions, vocab]; loss is a scalar when labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: PastKeyValues | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutputWithPast(CausalLMOutputWithPast):
    """logits [B, num_labels]."""


@dataclass
class TokenClassifierOutput(ModelOutput):
    """logits [B, T, num_labels]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class GenerateDecoderOnlyOutput(ModelOutput):
    """sequences [B, T]; one entry a step: scores (processed) and logits [B, vocab], attentions and hidden_states
    as a forward pass returns them. past_key_values hold all but the last token.
    """

    sequences: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions: tuple[tuple[Tensor, ...], ...] | None = None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: PastKeyValues | None = None
