"""A format that is read and never computed with: what all of them share, so that one is its layout and nothing else."""

from __future__ import annotations

import logging
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from glm4lite.base.errors import CheckpointError
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.decoded import DecodedCheckpoint
from glm4lite.checkpoint.formats.format import Imported, Quant, Stored, declared, unquantized
from glm4lite.checkpoint.formats.weight import PackedWeight
from glm4lite_quant import QuantConfig, QuantError

logger = logging.getLogger("glm4lite")


class ImportedFormat(ABC):
    """`settings` of config.json and the `weights` of a checkpoint are what is particular to a format."""

    method: str
    cpu_note = ""

    @abstractmethod
    def settings(self, given: Mapping[str, Any]) -> Any:
        """What `declared` found, checked; QuantError names what cannot be used."""

    @abstractmethod
    def weights(self, checkpoint: Checkpoint, settings: Any) -> Iterator[tuple[str, PackedWeight]]:
        """Each quantized weight, by the name that the plain one would have. Headers alone are read.

        Raises:
            CheckpointError: its tensors contradict each other or config.json, or one is missing.
        """

    def declared(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return declared(config, self.method)

    def config(self, given: Mapping[str, Any]) -> Imported:
        return Imported(self.method, self.settings(given))

    def owns(self, stored: Stored) -> bool:
        return isinstance(stored, Imported) and stored.method == self.method

    def find(self, checkpoint: Checkpoint, name: str) -> None:
        return None

    def adapt(
        self, checkpoint: Checkpoint, stored: Imported, wanted: Quant | None, asked: bool
    ) -> tuple[DecodedCheckpoint, None, Quant | None]:
        """The decoded checkpoint, and the int4 that keeps its codes where nothing else was asked for."""
        decoded = DecodedCheckpoint(checkpoint, self._found(checkpoint, stored), self.method)
        if wanted is None and not asked:
            wanted = QuantConfig()
        return decoded, None, decoded.fitted(wanted) if isinstance(wanted, QuantConfig) else wanted

    def described(self, checkpoint: Checkpoint, stored: Imported) -> str:
        weights = self._found(checkpoint, stored)
        parts = {part for weight in weights.values() for part in weight.parts}
        bits = " and ".join(f"{count:g}" for count in sorted({weight.bits for weight in weights.values()}))
        groups = ", ".join(str(group) for group in sorted({weight.group or 0 for weight in weights.values()}) if group)
        in_groups = f" in groups of {groups}" if groups else ""
        return f"{self.method}, {bits} bits{in_groups}, {unquantized(checkpoint, parts)}"

    def _found(self, checkpoint: Checkpoint, stored: Imported) -> dict[str, PackedWeight]:
        found = dict(self.weights(checkpoint, stored.settings))
        if not found:
            raise CheckpointError(
                f"{checkpoint.folder}: config.json says {self.method}, but no weight is stored so; get back the "
                "config.json that belongs to the weights"
            )
        return found


def one_of(given: Mapping[str, Any], key: str, choices: Collection[Any], default: Any = None) -> Any:
    """A setting that has one of a few values; QuantError names another."""
    value = given.get(key, default)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        known = ", ".join(map(repr, choices))
        raise QuantError(f"quantization_config.{key} is {reprlib.repr(value)}; only {known} can be read")
    return value


def group_size(given: Mapping[str, Any], key: str = "group_size", default: Any = None) -> int | None:
    """How many columns share a scale; None (-1 in the file) for all of them. QuantError for anything else."""
    value = given.get(key, default)
    if value in (-1, None) and not isinstance(value, bool):
        return None
    if type(value) is not int or not 0 < value <= 1 << 24:
        raise QuantError(f"quantization_config.{key} is {reprlib.repr(value)}; expected a number of columns, or -1")
    return value


def groups_in(checkpoint: Checkpoint, name: str, columns: int, size: int | None) -> int:
    """How many groups a weight of so many columns has; CheckpointError where they do not divide it."""
    if size is not None and columns % size:
        raise CheckpointError(
            f"{name} in {checkpoint.file(name)}: {columns} columns are no multiple of config.json's groups of {size}; "
            "get back the config.json that belongs to the weights"
        )
    return 1 if size is None else columns // size
