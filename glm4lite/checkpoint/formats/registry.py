"""The formats of other tools that can be read."""

from __future__ import annotations

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.bitsandbytes import BITSANDBYTES
from glm4lite.checkpoint.formats.format import ForeignWeight, Format, Quant

FORMATS: tuple[Format, ...] = (BITSANDBYTES,)


def format_of(quant: Quant) -> Format:
    """The format of another tool that weights of this config, which is not ours, are held in."""
    return next(known for known in FORMATS if known.owns(quant))


def foreign_weight(checkpoint: Checkpoint, name: str) -> ForeignWeight | None:
    """What the checkpoint says of a weight that another tool quantized; None for any other weight.

    Raises:
        CheckpointError: its tensors contradict each other or its description, or one is missing.
    """
    found = (known.find(checkpoint, name) for known in FORMATS)
    return next((weight for weight in found if weight is not None), None)
