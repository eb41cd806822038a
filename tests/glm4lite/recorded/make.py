"""What real writers store of one small weight, and what they decode it to: `python make.py [WRITER ...]`.

    pip install compressed-tensors==0.20.1 mlx==0.32.4 mlx-cpu==0.32.4 hqq==0.2.8.post1 auto-round==0.16.1

For each writer a file NAME.safetensors: its cases' tensors as CASE/layer.SUFFIX, what it decodes as CASE/decoded, and
each case's config.json in the metadata. `tests/glm4lite/test_recorded.py` compares what the readers make of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Case = tuple[str, dict[str, Any], dict[str, Tensor], Tensor]
"""Its name, config.json, tensors by suffix, and what they decode to [N, K]."""

N, K = 32, 128


def weight() -> Tensor:
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / K**0.5
    values[3] += 0.3  # no group of this row reaches zero
    return values


def scales(values: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero point) [N, G] as searches begin with them."""
    parts = values.view(N, -1, group)
    if symmetric:
        scale = parts.abs().amax(-1) / (2 ** (bits - 1) - 1)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale, (-low / scale).round()


def compressed_tensors() -> Iterator[Case]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("symmetric", "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
        ("asymmetric", "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
        ("3 bits", "pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False}),
        ("8 bits", "pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("int8", "int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("fp8", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    ]
    for name, form, args in kinds:
        values = weight().bfloat16()
        bits, group = args["num_bits"], args.get("group_size", K)
        scale, zero = scales(values.float(), bits, group, args.get("symmetric", True))
        if form == "float-quantized":
            scale = values.float().abs().amax(-1, keepdim=True) / 448
        made = QuantizationArgs(**args)
        scheme = QuantizationScheme(targets=["Linear"], weights=made, format=form)
        state = {"weight": values, "weight_scale": scale.bfloat16()}
        if not args.get("symmetric", True):
            state["weight_zero_point"] = (zero - 2 ** (bits - 1)).to(torch.int8)
        compressor: Any = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(state, scheme)
        decoded = compressor.decompress(stored, scheme)["weight"]
        group_config = {"targets": ["Linear"], "weights": json.loads(made.model_dump_json())}
        config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group_config}}
        yield name, {"quantization_config": config}, stored, decoded


def mlx() -> Iterator[Case]:
    import mlx.core as mx
    import numpy as np

    for bits in (2, 3, 4, 5, 6, 8):
        values = mx.array(weight().numpy()).astype(mx.float16)
        words, scale, bias = mx.quantize(values, group_size=64, bits=bits)
        stored = {"weight": words, "scales": scale, "biases": bias}
        tensors = {name: torch.from_numpy(np.array(part)) for name, part in stored.items()}
        decoded = mx.dequantize(words.astype(mx.uint32), scale.astype(mx.float32), bias.astype(mx.float32), 64, bits)
        config = {"quantization": {"group_size": 64, "bits": bits, "mode": "affine"}}
        yield f"{bits} bits", config, tensors, torch.from_numpy(np.array(decoded))


def hqq() -> Iterator[Case]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for bits, axis in ((4, 1), (4, 0), (8, 1), (3, 1), (3, 0), (2, 1)):
        linear = nn.Linear(K, N, bias=False)
        linear.weight.data = weight()
        config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
        layer = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        stored = {name: value for name, value in layer.state_dict().items() if isinstance(value, Tensor)}
        inner = {"nbits": bits, "group_size": 64, "axis": axis}
        declared = {"quant_method": "hqq", "quant_config": {"weight_quant_params": inner}}
        yield f"{bits} bits, axis {axis}", {"quantization_config": declared}, stored, layer.dequantize()


def auto_round() -> Iterator[Case]:
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM
    from auto_round_extension.torch.qlinear_torch import QuantLinear as AsTheyAre
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as OneLess

    cases: list[tuple[str, Any, int, bool]] = [
        *((f"auto_round:auto_gptq {bits}", OneLess, bits, True) for bits in (2, 3, 4, 5, 8)),
        *((f"auto_round {bits}", AsTheyAre, bits, False) for bits in (2, 3, 4, 6, 8)),
        ("auto_round:auto_awq 4", WQLinear_GEMM, 4, False),
    ]
    for name, layer, bits, symmetric in cases:
        linear = nn.Linear(K, N, bias=False)
        linear.weight.data = weight()
        scale, zero = scales(linear.weight.data, bits, 32, symmetric)
        scale = scale.half().float()
        codes = (linear.weight.data / scale.repeat_interleave(32, 1)).round() + zero.repeat_interleave(32, 1)
        decoded = (codes.clamp(0, 2**bits - 1) - zero.repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)
        if layer is WQLinear_GEMM:
            made = layer.from_linear(linear, bits, 32, scales=scale.T.contiguous(), zeros=zero.T.contiguous())
        else:
            made = layer(bits, 32, K, N, bias=False)
            made.device = "cpu"  # which one of them asks for and never sets
            made.pack(linear, scale, zero.to(torch.int32), None, device="cpu")
        stored = {key: value for key, value in made.state_dict().items() if value is not None}
        config = {"quant_method": "auto-round", "bits": bits, "group_size": 32, "packing_format": name.split()[0]}
        yield name, {"quantization_config": config}, stored, decoded


WRITERS: dict[str, Callable[[], Iterator[Case]]] = {
    "compressed_tensors": compressed_tensors,
    "mlx": mlx,
    "hqq": hqq,
    "auto_round": auto_round,
}


def main() -> None:
    for writer in sys.argv[1:] or WRITERS:
        tensors, configs = dict[str, Tensor](), dict[str, Any]()
        for name, config, stored, decoded in WRITERS[writer]():
            configs[name] = config
            tensors |= {f"{name}/layer.{suffix}": value.detach().contiguous() for suffix, value in stored.items()}
            tensors[f"{name}/decoded"] = decoded.detach().contiguous()
        file = Path(__file__).with_name(f"{writer}.safetensors")
        save_file(tensors, file, metadata={"configs": json.dumps(configs)})
        print(file.name, *configs, sep=", ")


if __name__ == "__main__":
    main()
