"""What a format of another tool has to offer, so that its checkpoints are planned, loaded, decoded and described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite_quant import BnbConfig, BnbTensor, QuantConfig

Quant = QuantConfig | BnbConfig
"""What weights may be quantized to while they are loaded."""


class ForeignWeight(Protocol):
    """What a checkpoint says of one weight that another tool quantized."""

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

    def config(self, given: Mapping[str, Any]) -> Quant:
        """config.json's quantization_config as one of ours; QuantError for what cannot be used."""

    def owns(self, quant: Quant) -> bool:
        """Whether weights of this config are held in this format."""

    def find(self, checkpoint: Checkpoint, name: str) -> ForeignWeight | None:
        """The description of the weight `name`, None where it is in another format. CheckpointError if damaged."""

    def adapt(
        self, checkpoint: Checkpoint, stored: Any, wanted: Quant | None, asked: bool
    ) -> tuple[Checkpoint, Quant | None, Quant | None]:
        """(checkpoint, how it is kept, what to quantize to) for what was asked for, if anything.

        A checkpoint that is decoded comes back as a plain one. Raises CheckpointError, ConfigError, QuantError.
        """

    def described(self, stored: Any, weights: Sequence[Any], plain: int) -> str:
        """For people: the format, of these weights, beside so many matrices that are not quantized."""
