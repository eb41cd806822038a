"""Codes of 2 to 8 bits out of the words that other tools pack them into; a code becomes a byte of its own."""

from __future__ import annotations

import torch
from torch import Tensor


def bytes_of(words: Tensor) -> Tensor:
    """The bytes of little-endian words [..., W], as uint8 [..., W x size]."""
    return words.contiguous().view(torch.uint8)


def unpacked(stream: Tensor, bits: int) -> Tensor:
    """uint8 [..., B], a dense stream with the low bits first -> codes uint8 [..., 8 B / bits].

    Eight codes lie in `bits` bytes, so that B must be a multiple of `bits`, as it is of 32 codes and more.

    >>> unpacked(torch.tensor([0b11_010_001, 0b1, 0]).byte(), 3).tolist()
    [1, 2, 7, 0, 0, 0, 0, 0]
    """
    if bits == 8:
        return stream
    if bits == 4:  # by far the most usual: two codes a byte, pulled apart in 16 bits
        wide = stream.to(torch.int16)
        wide |= wide << 4
        wide &= 0x0F0F
        return wide.view(torch.uint8)
    eights = stream.view(*stream.shape[:-1], -1, bits).to(torch.int16)
    codes = torch.empty(*eights.shape[:-1], 8, dtype=torch.uint8, device=stream.device)
    for number in range(8):
        byte, shift = divmod(number * bits, 8)
        code = eights[..., byte] >> shift
        if shift + bits > 8:  # the rest of it lies in the next byte
            code |= eights[..., byte + 1] << (8 - shift)
        codes[..., number] = code & ((1 << bits) - 1)
    return codes.flatten(-2)


def unpacked_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., W] with as many whole codes as fit in each, the upper bits left -> uint8 [..., W x (32 // bits)]."""
    mask = (1 << bits) - 1
    codes = [((words >> (number * bits)) & mask).to(torch.uint8) for number in range(32 // bits)]
    return torch.stack(codes, -1).flatten(-2)
