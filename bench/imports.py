"""What taking over another tool's weights costs, of random codes in the shapes of a 9B.

`python -m bench.imports [FORMAT ...]` prints seconds of the processor for one layer, 27,392 x 4,096, on one thread, and
those of all layers of a 9B (8.2e9 weights) on two. The second of two runs counts: its file is in memory.

`python -m bench.imports --layers 40 [--load] [--folder FOLDER] [FORMAT ...]` writes a 9B of so many layers (40: 6 GB)
as the tool would, and quantizes it into a folder (another 6 GB), or with `--load` loads it. Told are seconds of the
clock and of the processor, the load of the machine, and the most anonymous memory (of Linux' /proc) above that before,
and, where it is loaded, above its weights. All that is written is removed again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.exports import highest
from bench.make_checkpoint import TOKENIZER, Noise, make_config
from glm4lite import Glm4Config, Glm4ForCausalLM
from glm4lite.base.sizes import readable
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.registry import declared_format
from glm4lite.checkpoint.load_plan import Fill
from glm4lite.checkpoint.prepare import prepare
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.checkpoint.shard import read_header
from glm4lite.checkpoint.streaming import Meter, quantize_weight
from glm4lite.checkpoint.writer import FolderWriter, PlannedTensor
from glm4lite.export.gguf_metadata import describe
from glm4lite.export.gguf_target import GgufWriter
from glm4lite.gguf.header import BLOCKS
from glm4lite.hub.sources import nano_folder
from glm4lite.loading.requirements import imagined
from glm4lite.model.causal_lm import CausalLM
from glm4lite.model.layers import layer_of
from glm4lite.pretrained.load import load
from glm4lite_quant import QuantConfig
from glm4lite_quant.kernels import native

N, K, GROUP = 27392, 4096, 128
LAYERS = 8.2e9
Q4_K_M = 15
"""llama.cpp's number of such a file."""

Tensors = dict[str, Tensor]


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def scales(*shape: int) -> Tensor:
    return (torch.rand(*shape) * 0.001 + 0.0005).half()


def gptq(n: int, k: int, bits: int = 4, act_order: bool = False) -> Tensors:
    found = {"qweight": words(k * bits // 32, n), "qzeros": words(k // GROUP, n * bits // 32)}
    found["scales"] = scales(k // GROUP, n) * (16 / 2**bits)
    return found | ({"g_idx": (torch.randperm(k) // GROUP).int()} if act_order else {})


def awq(n: int, k: int) -> Tensors:
    return {"qweight": words(k, n // 8), "qzeros": words(k // GROUP, n // 8), "scales": scales(k // GROUP, n)}


def packed(n: int, k: int) -> Tensors:
    shape = torch.tensor([n, k])
    return {"weight_packed": words(n, k // 8), "weight_scale": scales(n, k // GROUP), "weight_shape": shape}


def blocks(n: int, k: int, kind: str) -> Tensor:
    """GGUF blocks, uint8 [n, bytes of a row]."""
    weights, size = next((weights, size) for name, weights, size in BLOCKS.values() if name == kind)
    data = torch.randint(0, 256, (n * k // weights, size), dtype=torch.uint8)
    for at in {"Q6_K": (208,), "Q4_K": (0, 2)}.get(kind, (0,)):  # where its float16 scales lie
        data[:, at : at + 2] = (torch.rand(len(data)) * 0.0005 + 0.0005).half()[:, None].view(torch.uint8)
    return data.view(n, -1)


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
CT: dict[str, Any] = {"format": "pack-quantized", "config_groups": {"g": {"weights": {"num_bits": 4}}}}


def gguf(kind: str) -> dict[str, Any]:
    return {"quant_method": "gguf", "types": {"layer.weight": kind}}


FORMATS: dict[str, tuple[dict[str, Any], Callable[[int, int], Tensors]]] = {
    "gptq": (GPTQ, gptq),
    "gptq-act-order": (GPTQ, lambda n, k: gptq(n, k, act_order=True)),
    "gptq-8": (GPTQ | {"bits": 8}, lambda n, k: gptq(n, k, 8)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP}, awq),
    "compressed-tensors": (CT | {"quant_method": "compressed-tensors"}, packed),
    "Q4_K": (gguf("Q4_K"), lambda n, k: {"weight": blocks(n, k, "Q4_K")}),
    "Q6_K": (gguf("Q6_K"), lambda n, k: {"weight": blocks(n, k, "Q6_K")}),
}
WHOLE = ("gptq", "gptq-act-order", "gptq-8", "awq", "compressed-tensors", "Q4_K_M")


def measured(name: str, folder: Path) -> None:
    """One weight."""
    given, make = FORMATS[name]
    file = folder / "model.safetensors"
    save_file({f"layer.{part}": tensor.contiguous() for part, tensor in make(N, K).items()}, file)
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


# --- a whole model


def parameters(config: Glm4Config) -> Iterator[tuple[str, Any]]:
    with torch.device("meta"):
        model = Glm4ForCausalLM(config)
    return ((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())


def write_folder(name: str, folder: Path, config: Glm4Config) -> Path:
    """Weights of the layers in the tool's format, of which those of one shape are all alike; all else bfloat16."""
    given, make = FORMATS[name]
    shapes, noise = dict(parameters(config)), Noise(0)
    linears = {one: shape for one, shape in shapes.items() if layer_of(one) is not None and len(shape) == 2}
    made = {(n, k): make(n, k) for n, k in set(linears.values())}
    parts = {
        one: {f"{one.removesuffix('weight')}{part}": value for part, value in made[shape].items()}
        for one, shape in linears.items()
    }
    every = []
    for one, shape in shapes.items():
        of_it = parts.get(one, {}).items()
        every += [PlannedTensor(part, value.dtype, tuple(value.shape)) for part, value in of_it]
        every += [] if of_it else [PlannedTensor(one, torch.bfloat16, shape)]
    with FolderWriter(folder, every) as writer:
        for one, shape in shapes.items():
            for part, value in parts.get(one, {}).items():
                writer.write(part, value)
            for rows in [] if one in parts else plain(noise, shape):
                writer.append(one, rows)
        writer.write_json("config.json", config.to_diff_dict() | {"quantization_config": given})
        writer.copy(nano_folder() / companion for companion in TOKENIZER)
    return folder


def plain(noise: Noise, shape: tuple[int, ...]) -> Iterator[Tensor]:
    if len(shape) == 1:
        yield torch.ones(shape, dtype=torch.bfloat16)
        return
    for row in range(0, shape[0], 1024):
        rows = min(1024, shape[0] - row)
        yield noise.weights(rows * shape[1]).view(rows, shape[1])


def write_gguf(folder: Path, config: Glm4Config) -> Path:
    """A Q4_K_M file: v and down_proj of half the layers, and the head, in Q6_K, as llama.cpp has them.

    Blocks of 256 do not divide the 13,696 columns of down_proj: it takes Q8_0 for Q6_K there, and Q5_0 for Q4_K.
    """
    with FolderWriter(folder, []) as writer:
        writer.write_json("config.json", config.to_diff_dict())
        writer.copy(nano_folder() / one for one in TOKENIZER)
    prepared, path = prepare(imagined(folder), None, CausalLM), folder / "nine-Q4_K_M.gguf"
    architecture, add = describe(prepared, Q4_K_M)
    types, made = dict[str, str](), dict[tuple[str, tuple[int, ...]], Tensor]()
    every = []
    for name, shape in parameters(config):
        kind = types[name] = kind_of(name, shape, config.num_hidden_layers)
        if kind != "F32" and (kind, shape) not in made:
            n, k = shape
            made[kind, shape] = blocks(n, k, kind)
        stored = made.get((kind, shape), torch.ones(shape))
        every.append((name, stored))
    planned = [PlannedTensor(name, stored.dtype, tuple(stored.shape)) for name, stored in every]
    with GgufWriter(path, planned, types, architecture, add) as writer:
        for name, stored in every:
            writer.write(name, stored)
    return path


def kind_of(name: str, shape: tuple[int, ...], layers: int) -> str:
    place = layer_of(name)
    if len(shape) == 1:
        return "F32"
    if place is None:
        return "Q6_K" if name.startswith("lm_head") else "Q4_K"
    more = place[0] < layers // 8 or place[0] >= 7 * layers // 8 or (place[0] - layers // 8) % 3 == 2
    more = more and ("v_proj" in name or "down_proj" in name)
    if shape[1] % 256:
        return "Q8_0" if more else "Q5_0"
    return "Q6_K" if more else "Q4_K"


def whole(name: str, layers: int, into_memory: bool, place: Path) -> None:
    """Runs in a process of its own."""
    config = make_config("9b", layers)
    source = write_gguf(place / "in", config) if name == "Q4_K_M" else write_folder(name, place / "in", config)
    os.sync()
    held: list[int] = []

    def take_over() -> None:
        if into_memory:
            model = load(source, quant="auto")
            held.append(sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())))
        else:
            quantize_checkpoint(source, place / "out", "int4")

    clock, cpu = time.perf_counter(), time.process_time()
    most = highest(take_over)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    above = f", {readable(most - held[0])} above its weights" if held else ""
    print(
        f"{name:20} {layers} layers: {clock:.0f} s of the clock, {cpu:.0f} s of the processor at a load of "
        f"{os.getloadavg()[0]:.1f}; {readable(most)} of memory{above}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"{', '.join((*FORMATS, WHOLE[-1]))}")
    parser.add_argument("--layers", type=int, help="a whole model of so many")
    parser.add_argument("--load", action="store_true", help="into memory, not into a folder")
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder")
    given = parser.parse_args()
    for name in given.formats or (FORMATS if given.layers is None else WHOLE):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            if given.layers is not None:
                arguments = (name, given.layers, given.load, Path(folder))
                process = multiprocessing.get_context("spawn").Process(target=whole, args=arguments)
                process.start()
                process.join()
                continue
            torch.set_num_threads(1)
            native.set_threads(1)
            measured(name, Path(folder))


if __name__ == "__main__":
    main()
