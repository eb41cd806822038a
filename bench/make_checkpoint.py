"""A checkpoint of a GLM-4 model's true shapes with random weights, which cost the same time and memory as trained ones.

`python -m bench.make_checkpoint OUT [--shape 9b] [--layers N] [--quantized int4|int8] [--seed 0]` writes bfloat16
shards of at most 5 GiB (9b, all 40 layers: 18.8 GB), or, with --quantized, random codes and scales straight in
glm4lite's own format. The tokenizer beside them is nano's, so that text goes in and comes out, without sense.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glm4lite import Glm4Config, Glm4ForCausalLM, Glm4liteError
from glm4lite.base.sizes import readable
from glm4lite.checkpoint.writer import FolderWriter, PlannedTensor
from glm4lite.hub.sources import nano_folder
from glm4lite_quant import QuantConfig, QuantError, QuantTensor

COMMON: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "eos_token_id": None,  # nothing stops a measured generation
    "pad_token_id": 151329,
    "dtype": "bfloat16",
}
_32B: dict[str, Any] = {
    "hidden_size": 6144,
    "intermediate_size": 23040,
    "num_hidden_layers": 61,
    "num_attention_heads": 48,
    "attention_bias": False,
}
# Where a shape is silent, Glm4Config's defaults are those of GLM-4-9B-0414.
SHAPES: dict[str, dict[str, Any]] = {
    "9b": {},
    "32b": _32B,
    "rumination": {**_32B, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "9b-chat": {"model_type": "glm", "rms_norm_eps": 1.5625e-7, "max_position_embeddings": 131072},
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SHARD_BYTES = 5 << 30
PIECE = 16 << 20  # elements written at a time
STD = 0.02
ROW_SCALE = {4: STD / (160 * 4.6), 8: STD / (160 * 73)}  # 160: mean of the scales; 4.6 and 73: deviation of the codes


class Noise:
    """Random windows of one pool of random numbers: cheap, and no two rows of a model are alike."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._weights = (torch.randn(PIECE + (1 << 20), generator=self._random) * STD).bfloat16()
        self._bytes = torch.randint(0, 256, (PIECE + (1 << 20),), generator=self._random, dtype=torch.uint8)

    def weights(self, count: int) -> Tensor:
        """bfloat16 [count] from N(0, 0.02), count <= PIECE."""
        return self._window(self._weights, count)

    def codes(self, count: int) -> Tensor:
        """uint8 [count], all values alike."""
        return self._window(self._bytes, count)

    def _window(self, pool: Tensor, count: int) -> Tensor:
        start = int(torch.randint(0, len(pool) - count + 1, (), generator=self._random))
        return pool[start : start + count]


def make_config(shape: str, layers: int | None = None) -> Glm4Config:
    """The config of a released model; `layers` makes it smaller."""
    changes = {} if layers is None else {"num_hidden_layers": layers}
    return Glm4Config(**{**COMMON, **SHAPES[shape], **changes})


def write_checkpoint(
    folder: Path,
    config: Glm4Config,
    quant: QuantConfig | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the folder; with `quant`, in glm4lite's quantized format. Raises CheckpointError where it cannot be."""
    with torch.device("meta"):
        model = Glm4ForCausalLM(config)
    noise, planned = Noise(seed), list(_planned(model, quant))
    values = config.to_diff_dict() | ({} if quant is None else {"quantization_config": quant.to_dict()})
    with FolderWriter(folder, planned, shard_bytes) as writer:
        for tensor in planned:
            for piece in _pieces(tensor, noise):
                writer.append(tensor.name, piece)
        writer.write_json("config.json", values)
        writer.copy(nano_folder() / name for name in TOKENIZER)


def _planned(model: nn.Module, quant: QuantConfig | None) -> Iterator[PlannedTensor]:
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        shape, own = tuple(parameter.shape), None
        if quant is not None and leaf == "weight" and len(shape) == 2:
            own = quant.for_module(module)
        if own is None:
            yield PlannedTensor(name, torch.bfloat16, shape)
            continue
        for part, tensor in QuantTensor.empty(shape[0], shape[1], own, "meta").tensors().items():
            yield PlannedTensor(f"{module}.{part}", tensor.dtype, tuple(tensor.shape))


def _pieces(tensor: PlannedTensor, noise: Noise) -> Iterator[Tensor]:
    """The tensor's values in order, a few MiB at a time."""
    total = torch.Size(tensor.shape).numel()
    for start in range(0, total, PIECE):
        yield _values(tensor, min(PIECE, total - start), noise)


def _values(tensor: PlannedTensor, count: int, noise: Noise) -> Tensor:
    part = tensor.name.rpartition(".")[2]
    if part == "qweight":
        wide = tensor.shape[2] == 512
        return noise.codes(count).view(torch.int8).clamp(min=-127).view(torch.uint8) if wide else noise.codes(count)
    if part in ("scales", "mins"):  # alike, so that with row_min = 7.5 * row_scale the weights have mean 0
        return torch.full((count,), 160, dtype=torch.uint8)
    if part in ("row_scale", "row_min"):
        affine = tensor.name.endswith("row_min")
        return torch.full((count,), ROW_SCALE[4] * 7.5 if affine else ROW_SCALE[4])
    if part == "bias" or len(tensor.shape) == 2:
        return noise.weights(count)
    return torch.ones(count, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="9b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--quantized", choices=("int4", "int8"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        config = make_config(given.shape, given.layers)
        write_checkpoint(given.out, config, QuantConfig.parse(given.quantized), given.seed)
    except (Glm4liteError, QuantError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    size = sum(file.stat().st_size for file in given.out.iterdir())
    print(f"{given.out}: {readable(size)}, {config.num_hidden_layers} layers")


if __name__ == "__main__":
    main()
