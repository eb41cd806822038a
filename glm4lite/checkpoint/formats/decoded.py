"""Another tool's checkpoint as if it were a plain one: rows are decoded as they are read, under the names of GLM-4.

Calibrating, quantizing, writing and `eval` need not know. Only a weight that is quantized to int4 is asked for its
codes: affine ones of at most four bits, in groups that ours divide, are kept as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from glm4lite.base.errors import CheckpointError
from glm4lite.base.files import CONFIG
from glm4lite.base.stored_tensor import StoredTensor
from glm4lite.checkpoint import legacy
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.weight import Affine, Opened, PackedWeight
from glm4lite.model.config import Glm4Config
from glm4lite_quant import QuantConfig
from glm4lite_quant.config import CALIBRATED, GROUP_SIZES, KEPT, SEARCH
from glm4lite_quant.format import COLS, Codes

SPLIT = re.compile(r"(.*\.mlp)\.(gate|up)_proj\.weight")
"""Some tools store the two halves of `gate_up_proj` apart."""

_WORDY_BITS = 4  # what has more bits in a file of kept codes was given them on purpose
_OPEN = 2  # weights whose scales are in memory: gate and up are read in turn


@dataclass(frozen=True)
class Piece:
    """`count` rows of a weight from `first` on; a tensor of the model is one or several, one below the other."""

    name: str
    weight: PackedWeight
    first: int
    count: int


class DecodedCheckpoint(Checkpoint):
    """A checkpoint over another one, of which `weights` are quantized; all else is as it is there."""

    def __init__(self, checkpoint: Checkpoint, weights: Mapping[str, PackedWeight], tool: str = "") -> None:
        """weights: by the names that the plain weights would have there. tool: for `outcome`; "" says nothing."""
        self._tool = tool
        config = {key: value for key, value in checkpoint.config.items() if not key.startswith("quantization")}
        hidden = {part for weight in weights.values() for part in weight.parts}
        plain = {name for name in checkpoint.names() if name not in hidden}
        self._source, self._pieces = checkpoint, _pieces(checkpoint, weights, plain)
        tensors = {name: checkpoint.stored(name) for name in checkpoint.names() if name in plain}
        for name, pieces in self._pieces.items():
            shape, dtype = _joined(checkpoint, name, pieces)
            first = checkpoint.stored(pieces[0].weight.parts[0])
            tensors[name] = replace(first, name=name, dtype=dtype, shape=shape)
        super().__init__(checkpoint.folder, config, tensors, checkpoint.absent)
        self.origin = checkpoint.origin
        self._opened: dict[str, Opened] = {}

    def parts(self, name: str) -> list[StoredTensor]:
        if name not in self._pieces:
            return super().parts(name)
        return [self._source.stored(part) for piece in self._pieces[name] for part in piece.weight.parts]

    def release(self, path: Path) -> None:
        self._opened.clear()
        self._source.release(path)
        super().release(path)

    def tensor(self, name: str) -> Tensor:
        return self.rows(name, 0, self.shape(name)[0]) if name in self._pieces else super().tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._pieces:
            return super().rows(name, start, stop)
        dtype = torch.bfloat16 if self.dtype(name) == "BF16" else torch.float32
        parts = [opened.rows(a, b).to(dtype) for opened, a, b in self._ranges(name, start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def codes(self, name: str, start: int, stop: int, group: int) -> Codes:
        """Rows of a weight for which `quant_for` said that its codes are kept, in groups of `group`."""
        parts = []
        for opened, a, b in self._ranges(name, start, stop):
            if not isinstance(opened, Affine) or opened.order is not None:
                raise CheckpointError(f"{name} in {self.file(name)} has no codes that can be kept; load it as int8")
            parts.append(opened.codes(a, b).in_groups(group))
        if len(parts) == 1:
            return parts[0]
        values, step, low = (torch.cat([getattr(part, plane) for part in parts]) for plane in ("values", "step", "low"))
        return Codes(values, step, low, max(part.levels for part in parts))

    @property
    def packed(self) -> frozenset[str]:
        """The tensors that are decoded."""
        return frozenset(self._pieces)

    def has_codes(self, name: str, group: int) -> bool:
        """Whether a weight can be asked for its codes in groups of so many columns."""
        groups = [piece.weight.group for piece in self._pieces.get(name, ())]
        return bool(groups) and all(size is not None and size % group == 0 for size in groups)

    def quant_for(self, name: str, config: QuantConfig) -> QuantConfig:
        pieces = self._pieces.get(name)
        if pieces is None or config.bits != 4:
            return config
        if all((piece.weight.kept_group or 1) % config.group_size == 0 for piece in pieces):
            return replace(config, method=KEPT)
        calibrated = all(piece.weight.calibrate for piece in pieces)
        if config.method == KEPT or (config.method == CALIBRATED and not calibrated):
            return replace(config, method=CALIBRATED if calibrated else SEARCH)
        return config

    def outcome(self, quants: Mapping[str, object]) -> str | None:
        if not self._tool:
            return None
        of_pieces = [quants[name] for name in self._pieces if name in quants]
        kept = sum(isinstance(quant, QuantConfig) and quant.method == KEPT for quant in of_pieces)
        again = sum(quant is not None for quant in of_pieces) - kept
        counts = ((kept, "keep their codes"), (again, "are decoded and quantized again"))
        plain = len(of_pieces) - kept - again
        said = [f"{count} {what}" for count, what in (*counts, (plain, "are decoded")) if count]
        return f"{self._tool}: of {len(of_pieces)} quantized weights {' and '.join(said)}"

    def fitted(self, wanted: QuantConfig) -> QuantConfig:
        """The int4 that keeps as many codes as can be; `wanted` itself where nobody can tell it from what was asked.

        Weights of more bits beside kept ones become int8: whoever made the file gave them more on purpose.
        """
        groups = {name: _kept_group(pieces) for name, pieces in self._pieces.items()}
        kept = {name for name, group in groups.items() if group is not None}
        if wanted != QuantConfig() or not kept:
            return wanted
        widths = [shape[1] for name in self.names() if len(shape := self.shape(name)) == 2 and shape[1] % COLS == 0]
        sizes = [group for group in groups.values() if group is not None] + widths
        group_size = next(size for size in reversed(GROUP_SIZES) if all(one % size == 0 for one in sizes))
        bits = {name: self._bits(name, name in kept, wanted) for name in self.names() if len(self.shape(name)) == 2}
        own = _exceptions(bits, wanted)
        exceptions = (*own.items(), *((name, count) for name, count in wanted.exceptions if name not in own))
        return replace(wanted, group_size=group_size, exceptions=exceptions, method=KEPT)

    def _bits(self, name: str, kept: bool, wanted: QuantConfig) -> int | None:
        if kept or (name in self._pieces and _wordy(self._pieces[name])):
            return 4 if kept else 8
        own = wanted.for_module(_module(name))
        return None if own is None else own.bits

    def _ranges(self, name: str, start: int, stop: int) -> Iterator[tuple[Opened, int, int]]:
        """The opened weights that rows start to stop-1 are of, each with its own rows."""
        if not 0 <= start <= stop <= self.shape(name)[0]:
            raise CheckpointError(f"{name} in {self.file(name)} has shape {list(self.shape(name))}: no row {stop}")
        before = 0
        for piece in self._pieces[name]:
            a, b = max(start - before, 0), min(stop - before, piece.count)
            if a < b or (start == stop and a == b):
                yield self._open(piece), piece.first + a, piece.first + b
            before += piece.count

    def _open(self, piece: Piece) -> Opened:
        if piece.name not in self._opened:
            while len(self._opened) >= _OPEN:
                del self._opened[next(iter(self._opened))]
            self._opened[piece.name] = piece.weight.open(self._source)
        return self._opened[piece.name]


def joined(checkpoint: Checkpoint) -> Checkpoint:
    """An unquantized checkpoint with the halves of `gate_up_proj` put together where they are stored apart."""
    return DecodedCheckpoint(checkpoint, {}) if any(map(SPLIT.fullmatch, checkpoint.names())) else checkpoint


def _pieces(
    checkpoint: Checkpoint, weights: Mapping[str, PackedWeight], plain: set[str]
) -> dict[str, tuple[Piece, ...]]:
    """The tensors of the model that are made of these weights; of `plain`, those that are halves of one are taken out.

    Of a half that is quantized the other may be plain.
    """
    halves = [name for name in sorted(plain) if SPLIT.fullmatch(name) and len(checkpoint.shape(name)) == 2]
    plain.difference_update(halves)
    found: dict[str, dict[int, Piece]] = {}
    every = {**weights, **{name: _plain(checkpoint, name) for name in halves}}
    for name, weight in every.items():
        for new, place, first, count in _places(checkpoint, name, weight.shape[0]):
            if place in (of_new := found.setdefault(new, {})):
                raise CheckpointError(f"{checkpoint.folder} holds {new} twice; download it again")
            of_new[place] = Piece(name, weight, first, count)
    for of_new in found.values():
        if 0 not in of_new or (1 not in of_new and SPLIT.fullmatch(of_new[0].name)):
            half = next(iter(of_new.values())).name
            raise CheckpointError(f"{checkpoint.folder} has {half} without its other half; download it again")
    return {new: tuple(of_new[place] for place in sorted(of_new)) for new, of_new in found.items()}


def _places(checkpoint: Checkpoint, name: str, rows: int) -> Iterator[tuple[str, int, int, int]]:
    """(tensor of the model, place among its pieces, first row, rows) that a stored weight is."""
    if checkpoint.config.get("model_type") == "chatglm":
        config = Glm4Config.from_dict(checkpoint.config, checkpoint.folder / CONFIG)
        file = checkpoint.folder
        yield from ((new, 0, first, count) for new, first, count in legacy.places(name, rows, config, file))
        return
    half = SPLIT.fullmatch(name)
    if half is not None:
        yield f"{half[1]}.gate_up_proj.weight", int(half[2] == "up"), 0, rows
        return
    yield name, 0, 0, rows


def _plain(checkpoint: Checkpoint, name: str) -> PackedWeight:
    """A weight that nobody quantized, as a piece beside one that somebody did."""
    rows, columns = checkpoint.shape(name)
    dtype = "BF16" if checkpoint.dtype(name) == "BF16" else "F32"
    return PackedWeight((name,), (rows, columns), dtype, 16, None, lambda source: _Rows(source, name), calibrate=True)


@dataclass(frozen=True)
class _Rows:
    checkpoint: Checkpoint
    name: str

    def rows(self, start: int, stop: int) -> Tensor:
        return self.checkpoint.rows(self.name, start, stop)


def _joined(checkpoint: Checkpoint, name: str, pieces: tuple[Piece, ...]) -> tuple[tuple[int, int], str]:
    """Shape and type of the pieces as one."""
    widths = {piece.weight.shape[1] for piece in pieces}
    if len(widths) > 1:
        both = " and ".join(map(str, sorted(widths)))
        raise CheckpointError(f"{checkpoint.folder}: the parts of {name} have {both} columns; download it again")
    dtype = "BF16" if all(piece.weight.dtype == "BF16" for piece in pieces) else "F32"
    return (sum(piece.count for piece in pieces), widths.pop()), dtype


def _kept_group(pieces: tuple[Piece, ...]) -> int | None:
    groups = [piece.weight.kept_group for piece in pieces]
    found = [group for group in groups if group is not None]
    return min(found) if len(found) == len(groups) else None


def _wordy(pieces: tuple[Piece, ...]) -> bool:
    return all(piece.weight.bits > _WORDY_BITS for piece in pieces) and any(piece.weight.bits < 16 for piece in pieces)


def _exceptions(bits: Mapping[str, int | None], wanted: QuantConfig) -> dict[str, int | None]:
    """What makes `wanted` give each weight these bits: by the last name where all of it agree, else by the whole."""
    leaves: dict[str, set[int | None]] = {}
    for name, count in bits.items():
        leaves.setdefault(_module(name).rpartition(".")[2], set()).add(count)
    found: dict[str, int | None] = {}
    for name, count in bits.items():
        module = _module(name)
        own, leaf = wanted.for_module(module), module.rpartition(".")[2]
        if count != (None if own is None else own.bits):
            found[leaf if len(leaves[leaf]) == 1 else f"*{module.removeprefix('model.')}"] = count
    return found


def _module(name: str) -> str:
    return name.removesuffix(".weight")
