"""The block types of GGUF: what their bytes say of each weight.

`AFFINE` types of four bits become codes with a step and a minimum for each group of 32, which can be kept. `DECODERS`
give the values of the others. The i-quants' code books, and types that hardly a file has, are left to the package gguf
(numpy, five times slower). Source: ggml's ggml-quants.c, gguf 0.19 (gguf/quants.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from glm4lite.base.extras import require

_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block [..., B] as float32 [..., 1]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def nibbles(blocks: Tensor, run: int) -> Tensor:
    """uint8 [..., B]: the low halves of `run` bytes, then their high halves, and so on -> codes [..., 2 B]."""
    runs = blocks.unflatten(-1, (-1, run))
    return torch.stack((runs & 15, runs >> 4), -2).flatten(-3)


def _bits(blocks: Tensor, shifts: int, width: int, run: int) -> Tensor:
    """The fields of `width` bits of each byte, field by field of `run` bytes -> [..., B x shifts]."""
    runs = blocks.unflatten(-1, (-1, run))
    mask = (1 << width) - 1
    return torch.stack([(runs >> (number * width)) & mask for number in range(shifts)], -2).flatten(-3)


# --- affine types: (step, low) of every group [..., groups], and the codes of some rows


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    step = half(blocks, 0)
    return step, step * 8


def _q4_1(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return half(blocks, 0), -half(blocks, 2)


def _q4_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scales, mins = _six_bits(blocks[..., 4:16])
    return half(blocks, 0) * scales, half(blocks, 2) * mins


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of six bits in twelve bytes: of the last four of each, two bits lie apart."""
    first, second, rest = packed.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 6) << 4)), -1)
    mins = torch.cat((second & 63, (rest >> 4) | ((second >> 6) << 4)), -1)
    return scales.float(), mins.float()


Planes = Callable[[Tensor], tuple[Tensor, Tensor]]
AFFINE: dict[str, tuple[Planes, Callable[[Tensor], Tensor]]] = {
    "Q4_0": (_q4_0, lambda blocks: nibbles(blocks[..., 2:], 16)),
    "Q4_1": (_q4_1, lambda blocks: nibbles(blocks[..., 4:], 16)),
    "Q4_K": (_q4_k, lambda blocks: nibbles(blocks[..., 16:], 32)),
}
"""Name -> (blocks to steps and minima, blocks to codes)."""


# --- the others: uint8 [..., B] -> float32 [..., weights of a block]


def _fifth_bit(blocks: Tensor, at: int) -> Tensor:
    """The codes of five bits of 32 weights: four bytes of upper bits, then 16 of nibbles."""
    return nibbles(blocks[..., at + 4 :], 16) | (unpacked_bits(blocks[..., at : at + 4]) << 4)


def unpacked_bits(stream: Tensor) -> Tensor:
    return torch.stack([(stream >> number) & 1 for number in range(8)], -1).flatten(-2)


def _q5_0(blocks: Tensor) -> Tensor:
    return (_fifth_bit(blocks, 2).float() - 16) * half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    return _fifth_bit(blocks, 4) * half(blocks, 0) + half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[..., 2:].view(torch.int8) * half(blocks, 0)


def _q2_k(blocks: Tensor) -> Tensor:
    codes = _bits(blocks[..., 16:80], 4, 2, 32).unflatten(-1, (16, 16))
    scales = blocks[..., :16]
    step, low = half(blocks, 80) * (scales & 15), half(blocks, 82) * (scales >> 4)
    return (codes * step[..., None] - low[..., None]).flatten(-2)


def _q3_k(blocks: Tensor) -> Tensor:
    low = _bits(blocks[..., 32:96], 4, 2, 32).to(torch.int8)
    high = _bits(blocks[..., :32], 8, 1, 32).to(torch.int8)
    packed = blocks[..., 96:108]
    lower = torch.cat((packed[..., :8] & 15, packed[..., :8] >> 4), -1)
    upper = torch.cat([(packed[..., 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], -1)
    step = half(blocks, 108) * ((lower | (upper << 4)).float() - 32)
    codes = (low + 4 * high - 4).unflatten(-1, (16, 16))
    return (codes * step[..., None]).flatten(-2)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, mins = _six_bits(blocks[..., 4:16])
    codes = nibbles(blocks[..., 48:], 32) | (_bits(blocks[..., 16:48], 8, 1, 32) << 4)
    step, low = half(blocks, 0) * scales, half(blocks, 2) * mins
    return (codes.unflatten(-1, (8, 32)) * step[..., None] - low[..., None]).flatten(-2)


def _q6_k(blocks: Tensor) -> Tensor:
    codes = nibbles(blocks[..., :128], 64) | (_bits(blocks[..., 128:192], 4, 2, 32) << 4)
    step = half(blocks, 208) * blocks[..., 192:208].view(torch.int8)
    return ((codes.to(torch.int8) - 32).unflatten(-1, (16, 16)) * step[..., None]).flatten(-2)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _looked_up(nibbles(blocks[..., 2:], 16)) * half(blocks, 0)


def _iq4_xs(blocks: Tensor) -> Tensor:
    lower = nibbles(blocks[..., 4:8], 1)
    upper = torch.stack([(blocks[..., 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    step = half(blocks, 0) * ((lower | (upper << 4)).float() - 32)
    values = _looked_up(nibbles(blocks[..., 8:], 16)).unflatten(-1, (8, 32))
    return (values * step[..., None]).flatten(-2)


def _looked_up(codes: Tensor) -> Tensor:
    return torch.tensor(_IQ4_VALUES, dtype=torch.float32)[codes.long()]


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}


def decoder(kind: str) -> Callable[[Tensor], Tensor]:
    """Blocks uint8 [..., B] -> float32 [..., weights]; MissingPackageError where a type needs the package gguf."""
    return DECODERS[kind] if kind in DECODERS else _of_package(kind)


def _of_package(kind: str) -> Callable[[Tensor], Tensor]:
    require(f"a GGUF file of {kind} weights", "gguf")
    package = importlib.import_module("gguf")  # reads a thousand names of models when it is imported
    number = package.GGMLQuantizationType[kind]

    def decode(blocks: Tensor) -> Tensor:
        flat = blocks.reshape(-1, blocks.shape[-1])
        return torch.from_numpy(package.quants.dequantize(flat.numpy(), number)).unflatten(0, blocks.shape[:-1])

    return decode
