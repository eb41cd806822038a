"""What a forward pass returns, under the reference's names. `output[0]` is the first field that is not None."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from glm4lite.cache import KVCache


@dataclass
class ModelOutput:
    """Fields by attribute, by name (`out["logits"]`) or by place among those present (`out[0]`)."""

    def to_tuple(self) -> tuple[Any, ...]:
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """last_hidden_state [B, T, H] after the final norm; hidden_states: embeddings, then each layer (last normed)."""

    last_hidden_state: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """logits [B, kept positions, vocab]; loss is a scalar when labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
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
