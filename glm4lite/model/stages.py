"""What the layers of one device share in a forward pass: rotary tables and the mask, made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from glm4lite.model.attention import Visibility
from glm4lite.model.rotary import RotaryEmbedding


class Stage(NamedTuple):
    """Of one device and type of activations."""

    device: torch.device
    dtype: torch.dtype
    rotary: tuple[Tensor, Tensor]
    visible: Visibility

    @property
    def inputs(self) -> tuple[torch.dtype, tuple[Tensor, Tensor], Visibility]:
        return self.dtype, self.rotary, self.visible


class Stages:
    """The stages of one forward pass, each made when its first layer comes."""

    def __init__(
        self, rotary: RotaryEmbedding, positions: Tensor, visibility: Callable[[torch.device], Visibility]
    ) -> None:
        """positions [B or 1, T]; `visibility` makes that of a device."""
        self._rotary, self._positions, self._visibility = rotary, positions, visibility
        self._made: dict[tuple[torch.device, torch.dtype], Stage] = {}

    def of(self, device: torch.device, dtype: torch.dtype) -> Stage:
        if (device, dtype) not in self._made:
            rotary = self._rotary(self._positions.to(device), dtype)
            self._made[device, dtype] = Stage(device, dtype, rotary, self._visibility(device))
        return self._made[device, dtype]
