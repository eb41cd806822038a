"""What taking over another tool's weights costs: one layer of a 9B, 27,392 x 4,096, of random codes.

`python -m bench.imports [FORMAT ...]` prints seconds of the processor for one weight on one thread, and those of all
layers of a 9B (8.2e9 weights) on two. The second of two runs counts: its file is in memory.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.registry import declared_format
from glm4lite.checkpoint.load_plan import Fill
from glm4lite.checkpoint.shard import read_header
from glm4lite.checkpoint.streaming import Meter, quantize_weight
from glm4lite_quant import QuantConfig
from glm4lite_quant.kernels import native

N, K, GROUP = 27392, 4096, 128
LAYERS = 8.2e9

Tensors = dict[str, Tensor]


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def scales(*shape: int) -> Tensor:
    return (torch.rand(*shape) * 0.01 + 0.005).half()


def gptq(act_order: bool = False) -> Tensors:
    found = {"qweight": words(K // 8, N), "qzeros": words(K // GROUP, N // 8), "scales": scales(K // GROUP, N)}
    return found | ({"g_idx": (torch.randperm(K) // GROUP).int()} if act_order else {})


def awq() -> Tensors:
    return {"qweight": words(K, N // 8), "qzeros": words(K // GROUP, N // 8), "scales": scales(K // GROUP, N)}


def packed() -> Tensors:
    shape = torch.tensor([N, K])
    return {"weight_packed": words(N, K // 8), "weight_scale": scales(N, K // GROUP), "weight_shape": shape}


def blocks(size: int, *halves: int) -> Tensors:
    """GGUF blocks of 256 weights; halves: where the float16 scales lie."""
    data = torch.randint(0, 256, (N * K // 256, size), dtype=torch.uint8)
    for at in halves:
        data[:, at : at + 2] = (torch.rand(len(data)) * 0.0005 + 0.0005).half()[:, None].view(torch.uint8)
    return {"weight": data.view(N, -1)}


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
CT: dict[str, Any] = {"format": "pack-quantized", "config_groups": {"g": {"weights": {"num_bits": 4}}}}


def gguf(kind: str) -> dict[str, Any]:
    return {"quant_method": "gguf", "types": {"layer.weight": kind}}


FORMATS: dict[str, tuple[dict[str, Any], Callable[[], Tensors]]] = {
    "gptq": (GPTQ, gptq),
    "gptq-act-order": (GPTQ, lambda: gptq(act_order=True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP}, awq),
    "compressed-tensors": (CT | {"quant_method": "compressed-tensors"}, packed),
    "Q4_K": (gguf("Q4_K"), lambda: blocks(144, 0, 2)),
    "Q6_K": (gguf("Q6_K"), lambda: blocks(210, 208)),
}


def measured(name: str, folder: Path) -> None:
    given, make = FORMATS[name]
    file = folder / "model.safetensors"
    save_file({f"layer.{part}": tensor.contiguous() for part, tensor in make().items()}, file)
    config = {"quantization_config": given}
    found = declared_format(config)
    assert found is not None
    checkpoint, _, quant = found[0].adapt(
        Checkpoint.of(folder, config, read_header(file)), found[0].config(found[1]), None, False
    )
    assert isinstance(quant, QuantConfig)
    own = checkpoint.quant_for("layer.weight", quant)
    fill = Fill("layer", "weight", "layer.weight", (N, K), own)
    for _ in range(2):
        begin = time.process_time()
        quantize_weight(checkpoint, fill, own, Meter("bench", 1, None), None, torch.device("cpu"))
        taken = time.process_time() - begin
    print(
        f"{name:20} {own.method:8} {taken:6.2f} s of one thread; a 9B's layers: {taken * LAYERS / (N * K) / 2:4.0f} s"
    )


def main() -> None:
    torch.set_num_threads(1)
    native.set_threads(1)
    for name in sys.argv[1:] or FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            measured(name, Path(folder))


if __name__ == "__main__":
    main()
