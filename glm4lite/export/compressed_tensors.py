"""compressed-tensors, W4A16 pack-quantized: what vLLM, SGLang and Transformers load.

`X.weight_packed` int32 [N, K/8], eight codes a word, the first lowest; `.weight_scale` bfloat16 [N, K/g];
`.weight_zero_point` int32 [ceil(N/8), K/g], packed along the rows; `.weight_shape` int64 [2]. Codes and zero points are
stored as 0 to 15. All linear layers but the heads have one scheme: vLLM joins q, k and v, and gate and up, and wants
one for each. Its CPU kernel takes rows and columns in multiples of 32. Scales are bfloat16, since that is what engines
make of them: GLM-4 leaves float16. Source: compressed-tensors 0.17 and 0.20 (compressors/), vLLM 0.32
(compressed_tensors_wNa16.py, kernels/linear/mixed_precision/).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glm4lite.base.errors import ConfigError
from glm4lite.base.files import some
from glm4lite.checkpoint.load_plan import Fill
from glm4lite.checkpoint.prepare import Prepared
from glm4lite.checkpoint.writer import PlannedTensor
from glm4lite.export.hugging_face import HuggingFaceTarget
from glm4lite_quant import QuantConfig
from glm4lite_quant.config import GROUP_SIZES
from glm4lite_quant.format import Codes
from glm4lite_quant.grids import Grid

_MULTIPLE = 32
_PLAIN: tuple[tuple[str, int | None], ...] = (
    *(("lm_head", None), ("embed_tokens", None), ("score", None), ("*norm*", None)),
)
_GRID = Grid("zero point", torch.bfloat16)


class CompressedTensorsTarget(HuggingFaceTarget):
    """Linear layers of 4 bits; embedding, head and norms stay bfloat16."""

    quant: QuantConfig

    def __init__(self, group_size: int, method: str) -> None:
        if group_size not in GROUP_SIZES or isinstance(group_size, bool):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ConfigError(f"the group size is {group_size!r}; compressed-tensors is written in groups of {sizes}")
        self.quant = QuantConfig(4, group_size, _PLAIN, method)

    def check(self, prepared: Prepared[Any]) -> None:
        linear = [fill for fill in prepared.plan.fills if fill.quant is not None]
        odd = [fill.module for fill in linear if fill.shape[0] % _MULTIPLE or fill.shape[1] % _MULTIPLE]
        odd += prepared.plan.kept
        if odd:
            what = f"rows or columns that are no multiple of {_MULTIPLE}, which vLLM's kernels need"
            raise ConfigError(f"{some(odd)} has {what}; export to hf or gguf instead")

    def grid(self, fill: Fill) -> Grid | None:
        return None if fill.quant is None else _GRID

    def planned(self, fill: Fill) -> list[PlannedTensor]:
        if fill.quant is None:
            return super().planned(fill)
        (rows, columns), groups = fill.shape, fill.shape[1] // self.quant.group_size
        return [
            PlannedTensor(_part(fill, "weight_packed"), torch.int32, (rows, columns // 8)),
            PlannedTensor(_part(fill, "weight_scale"), torch.bfloat16, (rows, groups)),
            PlannedTensor(_part(fill, "weight_zero_point"), torch.int32, (rows // 8, groups)),
            PlannedTensor(_part(fill, "weight_shape"), torch.int64, (2,)),
        ]

    def encoded(self, fill: Fill, rows: Tensor | Codes) -> Mapping[str, Tensor]:
        if not isinstance(rows, Codes):
            return super().encoded(fill, rows)
        return {
            _part(fill, "weight_packed"): packed(rows.values),
            _part(fill, "weight_scale"): rows.step.to(torch.bfloat16),
            _part(fill, "weight_zero_point"): packed(_GRID.zero_points(rows).T.contiguous()).T,
        }

    def finish(self, writer: Any, prepared: Prepared[Any]) -> None:
        for fill in prepared.plan.fills:
            if fill.quant is not None:
                writer.write(_part(fill, "weight_shape"), torch.tensor(fill.shape))
        super().finish(writer, prepared)

    def config(self, prepared: Prepared[Any]) -> dict[str, Any]:
        coded = {fill.module for fill in prepared.plan.fills if fill.quant is not None}
        linear = [name for name, module in prepared.model.named_modules() if isinstance(module, nn.Linear)]
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": self.quant.group_size,
            "dynamic": False,
            "actorder": None,
            "observer": "minmax",
        }
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return super().config(prepared) | {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": scheme},
                "ignore": [name for name in linear if name not in coded],
                "kv_cache_scheme": None,
                "run_compressed": False,  # Transformers 5.23 with compressed-tensors 0.20 takes no packed zero points
            }
        }


def _part(fill: Fill, part: str) -> str:
    return f"{fill.source.removesuffix('.weight')}.{part}"


def packed(codes: Tensor) -> Tensor:
    """uint8 [R, C] of 0 to 15 -> int32 [R, C/8], the first code lowest.

    >>> hex(int(packed(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8))))
    '0x7654321'
    """
    pairs = codes.unflatten(1, (-1, 2))
    return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous().view(torch.int32)
