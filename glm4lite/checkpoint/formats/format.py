"""What a format of another tool has to offer, so that its checkpoints are planned, loaded, decoded and described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite_quant import BnbConfig, BnbTensor, QuantConfig

Quant = QuantConfig | BnbConfig
"""What weights may be quantized to while they are loaded."""


@dataclass(frozen=True)
class Imported:
    """What config.json says of weights that are never computed with as another tool stores them.

    method: the name of the format. settings: what its reader took from config.json, for that reader alone.
    """

    method: str
    settings: Any


Stored = Quant | Imported
"""How a checkpoint's weights may be stored."""


class ForeignWeight(Protocol):
    """What a checkpoint says of one weight that another tool quantized, and that is computed with as it is stored."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its tensors."""

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the matrix it stands for."""

    @property
    def dtype(self) -> str:
        """The type it had, as torch calls it: "bfloat16"."""

    def read(self, checkpoint: Checkpoint) -> BnbTensor:
        """The weight over the mapped files. CheckpointError where its values are none."""


class Format(Protocol):
    """How one tool stores quantized weights. `method` is its name in config.json's quantization_config."""

    @property
    def method(self) -> str: ...

    @property
    def cpu_note(self) -> str:
        """What a user should know who computes with such weights on a CPU; "" for nothing."""

    def declared(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The part of config.json that says a checkpoint is of this format; None where it does not."""

    def config(self, given: Mapping[str, Any]) -> Stored:
        """What `declared` found as a config of ours; QuantError for what cannot be used."""

    def owns(self, stored: Stored) -> bool:
        """Whether a config came from this format."""

    def find(self, checkpoint: Checkpoint, name: str) -> ForeignWeight | None:
        """The weight `name` where it is computed with as it is stored, else None. CheckpointError if damaged."""

    def adapt(
        self, checkpoint: Checkpoint, stored: Any, wanted: Quant | None, asked: bool
    ) -> tuple[Checkpoint, Quant | None, Quant | None]:
        """(checkpoint, how it is kept, what to quantize to) for what was asked for, if anything.

        A checkpoint that is decoded comes back as a plain one. Raises CheckpointError, ConfigError, QuantError.
        """

    def described(self, checkpoint: Checkpoint, stored: Any) -> str:
        """For people: the format, and how many matrices are not quantized. CheckpointError if damaged."""


def declared(config: Mapping[str, Any], method: str) -> Mapping[str, Any] | None:
    """config.json's quantization_config where it names this method."""
    given = config.get("quantization_config")
    return given if isinstance(given, Mapping) and given.get("quant_method") == method else None


def unquantized(checkpoint: Checkpoint, parts: set[str]) -> str:
    """How many matrices are not quantized, beside the weights that consist of these tensors."""
    plain = sum(len(checkpoint.shape(name)) == 2 for name in checkpoint.names() if name not in parts)
    return f"{plain} matrices not quantized"
