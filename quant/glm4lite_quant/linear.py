"""The modules: a linear layer and an embedding over one `QuantTensor`, named as in the original checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glm4lite_quant.config import QuantConfig, QuantError
from glm4lite_quant.format import NAMES
from glm4lite_quant.kernels.backend import Backend
from glm4lite_quant.kernels.picking import REFERENCE, pick
from glm4lite_quant.tensor import QuantTensor

FLOAT16 = "float16 is refused: GLM-4 overflows it (activations reach 68000); use bfloat16 or float32"


class UncastModule(nn.Module):
    """Its buffers move between devices but are never cast; float16 is refused."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`.to()`, `.cuda()`, `.bfloat16()` come here: devices change, the types of the stored tensors do not."""
        if fn(torch.empty(0, dtype=torch.float32)).dtype == torch.float16:
            raise QuantError(FLOAT16)
        for name, old in self._buffers.items():
            if old is not None:
                new = fn(old)
                self._buffers[name] = new if new.dtype == old.dtype else old.to(new.device)
        return self


def check_input(x: Tensor, columns: int) -> None:
    """QuantError where a quantized linear cannot take x: another type than bfloat16 or float32, another width."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise QuantError(FLOAT16 if x.dtype == torch.float16 else f"the input of a layer is {x.dtype}")
    if x.shape[-1] != columns:
        raise QuantError(f"the input of a layer has {x.shape[-1]} columns; expected {columns}")


class _QuantModule(UncastModule):
    """Holds the tensors of one weight."""

    qweight: Tensor
    scales: Tensor
    mins: Tensor | None
    row_scale: Tensor
    row_min: Tensor | None

    def __init__(self, n: int, k: int, config: QuantConfig, device: str | torch.device) -> None:
        super().__init__()
        empty = QuantTensor.empty(n, k, config, device)
        for name in NAMES:
            self.register_buffer(name, getattr(empty, name))

    @property
    def weight_tensor(self) -> QuantTensor:
        """The weight itself (the same memory, no copy)."""
        return self._held()

    def _held(self) -> QuantTensor:
        return QuantTensor(*(self._buffers[name] for name in NAMES))  # type: ignore[arg-type]

    def load(self, weight: QuantTensor) -> None:
        """Takes over a weight's tensors without copying; QuantError if it is not of this layer's shape and format."""
        own = self._held()
        have = (weight.shape, weight.bits, weight.group_size)
        want = (own.shape, own.bits, own.group_size)
        if have != want:
            raise QuantError(f"a weight of (shape, bits, group) {have} does not fit a layer of {want}")
        for name in NAMES:
            self._buffers[name] = getattr(weight, name)

    def unload(self) -> None:
        """Lets go of the weight: only its shapes stay, and multiplying raises QuantError until `load`."""
        for name in NAMES:
            old = self._buffers[name]
            self._buffers[name] = None if old is None else torch.empty_like(old, device="meta")


class QuantLinear(_QuantModule):
    """`y = x W^T + b` with a quantized W [out_features, in_features]; inference only (gradients reach x, not W).

    x is bfloat16 or float32 [..., in_features]; y has x's type. float16 raises QuantError.

    A backend that packs the codes anew has them instead of the layer from the first product on, so that they take
    their memory once; `qweight` is then on meta. `weight_tensor` and `state_dict()` read them back into new memory at
    every call, a move of the module for good.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: QuantConfig,
        bias: bool,
        device: str | torch.device = "cpu",
        activation_splits: int = 1,
    ) -> None:
        """`activation_splits`: native kernels round x to int8 (1), or to two int8 that are added (2: nearly exact)."""
        super().__init__(out_features, in_features, config, device)
        self.in_features, self.out_features, self.config = in_features, out_features, config
        self.activation_splits = activation_splits
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=torch.float32) if bias else None)
        self._packed: tuple[tuple[int, ...], Backend, Any] | None = None

    @property
    def kernel(self) -> str:
        """The backend that multiplies with this weight, for example native-avx512vnni or reference."""
        repacked = self._repacked()
        return repacked[0].name if repacked else pick(self._held()).name

    @property
    def weight_tensor(self) -> QuantTensor:
        """The weight itself: the same memory, or a copy where a backend has packed the codes anew."""
        repacked = self._repacked()
        return QuantTensor.of(repacked[0].unpack(repacked[1])) if repacked else self._held()

    def load(self, weight: QuantTensor) -> None:
        super().load(weight)
        self._packed = None

    def unload(self) -> None:
        super().unload()
        self._packed = None

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_features)
        rows = x.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and x.requires_grad:  # the native kernels know no gradients
            out = REFERENCE.matmul(rows, self.weight_tensor, self.bias)
        else:
            backend, packed = self._prepare()
            out = backend.matmul(rows, packed, self.bias, self.activation_splits)
        return out.view(*x.shape[:-1], self.out_features)

    def _prepare(self) -> tuple[Backend, Any]:
        # A packed weight holds addresses, and share_memory() or .data move a tensor's storage under its feet.
        source, kept = self._addresses(), self._packed
        if kept is None or kept[0] != source:
            weight = self.weight_tensor
            if weight.device.type == "meta":
                raise QuantError("a quantized layer has no weight yet: load a checkpoint into it")
            backend = pick(weight)
            kept = self._packed = (source, backend, backend.prepack(weight))
            if backend.repacks:
                self._buffers["qweight"] = weight.qweight.to("meta")
                kept = self._packed = (self._addresses(), *kept[1:])
        return kept[1], kept[2]

    def _addresses(self) -> tuple[int, ...]:
        held = (self._buffers[name] for name in NAMES)
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in held)

    def _repacked(self) -> tuple[Backend, Any] | None:
        """The backend that holds the codes instead of this layer, if one does."""
        kept, away = self._packed, self.qweight.is_meta
        return kept[1:] if kept is not None and kept[1].repacks and away else None

    def _take_back(self) -> None:
        """The codes become the layer's own again; the next product packs them anew."""
        if self._repacked():
            self._buffers["qweight"] = self.weight_tensor.qweight
        self._packed = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._take_back()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._repacked():
            destination[prefix + "qweight"] = self.weight_tensor.qweight

    def _load_from_state_dict(self, *args: Any) -> None:
        self._take_back()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        # A packed weight holds addresses: a copy makes its own.
        self._take_back()
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        own = self._held()
        return f"in={self.in_features}, out={self.out_features}, int{own.bits}, group={own.group_size}"


class QuantEmbedding(_QuantModule):
    """Looks up rows of a quantized table and dequantizes only these; the output has `dtype`."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        config: QuantConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, config, device)
        if dtype not in (torch.bfloat16, torch.float32):
            raise QuantError(FLOAT16 if dtype == torch.float16 else f"an embedding cannot give {dtype}")
        self.num_embeddings, self.embedding_dim, self.config, self.dtype = num_embeddings, embedding_dim, config, dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        wanted = fn(torch.empty(0, dtype=self.dtype)).dtype
        if wanted in (torch.bfloat16, torch.float32):
            self.dtype = wanted
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., embedding_dim]; IndexError for an id outside the table."""
        return self.weight_tensor.rows(ids, self.dtype)

    def extra_repr(self) -> str:
        own = self.weight_tensor
        return f"{self.num_embeddings}, {self.embedding_dim}, int{own.bits}, group={own.group_size}"
