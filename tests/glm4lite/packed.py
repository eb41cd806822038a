"""Checkpoints as other tools lay them out, from codes that are known: an oracle that shares no code with the readers.

A layout is a function that makes the tensors of one module of its `Coded` weight. All packing goes through single bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.glm4lite.checkpoints import tiny_config, tiny_tensors, write_checkpoint

CONFIG = tiny_config(intermediate_size=128)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Coded:
    """`w = (codes - zero) * step`: codes and zero are whole numbers below 2^bits; step float16 [N, G]."""

    codes: Tensor  # int64 [N, K]
    step: Tensor  # float16 [N, G]
    zero: Tensor  # int64 [N, G]
    bits: int
    order: Tensor | None = None  # the group of each column

    @property
    def decoded(self) -> Tensor:
        """float64 [N, K]."""
        groups = self.step.shape[1]
        places = torch.arange(self.codes.shape[1]) // (self.codes.shape[1] // groups)
        places = places if self.order is None else self.order
        return (self.codes - self.zero[:, places]).double() * self.step.double()[:, places]


def coded(weight: Tensor, bits: int, group: int | None, symmetric: bool = True, shuffled: bool = False) -> Coded:
    """A weight rounded to the nearest codes. shuffled: columns belong to groups at random, as in GPTQ's act-order."""
    n, k = weight.shape
    groups = 1 if group is None else k // group
    order = torch.arange(k) // (k // groups)
    if shuffled:
        order = order[torch.randperm(k, generator=torch.Generator().manual_seed(1))]
    codes, steps, zeros = torch.zeros(n, k, dtype=torch.long), [], []
    for number in range(groups):
        part = weight[:, order == number].float()
        if symmetric:
            step = (part.abs().amax(1) / (2 ** (bits - 1) - 0.5)).half()
            zero = torch.full((n,), 2 ** (bits - 1))
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            step = ((high - low) / (2**bits - 1)).half()
            zero = (-low / step.float()).round().clamp(0, 2**bits - 1).long()
        rounded = (part / step.float()[:, None]).round() + zero[:, None]
        codes[:, order == number] = rounded.clamp(0, 2**bits - 1).long()
        steps.append(step)
        zeros.append(zero)
    return Coded(codes, torch.stack(steps, 1), torch.stack(zeros, 1), bits, order if shuffled else None)


def stream(codes: Tensor, bits: int) -> Tensor:
    """[R, C] -> int32 [R, C bits / 32]: all bits of all codes in a row, the low ones first."""
    single = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(single.reshape(codes.shape[0], -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").copy())


def whole_words(codes: Tensor, bits: int) -> Tensor:
    """[R, C] -> int32 [R, C / (32 // bits)], rounded up: codes that do not fit a word begin the next."""
    fit = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % fit)).view(codes.shape[0], -1, fit)
    return (padded << (torch.arange(fit) * bits)).sum(-1).to(torch.int32)


# --- layouts of one module


def gptq(
    c: Coded, zeros_less_one: bool = True, ones: tuple[int, ...] | None = None, g_idx: bool = True
) -> dict[str, Tensor]:
    zero = c.zero.T
    if ones is None and zeros_less_one:
        points = stream((zero - 1) & (2**c.bits - 1), c.bits)
    else:
        words = stream(zero, c.bits).long()
        less = torch.tensor(ones or (0,)).repeat(words.shape[1])[: words.shape[1]]
        points = ((words - less) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
    found = {"qweight": stream(c.codes, c.bits).T, "qzeros": points, "scales": c.step.T}
    columns, groups = c.codes.shape[1], c.step.shape[1]
    order = torch.arange(columns) // (columns // groups) if c.order is None else c.order
    return found | ({"g_idx": order.int()} if g_idx or c.order is not None else {})


def gptq_v2(c: Coded) -> dict[str, Tensor]:
    return gptq(c, zeros_less_one=False)


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq_columns(values: Tensor) -> Tensor:
    """[K, N] -> int32 [K, N / 8] in AWQ's order."""
    return stream(values.view(values.shape[0], -1, 8)[..., AWQ_ORDER].flatten(1), 4)


def awq_gemm(c: Coded) -> dict[str, Tensor]:
    return {"qweight": awq_columns(c.codes.T), "qzeros": awq_columns(c.zero.T), "scales": c.step.T}


def awq_gemv(c: Coded) -> dict[str, Tensor]:
    groups = c.step.shape[1]
    multiple = {32: 4, 64: 2}.get(c.codes.shape[1] // groups, 1)
    width = -(-groups // (8 * multiple)) * multiple
    pad = (0, 8 * width - groups)
    zeros, scales = torch.nn.functional.pad(c.zero, pad), torch.nn.functional.pad(c.step, pad)
    return {"qweight": stream(c.codes, 4), "qzeros": stream(zeros, 4), "scales": scales}


def packed_quantized(
    c: Coded, pack: Callable[[Tensor, int], Tensor] = stream, symmetric: bool = True
) -> dict[str, Tensor]:
    found = {
        "weight_packed": pack(c.codes, c.bits),
        "weight_scale": c.step,
        "weight_shape": torch.tensor(c.codes.shape),
    }
    if c.order is not None:
        found["weight_g_idx"] = c.order.int()
    return found if symmetric else found | {"weight_zero_point": pack(c.zero.T, c.bits).T}


def int_quantized(c: Coded, symmetric: bool = True) -> dict[str, Tensor]:
    found = {"weight": (c.codes - 128).to(torch.int8), "weight_scale": c.step}
    return found if symmetric else found | {"weight_zero_point": (c.zero - 128).to(torch.int8)}


def fp8(c: Coded, block: bool = True) -> dict[str, Tensor]:
    """A scale for each 32 x 32 block, or for all; `c` tells its step and codes, which eight-bit floats hold exactly."""
    values = (c.codes - c.zero[0, 0]).float()
    if not block:
        return {"weight": values.to(torch.float8_e4m3fn), "weight_scale": c.step[0, 0].float()}
    return {"weight": values.to(torch.float8_e4m3fn), "weight_scale_inv": c.step[::32].float()}


def mlx(c: Coded) -> dict[str, Tensor]:
    """Every other group with a negative step, as MLX writes it where the largest value is positive."""
    sign = torch.where(torch.arange(c.step.shape[1]) % 2 == 1, -1, 1)
    group = c.codes.shape[1] // c.step.shape[1]
    turned = sign.repeat_interleave(group) < 0
    codes = torch.where(turned, 2**c.bits - 1 - c.codes, c.codes)
    low = -c.zero.float() * c.step.float()
    bias = torch.where(sign < 0, low + (2**c.bits - 1) * c.step.float(), low)
    return {"weight": stream(codes, c.bits).view(torch.uint32), "scales": (sign * c.step.float()), "biases": bias}


def hqq(c: Coded) -> dict[str, Tensor]:
    codes = c.codes.view(-1, c.codes.shape[1] // c.step.shape[1])
    in_a_word = {2: 4, 3: 10, 4: 2, 8: 1}[c.bits]
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % in_a_word)).int().chunk(in_a_word)
    words = sum(part << c.bits * (in_a_word - 1 - i) for i, part in enumerate(padded))
    return {
        "W_q": torch.as_tensor(words).to(torch.int32 if c.bits == 3 else torch.uint8),
        "scale": c.step.view(-1, 1),
        "zero": c.zero.view(-1, 1).half(),
        "shape": torch.tensor(c.codes.shape),
        "nbits": torch.tensor(c.bits, dtype=torch.int32),
    }


# --- whole checkpoints


@dataclass(frozen=True)
class Layout:
    """One way to store a model: how its weights are rounded, laid out, and spoken of in config.json."""

    lay_out: Callable[[Coded], dict[str, Tensor]]
    declared: Mapping[str, Any]
    bits: int = 4
    group: int | None = 32
    symmetric: bool = True
    shuffled: bool = False
    key: str = "quantization_config"
    shared_rows: int = 1  # how many rows have one step


def write_packed(folder: Path, layout: Layout, split: bool = False, **config: Any) -> tuple[Path, Path]:
    """(the checkpoint in a layout, the plain float32 one of the same weights). split: gate and up apart."""
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in tiny_tensors(CONFIG).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in LINEARS or module == name:
            stored[name] = plain[name] = tensor.float()
            continue
        parts = {module: tensor}
        if split and module.endswith("gate_up_proj"):
            halves = tensor.chunk(2)
            parts = {module.replace("gate_up", half): rows for half, rows in zip(("gate", "up"), halves, strict=True)}
        decoded = []
        for part, rows in parts.items():
            made = coded(rows, layout.bits, layout.group, layout.symmetric, layout.shuffled)
            if layout.shared_rows > 1:
                steps = made.step[:: layout.shared_rows].repeat_interleave(layout.shared_rows, 0)
                made = replace(made, step=steps[: len(rows)])
            decoded.append(made.decoded.float())
            stored |= {f"{part}.{suffix}": value.contiguous() for suffix, value in layout.lay_out(made).items()}
        plain[name] = torch.cat(decoded)
    declared = {layout.key: dict(layout.declared)}
    one = write_checkpoint(folder / "packed", CONFIG | declared | config, stored)
    return one, write_checkpoint(folder / "plain", CONFIG | {"torch_dtype": "float32"}, plain)


def pack_model(folder: Path, layout: Layout) -> None:
    """Quantizes the layers of a plain checkpoint in its place."""
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    for name in list(tensors):
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in LINEARS and module != name:
            made = coded(tensors.pop(name), layout.bits, layout.group, layout.symmetric)
            tensors |= {f"{module}.{suffix}": value.contiguous() for suffix, value in layout.lay_out(made).items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {layout.key: dict(layout.declared)}), encoding="utf-8")


def compressed(bits: int, layout_format: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    """The quantization_config of compressed-tensors."""
    scheme = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True} | weights
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout_format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
