"""A checkpoint with adapters: rows are merged as they are read, in the type they have, so that calibration and
quantizing see them; what is quantized already keeps its codes and gets a low-rank path beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glm4lite.base.errors import CheckpointError, ConfigError
from glm4lite.base.files import some
from glm4lite.base.stored_tensor import StoredTensor
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.registry import foreign_weight
from glm4lite.checkpoint.load_plan import Fill, LoadPlan
from glm4lite.checkpoint.lora.change import Branch, Change, Piece
from glm4lite.checkpoint.lora.factors import values
from glm4lite.checkpoint.lora.folder import Adapter
from glm4lite.checkpoint.lora.places import is_half, module_name, places
from glm4lite.model.config import Glm4Config
from glm4lite_quant import QuantConfig
from glm4lite_quant.config import CALIBRATED, KEPT
from glm4lite_quant.format import NAMES, Codes

_OPEN = 2  # modules whose factors are in memory: a weight and its bias
Pieces = Mapping[str, Sequence[Piece]]


@dataclass(frozen=True)
class Beside:
    """The paths beside one weight, by the number of an adapter that is chosen; 0: none of these."""

    fill: Fill
    paths: tuple[Branch, ...]

    @property
    def nbytes(self) -> int:
        return sum(path.nbytes(self.fill.shape[0]) for path in set(self.paths))


class AdaptedCheckpoint(Checkpoint):
    """Over another one, whose names are the model's already."""

    def __init__(
        self,
        source: Checkpoint,
        model: nn.Module,
        adapters: Sequence[Adapter],
        choices: Mapping[str, Adapter] = {},
        keep_codes: bool = True,
    ) -> None:
        """adapters: always on. choices: by name, one of them at most for a row of a step, besides those.

        keep_codes: whether what is quantized already stays so (else it is quantized again, with the adapters in it).

        Raises:
            CheckpointError: an adapter is for another model; names or shapes that do not fit are told.
            ConfigError: an adapter cannot be used so.
        """
        self._source, self._keep_codes = source, keep_codes
        self._shapes = _shapes(model)
        config: Any = model.config
        _check_tied(model, [*adapters, *choices.values()])
        self._always = self._pieces(config, adapters)
        self._choices = [self._pieces(config, [one]) for one in choices.values()]
        saved = _saved(adapters, choices)
        tensors = {name: source.stored(name) for name in source.names()}
        for name, tensor in saved.items():
            self._replace(tensors, name, tensor)
        super().__init__(source.folder, source.config, tensors, source.absent)
        self.origin, self._saved = source.origin, saved
        self._open: dict[str, Change] = {}
        self.choices = tuple(choices)
        self._every = (*((one, "") for one in adapters), *((one, name) for name, one in choices.items()))

    @property
    def saves(self) -> bool:
        """Whether adapters bring whole tensors of their own."""
        return bool(self._saved)

    def adapted_by(self, folder: Path) -> bool:
        return any(one.file.folder == folder for one, _ in self._every)

    def identities(self) -> tuple[bytes, Mapping[str, bytes]]:
        """What tells the adapters from all others: of those that are always on, and of each choice by its name."""
        always = hashlib.blake2b(b"".join(one.digest() for one, name in self._every if not name), digest_size=16)
        return always.digest(), {name: one.digest() for one, name in self._every if name}

    def beside(self, plan: LoadPlan) -> list[Beside]:
        """Which weights need a path beside them, for what was planned of this checkpoint."""
        with_bias = {fill.source.removesuffix(".bias") for fill in plan.fills if fill.parameter == "bias"}
        found = []
        for fill in plan.fills:
            module, leaf = _split(fill.source)
            if leaf != "weight":
                continue
            always = tuple(self._always.get(module, ()))
            first = Branch(
                always if fill.parts or _keeps(fill) else (), () if module in with_bias else _with_bias(always)
            )
            others = [tuple(pieces.get(module, ())) for pieces in self._choices]
            rest = [Branch(first.weights + own, first.biases + _with_bias(own)) for own in others]
            if any(path.weights or path.biases for path in (first, *rest)):
                found.append(Beside(fill, (first, *rest)))
        return found

    def tensor(self, name: str) -> Tensor:
        if name not in self._saved and not self._changes(name):
            return self._source.tensor(name)
        shape = self.shape(name)
        return self.rows(name, 0, shape[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._saved:
            dtype = torch.bfloat16 if self.dtype(name) == "BF16" else torch.float32
            rows = values(self._saved[name].rows(start, stop)).to(dtype)
        else:
            rows = self._source.rows(name, start, stop)
        if not self._changes(name):
            return rows
        module, leaf = _split(name)
        change, given = self._change(module), rows.float()
        if leaf == "weight":
            made = change.applied(given, start)
        else:
            whole = torch.zeros(self.shape(name)[0])
            made = given + change.biased(whole)[start:stop]
        return made.to(torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32)

    def mapped(self, name: str) -> Tensor:
        return self.tensor(name) if name in self._saved or self._changes(name) else self._source.mapped(name)

    def codes(self, name: str, start: int, stop: int, group: int) -> Codes:
        return self._source.codes(name, start, stop, group)

    def quant_for(self, name: str, config: QuantConfig) -> QuantConfig:
        found = self._source.quant_for(name, config)
        again = found.method == KEPT and not self._keep_codes and self._changes(name)
        return replace(found, method=CALIBRATED) if again else found

    def outcome(self, quants: Mapping[str, object]) -> str | None:
        return self._source.outcome(quants)

    def _changes(self, name: str) -> bool:
        module, leaf = _split(name)
        pieces = self._always.get(module, ())
        return bool(pieces) and (leaf == "weight" or (leaf == "bias" and bool(_with_bias(pieces))))

    def _change(self, module: str) -> Change:
        if module not in self._open:
            while len(self._open) >= _OPEN:
                del self._open[next(iter(self._open))]
            self._open[module] = Change(self._always[module])
        return self._open[module]

    def _pieces(self, config: Glm4Config, adapters: Iterable[Adapter]) -> dict[str, list[Piece]]:
        """By the module that they change. What does not fit is told by name."""
        found: dict[str, list[Piece]] = {}
        for adapter in adapters:
            strange: list[str] = []
            for factors in adapter.file.factors:
                rows, columns = factors.shape
                for module, first, count, at in places(factors.name, rows, config, factors.b.path):
                    shape = self._shapes.get(module)
                    if shape is None:
                        strange.append(factors.name)
                        continue
                    parts = 2 if is_half(factors.name) else 1
                    if (parts * count, columns) != shape:
                        raise CheckpointError(
                            f"{adapter.name} is for another model: {some([factors.name])} changes a weight of "
                            f"[{rows}, {columns}], the model's {module} is {list(shape)}"
                        )
                    found.setdefault(module, []).append(Piece(factors, first, count, at, adapter.scale))
            if strange:
                raise CheckpointError(
                    f"{adapter.name} is for another model: it changes {some(strange)}, which {self._source.origin} "
                    "does not have"
                )
        return found

    def _replace(self, tensors: dict[str, StoredTensor], name: str, saved: StoredTensor) -> None:
        """A whole tensor of an adapter's, in the place of the checkpoint's."""
        module, leaf = _split(name)
        parts = [f"{module}.{part}" for part in NAMES if leaf == "weight" and f"{module}.{part}" in tensors]
        foreign = foreign_weight(self._source, name) if leaf == "weight" else None
        if foreign is not None:
            raise ConfigError(f"an adapter saves {name}, which is quantized by another tool here; load it as int4")
        old = tensors.get(name)
        if old is None and not (leaf == "weight" and (parts or module == "score")):
            raise CheckpointError(
                f"{saved.path} holds {some([saved.name])}, which {self._source.origin} does not have: the adapter is "
                "for another model"
            )
        wanted = old.shape if old is not None else self._shapes.get(module)
        if wanted is not None and saved.shape != wanted:
            raise CheckpointError(
                f"{some([saved.name])} in {saved.path} is {list(saved.shape)}, the model's {name} {list(wanted)}: the "
                "adapter is for another model, or one with tokens added"
            )
        for part in parts:
            del tensors[part]
        tensors[name] = saved if old is None else old


def _shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The linears and embeddings, by the names they have in a checkpoint."""
    prefix = "" if hasattr(model, "model") else "model."
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            rows, columns = module.weight.shape
            found[f"{prefix}{name}"] = (int(rows), int(columns))
    return found


def _check_tied(model: nn.Module, adapters: Sequence[Adapter]) -> None:
    config: Any = model.config
    if not config.tie_word_embeddings:
        return
    for adapter in adapters:
        for name in (*(one.name for one in adapter.file.factors), *adapter.file.saved):
            if "embed_tokens" in name or "lm_head" in name:
                raise ConfigError(f"{adapter.name} changes {some([name])}, but the model's head is its embedding")


def _saved(adapters: Sequence[Adapter], choices: Mapping[str, Adapter]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for adapter in (*adapters, *choices.values()):
        names = {module_name(name): tensor for name, tensor in adapter.file.saved.items()}
        if not names:
            continue
        what = f"{adapter.name} saves whole tensors ({some(sorted(names))})"
        if adapter in choices.values():
            raise ConfigError(f"{what}, which cannot be switched from request to request; give it as --lora")
        if adapter.scale != 1:
            raise ConfigError(f"{what}, which have no scale; give it without")
        twice = sorted(names.keys() & found.keys())
        if twice:
            raise ConfigError(f"two adapters save {some(twice)}; give one of them")
        found |= names
    return found


def _split(name: str) -> tuple[str, str]:
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _with_bias(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    return tuple(piece for piece in pieces if piece.factors.bias is not None)


def _keeps(fill: Fill) -> bool:
    return isinstance(fill.quant, QuantConfig) and fill.quant.method == KEPT
