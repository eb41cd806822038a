"""4-bit weights in bitsandbytes' format (NF4, FP4): the weight, its layer, and the only import of bitsandbytes.

`w = quant_map[code] * absmax[block]`: codes are nibbles, the first of two values in the high one; blocks of `blocksize`
values run along the flattened [N, K]. Double quantization stores absmax as bytes:
`absmax[b] = nested_quant_map[byte[b]] * nested_absmax[b // 256] + nested_offset`.

Decoding is plain torch, equal to bitsandbytes' own bit for bit, and needs no bitsandbytes; quantizing and multiplying
are its functions. Source: bitsandbytes 0.50 (functional.py), QLoRA (https://arxiv.org/abs/2305.14314).
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4lite_quant.config import QuantConfig, QuantError
from glm4lite_quant.format import SCRATCH_ELEMENTS
from glm4lite_quant.linear import UncastModule, check_input

QUANT_METHOD = "bitsandbytes"
BLOCK_SIZE = 64
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256

_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
QUANT_MAPS: Mapping[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (*_FP4, *(-value or 0.0 for value in _FP4)),  # over 12, in float32: `quant_map`
}
"""What the 16 codes stand for, as bitsandbytes writes them down."""

# Names of a BnbTensor's tensors, those of a layer's buffers too.
NAMES = ("packed", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")

INT8_REASON = (
    "quant 'llm.int8' is refused: its activations are float16, and GLM-4's reach 68000, above float16's largest "
    "number; use int8"
)


def quant_map(kind: str, device: str | torch.device = "cpu") -> Tensor:
    """float32 [16]: the values of the codes, the largest of them 1."""
    values = torch.tensor(QUANT_MAPS[kind], dtype=torch.float32, device=device)
    return values / values.abs().max()


def library() -> Any:
    """The package; QuantError where it is not installed or does not load."""
    found = sys.modules.get("bitsandbytes")
    if found is not None:
        return found
    try:
        with _no_code_from_the_hub():
            import bitsandbytes
    except Exception as error:  # a broken installation raises what it likes
        why = str(error).strip().partition("\n")[0]
        raise QuantError(f"nf4 and fp4 need bitsandbytes ({why}): pip install 'glm4lite[bnb]', or use int4") from None
    return bitsandbytes


@contextmanager
def _no_code_from_the_hub() -> Iterator[None]:
    """On some processors bitsandbytes' import downloads a kernel and runs it, where `kernels` is installed.

    What it is for is not used here, nor is the warning of its absence.
    """
    hidden, name = sys.modules.get("kernels"), "kernels"
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, logger.disabled = logger.disabled, True
    sys.modules[name] = None  # type: ignore[assignment]  # the way to say that an import fails
    try:
        yield
    finally:
        logger.disabled = before
        del sys.modules[name]
        if hidden is not None:
            sys.modules[name] = hidden


def available() -> bool:
    try:
        library()
    except QuantError:
        return False
    return True


@dataclass(frozen=True)
class BnbConfig:
    """kind "nf4" or "fp4"; double_quant: the blocks' scales in 8 bits too (4.13 instead of 4.5 bits a weight)."""

    kind: str = "nf4"
    double_quant: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in QUANT_MAPS:
            raise QuantError(f"a bitsandbytes kind is {self.kind!r}; use nf4 or fp4")
        if not isinstance(self.double_quant, bool):
            raise QuantError(f"double_quant is {self.double_quant!r}; use True or False")

    @property
    def method(self) -> str:
        """How the scales are found, as QuantConfig.method: bitsandbytes does it its own way."""
        return self.kind

    def for_module(self, name: str) -> BnbConfig | QuantConfig | None:
        """The config of one module by its dotted name (None: leave it unquantized).

        Head and embedding become int8 of our own: bitsandbytes would leave them as they are, a third of a 9B.
        """
        own = QuantConfig(bits=8).for_module(name)
        return own if own is None or name.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens") else self

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json, as Transformers writes it."""
        return {
            "quant_method": QUANT_METHOD,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": self.double_quant,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> BnbConfig:
        """Reads what Transformers wrote; QuantError names what cannot be used. Other keys mean nothing to a reader."""
        if d.get("load_in_8bit"):
            raise QuantError(
                "quantization_config.load_in_8bit (LLM.int8) is refused: its activations are float16, and GLM-4's "
                "reach 68000, above float16's largest number (glm4lite's own int8 has no such limit)"
            )
        if d.get("load_in_4bit") is not True:
            raise QuantError(f"quantization_config.load_in_4bit is {d.get('load_in_4bit')!r}; expected true")
        kind, double = d.get("bnb_4bit_quant_type", "fp4"), d.get("bnb_4bit_use_double_quant", False)
        if not isinstance(kind, str) or kind not in QUANT_MAPS:
            raise QuantError(f"quantization_config.bnb_4bit_quant_type is {kind!r}; expected nf4 or fp4")
        if not isinstance(double, bool):
            raise QuantError(f"quantization_config.bnb_4bit_use_double_quant is {double!r}; expected true or false")
        return cls(kind, double)


@dataclass
class BnbTensor:
    """A weight [N, K] of `kind` "nf4" or "fp4"; the nested tensors are there with double quantization."""

    kind: str
    shape: tuple[int, int]
    blocksize: int
    packed: Tensor  # uint8 [ceil(N*K/2)]
    absmax: Tensor  # float32 [blocks], nested: uint8
    quant_map: Tensor  # float32 [16]
    nested_absmax: Tensor | None = None  # float32 [ceil(blocks/256)]
    nested_quant_map: Tensor | None = None  # float32 [256]
    nested_offset: Tensor | None = None  # float32 []

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def device(self) -> torch.device:
        """Where all its tensors are."""
        return self.packed.device

    def tensors(self) -> dict[str, Tensor]:
        """Those it has, by their names in NAMES."""
        return {name: tensor for name in NAMES if (tensor := getattr(self, name)) is not None}

    def to(self, device: torch.device) -> BnbTensor:
        """A copy on the device; the same tensors where they are there already."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return BnbTensor(self.kind, self.shape, self.blocksize, **moved)

    @classmethod
    def empty(cls, n: int, k: int, config: BnbConfig, device: str | torch.device = "cpu") -> BnbTensor:
        """A zero weight to be filled by `quantize_rows` (on "meta": shapes only)."""
        packed = torch.zeros(math.ceil(n * k / 2), dtype=torch.uint8, device=device)
        absmax = torch.zeros(math.ceil(n * k / BLOCK_SIZE), dtype=torch.float32, device=device)
        return cls(config.kind, (n, k), BLOCK_SIZE, packed, absmax, quant_map(config.kind, device))

    def quantize_rows(self, start: int, weight: Tensor) -> None:
        """Fills rows start.. from bfloat16 or float32 [R, K] with bitsandbytes, on this weight's device.

        Raises QuantError where the rows do not begin with a block or do not end with one (or at N), and for a value
        that is not finite.
        """
        n, k = self.shape
        first, last = start * k, (start + weight.shape[0]) * k
        if weight.dim() != 2 or weight.shape[1] != k or start < 0 or last > n * k:
            raise QuantError(f"rows {start}.. of shape {tuple(weight.shape)} do not fit a weight of {n} x {k}")
        if first % self.blocksize or (last % self.blocksize and last != n * k):
            raise QuantError(f"rows {start} to {last // k} do not begin and end with blocks of {self.blocksize} values")
        source = weight.detach().to(self.device).contiguous()
        if not bool(source.isfinite().all()):
            row, column = (int(i) for i in (~source.isfinite()).nonzero()[0])
            raise QuantError(f"the weight at row {start + row}, column {column} is not a finite number")
        codes, state = library().functional.quantize_4bit(source, blocksize=self.blocksize, quant_type=self.kind)
        self.packed[first // 2 : first // 2 + codes.numel()] = codes.flatten()
        block = first // self.blocksize
        self.absmax[block : block + state.absmax.numel()] = state.absmax

    def double_quantized(self) -> BnbTensor:
        """The same codes with the scales in 8 bits, made by bitsandbytes."""
        offset = self.absmax.mean()
        codes, state = library().functional.quantize_blockwise(self.absmax - offset, blocksize=NESTED_BLOCK_SIZE)
        nested = (codes, self.quant_map, state.absmax, state.code, offset)
        return BnbTensor(self.kind, self.shape, self.blocksize, self.packed, *nested)

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows start..stop-1 decoded: [stop - start, K]. Only their bytes are read; scratch stays within 64 MiB."""
        k = self.shape[1]
        out = torch.empty(stop - start, k, dtype=dtype, device=self.device)
        step = max(1, SCRATCH_ELEMENTS // k)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            out[first - start : last - start] = self._decoded(first, last)
        return out

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight [N, K]."""
        return self.rows(0, self.shape[0], dtype)

    def _decoded(self, start: int, stop: int) -> Tensor:
        k, size = self.shape[1], self.blocksize
        first, last = start * k, stop * k
        pairs = self.packed[first // 2 : math.ceil(last / 2)]
        codes = torch.stack((pairs >> 4, pairs & 15), dim=1).flatten()[first % 2 :][: last - first]
        scales = self.scales(first // size, math.ceil(last / size))
        scales = scales.repeat_interleave(size)[first % size :][: last - first]
        return (self.quant_map.index_select(0, codes.int()) * scales).view(-1, k)

    def scales(self, first: int, last: int) -> Tensor:
        """float32: absmax of blocks first..last-1."""
        stored = self.absmax[first:last]
        if self.nested_absmax is None or self.nested_quant_map is None or self.nested_offset is None:
            return stored
        group = torch.arange(first, last, device=self.device) // NESTED_BLOCK_SIZE
        return self.nested_quant_map[stored.int()] * self.nested_absmax[group] + self.nested_offset

    def state(self) -> Any:
        """bitsandbytes' own description of this weight, over the same memory."""
        make, nested = library().functional.QuantState, None
        if self.nested_absmax is not None:
            scales = {"absmax": self.nested_absmax, "code": self.nested_quant_map}
            nested = make(**scales, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32)
        return make(
            absmax=self.absmax,
            shape=torch.Size(self.shape),
            code=self.quant_map,
            blocksize=self.blocksize,
            quant_type=self.kind,
            dtype=torch.float32,
            offset=self.nested_offset,
            state2=nested,
        )


class BnbLinear(UncastModule):
    """`y = x W^T + b` with W [N, K] as bitsandbytes stores it; inference only (gradients reach x, not W).

    x is bfloat16 or float32 [..., K]; y has x's type. float16 raises QuantError.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, weight: BnbTensor, bias: bool) -> None:
        """Takes over the weight's tensors without copying; `bias`: zeros, to be set."""
        super().__init__()
        self.kind, self.blocksize = weight.kind, weight.blocksize
        self.out_features, self.in_features = weight.shape
        for name in NAMES:
            self.register_buffer(name, getattr(weight, name))
        values = torch.zeros(self.out_features, device=weight.device) if bias else None
        self.register_buffer("bias", values)

    @property
    def weight_tensor(self) -> BnbTensor:
        """The weight itself (the same memory, no copy)."""
        shape = (self.out_features, self.in_features)
        return BnbTensor(self.kind, shape, self.blocksize, **{name: self._buffers[name] for name in NAMES})  # type: ignore[arg-type]

    @property
    def kernel(self) -> str:
        """What multiplies: bitsandbytes, or torch where a block crosses rows."""
        return "torch" if self._blocks_cross_rows else "bitsandbytes"

    @property
    def _blocks_cross_rows(self) -> bool:
        # bitsandbytes 0.50.2 decodes such weights wrongly on a CPU with AVX-512 (80 x 96 in blocks of 64, say).
        return self.in_features % self.blocksize != 0

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_features)
        weight, bias = self.weight_tensor, None if self.bias is None else self.bias.to(x.dtype)
        if self._blocks_cross_rows or (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, weight.dequantize(x.dtype), bias)
        # [1, bytes]: versions before 0.50 read the weight transposed, later ones in any shape.
        return library().matmul_4bit(x, self.packed[None], weight.state(), bias=bias)

    def extra_repr(self) -> str:
        double = ", double quantized" if self.nested_absmax is not None else ""
        return f"in={self.in_features}, out={self.out_features}, {self.kind}, blocks of {self.blocksize}{double}"
