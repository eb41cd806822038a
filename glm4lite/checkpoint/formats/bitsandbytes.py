"""Checkpoints that bitsandbytes quantized to 4 bits: each weight's description, checked, and the weight itself.

Beside `X.weight` (the codes) lie `X.weight.absmax`, `.quant_map`, with double quantization `.nested_absmax` and
`.nested_quant_map`, and `X.weight.quant_state.bitsandbytes__nf4` (or fp4): JSON packed into a uint8 tensor. A weight
is 4-bit where these lie beside it and plain where they do not, whatever config.json lists as exceptions.
"""

from __future__ import annotations

import json
import logging
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glm4lite.base.errors import CheckpointError, ConfigError
from glm4lite.base.files import parse_json
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.decoded import DecodedCheckpoint
from glm4lite.checkpoint.formats.format import Quant, Stored, declared, unquantized
from glm4lite.checkpoint.formats.weight import Opened, PackedWeight, wrong
from glm4lite_quant import BnbConfig, BnbTensor, QuantConfig, QuantError, QuantTensor, bnb
from glm4lite_quant.format import NAMES as PLANES

logger = logging.getLogger("glm4lite")

STATE = "quant_state.bitsandbytes__"
_SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(STATE + kind for kind in bnb.QUANT_MAPS))
_KEYS = frozenset({"quant_type", "blocksize", "dtype", "shape"})
_NESTED_KEYS = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})
_DTYPES: Mapping[str, str] = {"bfloat16": "BF16", "float32": "F32", "float16": "F32"}
"""The type a weight had -> the safetensors type it is decoded to."""
_MAX_STATE_BYTES = 10_000


@dataclass(frozen=True)
class BnbWeight:
    """What a checkpoint says of one 4-bit weight; `parts` are the names of its tensors, the codes' first."""

    kind: str
    blocksize: int
    shape: tuple[int, int]
    dtype: str
    nested_offset: float | None
    parts: tuple[str, ...]

    @property
    def blocks(self) -> int:
        return math.ceil(math.prod(self.shape) / self.blocksize)

    def read(self, checkpoint: Checkpoint) -> BnbTensor:
        """The weight over the mapped file, its codes not copied.

        Raises:
            CheckpointError: a scale is not finite, or the values of the codes are others than this kind's.
        """
        name = self.parts[0]

        def mapped(part: str) -> Tensor:
            tensor = checkpoint.mapped(f"{name}.{part}").flatten()
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise wrong(checkpoint, name, f"has a number in {part} that is not finite")
            return tensor

        quant_map = bnb.quant_map(self.kind)
        if not torch.allclose(mapped("quant_map"), quant_map, rtol=0, atol=1e-4):
            raise wrong(checkpoint, name, f"has another quant_map than {self.kind}'s")
        nested: dict[str, Tensor] = {}
        if self.nested_offset is not None:
            nested = {part: mapped(part) for part in ("nested_absmax", "nested_quant_map")}
            nested["nested_offset"] = torch.tensor(self.nested_offset)
        packed = checkpoint.mapped(name).flatten().view(torch.uint8)  # may be stored as wider elements, for sharding
        return BnbTensor(self.kind, self.shape, self.blocksize, packed, mapped("absmax"), quant_map, **nested)


def find_weight(checkpoint: Checkpoint, name: str) -> BnbWeight | None:
    """The description of the 4-bit weight `name`; None for a plain one.

    Raises:
        CheckpointError: its tensors contradict each other or its description, or one is missing.
    """
    found = [suffix for suffix in _SUFFIXES if f"{name}.{suffix}" in checkpoint]
    if not found or name not in checkpoint:
        return None
    states = [suffix for suffix in found if suffix.startswith(STATE)]
    if len(states) != 1:
        what = "no quant_state of nf4 or fp4" if not states else "two quant_states"
        raise wrong(checkpoint, name, f"has {what} beside its {found[0]}")
    try:
        fields = _state(checkpoint, f"{name}.{states[0]}")
        weight = _described(fields, tuple(f"{name}{part}" for part in ("", *(f".{suffix}" for suffix in found))))
        if weight.kind != states[0].removeprefix(STATE):
            raise ValueError(f"quant_type is {weight.kind!r} in a {states[0]}")
        _check_tensors(checkpoint, name, weight)
    except ValueError as error:
        raise wrong(checkpoint, name, f"is not as bitsandbytes writes it: {error}") from None
    return weight


def find_weights(checkpoint: Checkpoint, stored: BnbConfig) -> dict[str, BnbWeight]:
    """All 4-bit weights by name.

    Raises:
        CheckpointError: one of them is damaged, or they are not what config.json says.
    """
    found = {name: weight for name in checkpoint.names() if (weight := find_weight(checkpoint, name)) is not None}
    other = next((name for name, weight in found.items() if weight.kind != stored.kind), None)
    if other is not None or not found:
        what = f"{other} is {found[other].kind}" if other else "no weight is stored in 4 bits"
        raise CheckpointError(
            f"{checkpoint.folder}: {what}, but config.json says {stored.kind}; get back the config.json that belongs "
            "to the weights"
        )
    return found


def _state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The JSON of a quant_state; ValueError says what is wrong with it."""
    if checkpoint.dtype(name) != "U8" or checkpoint.nbytes(name) > _MAX_STATE_BYTES:
        raise ValueError(f"it is {checkpoint.dtype(name)} {list(checkpoint.shape(name))}, not a text")
    try:
        fields = parse_json(bytes(checkpoint.tensor(name).flatten().tolist()))
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError("it is not a JSON object")
    known = _KEYS | (_NESTED_KEYS if fields.keys() & _NESTED_KEYS else frozenset())
    for key in sorted(known ^ fields.keys()):
        raise ValueError(f"{reprlib.repr(key)} is {'missing' if key in known else 'not known'}")
    return fields


def _described(fields: Mapping[str, Any], parts: tuple[str, ...]) -> BnbWeight:
    def one_of(key: str, choices: tuple[Any, ...]) -> Any:
        value = fields[key]
        if type(value) is not type(choices[0]) or value not in choices:
            raise ValueError(f"{key} is {reprlib.repr(value)}; expected one of {', '.join(map(str, choices))}")
        return value

    kind, blocksize = one_of("quant_type", tuple(bnb.QUANT_MAPS)), one_of("blocksize", bnb.BLOCK_SIZES)
    shape, offset = fields["shape"], None
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise ValueError(f"shape is {reprlib.repr(shape)}; expected two sizes")
    if "nested_offset" in fields:
        one_of("nested_blocksize", (bnb.NESTED_BLOCK_SIZE,))
        one_of("nested_dtype", ("float32",))
        offset = fields["nested_offset"]
        if not isinstance(offset, float):
            raise ValueError(f"nested_offset is {reprlib.repr(offset)}; expected a finite number")
    return BnbWeight(kind, blocksize, (shape[0], shape[1]), one_of("dtype", tuple(_DTYPES)), offset, parts)


def _check_tensors(checkpoint: Checkpoint, name: str, weight: BnbWeight) -> None:
    """Types and sizes of the tensors beside the description; ValueError names the one that is wrong."""
    expected: dict[str, tuple[str, int]] = {"quant_map": ("F32", 16), "absmax": ("F32", weight.blocks)}
    if weight.nested_offset is not None:
        expected["absmax"] = ("U8", weight.blocks)
        expected["nested_absmax"] = ("F32", math.ceil(weight.blocks / bnb.NESTED_BLOCK_SIZE))
        expected["nested_quant_map"] = ("F32", 256)
    for part, (dtype, count) in expected.items():
        tensor = f"{name}.{part}"
        if tensor not in checkpoint:
            raise ValueError(f"{part} is missing")
        found = checkpoint.dtype(tensor), math.prod(checkpoint.shape(tensor))
        if found != (dtype, count):
            raise ValueError(f"{part} holds {found[1]} numbers of {found[0]}; its shape needs {count} of {dtype}")
    for part in ("nested_absmax", "nested_quant_map"):
        if part not in expected and f"{name}.{part}" in checkpoint:
            raise ValueError(f"it does not speak of the {part} beside it")
    needed = math.ceil(math.prod(weight.shape) / 2)
    if checkpoint.nbytes(name) != needed:
        raise ValueError(
            f"shape {list(weight.shape)} needs {needed} bytes of codes, {checkpoint.nbytes(name)} are there"
        )


def tensors_of(name: str, weight: BnbTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A 4-bit weight under the names and in the shapes that bitsandbytes writes; dtype: what it is decoded to."""
    state: dict[str, Any] = {
        "quant_type": weight.kind,
        "blocksize": weight.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {name: weight.packed.view(-1, 1), f"{name}.absmax": weight.absmax, f"{name}.quant_map": weight.quant_map}
    if weight.nested_absmax is not None and weight.nested_quant_map is not None and weight.nested_offset is not None:
        tensors |= {
            f"{name}.nested_absmax": weight.nested_absmax,
            f"{name}.nested_quant_map": weight.nested_quant_map,
        }
        state |= {
            "nested_blocksize": bnb.NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": float(weight.nested_offset),
        }
    packed = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {f"{name}.{STATE}{weight.kind}": packed}


def decoded(checkpoint: Checkpoint, found: Mapping[str, BnbWeight]) -> DecodedCheckpoint:
    """The checkpoint with plain weights.

    Beside bitsandbytes' weights may lie int8 ones of ours, as `save_pretrained` writes embedding and head.
    """
    weights = {name: _packed(name, weight) for name, weight in found.items()}
    for name, parts in _own_weights(checkpoint):
        shape = _own_weight(checkpoint, parts, checkpoint.outline).shape
        weights[name] = PackedWeight(parts, shape, "BF16", 8, None, partial(_opened_own, parts), calibrate=True)
    return DecodedCheckpoint(checkpoint, weights, bnb.QUANT_METHOD)


def _packed(name: str, weight: BnbWeight) -> PackedWeight:
    dtype = _DTYPES[weight.dtype]
    return PackedWeight(weight.parts, weight.shape, dtype, 4, None, lambda source: _Rows(weight.read(source)), True)


def _opened_own(parts: tuple[str, ...], checkpoint: Checkpoint) -> Opened:
    return _OwnRows(_own_weight(checkpoint, parts, checkpoint.mapped))


@dataclass(frozen=True)
class _Rows:
    weight: BnbTensor

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weight.rows(start, stop, torch.float32)


@dataclass(frozen=True)
class _OwnRows:
    weight: QuantTensor

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weight.rows(torch.arange(start, stop))


def _own_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The weights of our own format, and the names of their planes."""
    for name in checkpoint.names():
        module = name.removesuffix(".qweight")
        if module != name:
            yield f"{module}.weight", tuple(part for p in PLANES if (part := f"{module}.{p}") in checkpoint)


def _own_weight(checkpoint: Checkpoint, parts: tuple[str, ...], read: Callable[[str], Tensor]) -> QuantTensor:
    """CheckpointError where its planes are none."""
    try:
        weight = QuantTensor.from_tensors({part.rpartition(".")[2]: read(part) for part in parts})
        if weight.device.type != "meta":
            weight.check_finite()
    except QuantError as error:
        raise wrong(checkpoint, parts[0], f"is damaged: {error}") from None
    return weight


class _Bitsandbytes:
    """The format, as `formats.format.Format` describes one."""

    method = bnb.QUANT_METHOD
    cpu_note = "on a CPU bitsandbytes unpacks a whole weight at each use: quant='int4' is several times faster"

    def config(self, given: Mapping[str, Any]) -> BnbConfig:
        return BnbConfig.from_dict(given)

    def declared(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return declared(config, self.method)

    def owns(self, stored: Stored) -> bool:
        return isinstance(stored, BnbConfig)

    def find(self, checkpoint: Checkpoint, name: str) -> BnbWeight | None:
        return find_weight(checkpoint, name)

    def adapt(
        self, checkpoint: Checkpoint, stored: BnbConfig, wanted: Quant | None, asked: bool
    ) -> tuple[Checkpoint, BnbConfig | None, Quant | None]:
        """(checkpoint, how it is kept, what to quantize to) for a 4-bit checkpoint and what was asked for, if anything.

        Raises:
            CheckpointError: the weights are damaged, or not what config.json says.
            ConfigError: the other 4-bit kind was asked for.
            QuantError: its own kind was asked for, and bitsandbytes is not installed.
        """
        found = find_weights(checkpoint, stored)
        if isinstance(wanted, BnbConfig):
            if wanted.kind != stored.kind:
                raise ConfigError(
                    f"{checkpoint.folder} is quantized to {stored.kind} already; load it without quant, or use the "
                    "original"
                )
            bnb.library()
        if isinstance(wanted, BnbConfig) or (not asked and bnb.available()):
            return checkpoint, stored, None
        if not asked:
            wanted, once = QuantConfig(), "`glm4lite quantize` does it once"
            logger.warning("bitsandbytes cannot be used here, so %s becomes int4; %s", stored.kind, once)
        return decoded(checkpoint, found), None, wanted

    def described(self, checkpoint: Checkpoint, stored: BnbConfig) -> str:
        weights = find_weights(checkpoint, stored).values()
        blocks = ", ".join(map(str, sorted({weight.blocksize for weight in weights})))
        double = ", double quantization" if any(weight.nested_offset is not None for weight in weights) else ""
        absent = "" if bnb.available() else "; bitsandbytes cannot be used here, so it loads as int4"
        plain = unquantized(checkpoint, {part for weight in weights for part in weight.parts})
        return f"{stored.kind} of bitsandbytes, blocks of {blocks}{double}, {plain}{absent}"


BITSANDBYTES = _Bitsandbytes()
