"""Low-rank adapters (LoRA) beside linears whose weight stays as it is: y = gain * (W x) + B (A x) + bias.

Several may be held at once, and each row of a step may take another one: `chosen` says which. Where they are not in the
weights already, the native step and torch's code apply them, the latter as a forward hook, so that a linear of any kind
(quantized or not) keeps its class and its name.

Source: Hu et al. 2021 (LoRA), Liu et al. 2024 (DoRA, which is what `gain` is for).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm4lite_quant.format import ROWS
from glm4lite_quant.linear import UncastModule

BASE = 0
"""The number of the model without any adapter that is chosen by request; those that are always on are in it."""

Rows = tuple[int, int]
"""So many rows of a step, and the number of the adapter that they take."""

_CHOSEN: ContextVar[Sequence[Rows]] = ContextVar("adapters of the rows", default=())


@contextmanager
def adapters_of(rows: Sequence[Rows]) -> Iterator[None]:
    """What is computed within takes these adapters, by rows; without, BASE for all."""
    before = _CHOSEN.set(rows if any(number != BASE for _, number in rows) else ())
    try:
        yield
    finally:
        _CHOSEN.reset(before)


def chosen() -> Sequence[Rows]:
    """The adapters of the rows that are being computed; empty: BASE for all."""
    return _CHOSEN.get()


class LowRank(UncastModule):
    """One linear's: a [r, K], b [N / 16, r, 16] (B with all scales in it, in the native step's tiles of 16 rows), gain
    [N] and bias [N] or None; float32.

    Of an embedding [N, K], whose rows are looked up, the change is B A as well, and there is no gain.
    """

    a: Tensor
    b: Tensor
    gain: Tensor | None
    bias: Tensor | None

    def __init__(self, a: Tensor, b: Tensor, gain: Tensor | None = None, bias: Tensor | None = None) -> None:
        """b: [N, r]."""
        super().__init__()
        self.rows = len(b)
        tiles = F.pad(b, (0, 0, 0, -self.rows % ROWS)).unflatten(0, (-1, ROWS)).transpose(1, 2)
        for name, value in (("a", a), ("b", tiles), ("gain", gain), ("bias", bias)):
            held = None if value is None else value.detach().to(torch.float32).contiguous()
            self.register_buffer(name, held, persistent=False)

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.buffers())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., K], and what the linear made of it, y [..., N] -> y with the adapter, in y's type."""
        out = y.float() if self.gain is None else y.float() * self.gain
        if self.rank:
            flat = self.b.transpose(0, 1).flatten(1)[:, : self.rows]
            out = out + (x.float() @ self.a.T) @ flat
        return (out if self.bias is None else out + self.bias).to(y.dtype)

    def looked_up(self, ids: Tensor, y: Tensor) -> Tensor:
        """ids [...], and the embedding's rows y [..., K] -> y with the adapter."""
        return (y.float() + self.b[ids // ROWS, :, ids % ROWS] @ self.a).to(y.dtype)


class Adapters(nn.Module):
    """What a linear or an embedding has beside its weight, as its submodule `lora`: by number, None for none."""

    def __init__(self, sets: Sequence[LowRank | None]) -> None:
        super().__init__()
        for number, one in enumerate(sets):
            self.add_module(str(number), one)

    def of(self, number: int) -> LowRank | None:
        found = self._modules[str(number)]
        return found if isinstance(found, LowRank) else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rows = chosen()
        if not rows:
            return self._applied(BASE, x, y)
        along = y.dim() - 2  # [1, T, N] in the layers, [T, N] at the head
        counts = [count for count, _ in rows]
        parts = zip(rows, x.split(counts, along), y.split(counts, along), strict=True)
        return torch.cat([self._applied(number, of_x, of_y) for (_, number), of_x, of_y in parts], along)

    def _applied(self, number: int, x: Tensor, y: Tensor) -> Tensor:
        one = self.of(number)
        if one is None:
            return y
        return one(x, y) if x.is_floating_point() else one.looked_up(x, y)


def attach(module: nn.Module, sets: Sequence[LowRank | None]) -> None:
    """Gives a linear or an embedding its adapters."""
    module.add_module("lora", Adapters(sets))
    module.register_forward_hook(_adapted)


def adapters_in(module: nn.Module) -> Adapters | None:
    """What `attach` gave it."""
    found = module._modules.get("lora")
    return found if isinstance(found, Adapters) else None


def _adapted(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """A function and no method of the adapters: a shallow clone of the module has its own."""
    lora = adapters_in(module)
    return output if lora is None else lora(inputs[0], output)
