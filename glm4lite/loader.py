"""From a checkpoint to a model, one block of rows at a time.

The skeleton is built on the meta device; each weight is read in blocks of at most 16 MiB, quantized, assigned and
dropped, so the peak is the quantized model plus a few blocks, never the checkpoint. Weights that lie quantized in the
checkpoint are mapped in place and not copied.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

from glm4lite.checkpoint import Checkpoint
from glm4lite.errors import CheckpointError, ConfigError
from glm4lite.hub import resolve
from glm4lite.weights import memory
from glm4lite.weights.calibration import layer_bytes
from glm4lite.weights.foreign import Quant, adapt, read_weight
from glm4lite.weights.plan import (
    Fill,
    Model,
    Plan,
    automatic_dtype,
    make_plan,
    parse_quant,
    read_config,
    say_notices,
    skeleton,
    stored_quant,
)
from glm4lite.weights.quantized import quantize_checkpoint, save_quantized
from glm4lite.weights.streaming import (
    Meter,
    ProgressCallback,
    begin,
    blocks,
    bnb_weight,
    calibration_text,
    needs_calibration,
    quantize_weight,
    recorded,
)
from glm4lite_quant import (
    BnbConfig,
    BnbLinear,
    BnbTensor,
    QuantConfig,
    QuantEmbedding,
    QuantError,
    QuantLinear,
    QuantTensor,
    bnb,
)
from glm4lite_quant.config import input_parts
from glm4lite_quant.kernels import native

if TYPE_CHECKING:
    from glm4lite.model import Glm4ForCausalLM

__all__ = ["load", "quantize_checkpoint", "save_quantized"]

logger = logging.getLogger("glm4lite")

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@overload
def load(
    source: str | Path,
    quant: str | Quant | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: ProgressCallback | None = None,
    cls: None = None,
    calibration: str | Path | None = None,
) -> Glm4ForCausalLM: ...


@overload
def load(
    source: str | Path,
    quant: str | Quant | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: ProgressCallback | None = None,
    *,
    cls: type[Model],
    calibration: str | Path | None = None,
) -> Model: ...


def load(
    source: str | Path,
    quant: str | Quant | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: ProgressCallback | None = None,
    cls: type[nn.Module] | None = None,
    calibration: str | Path | None = None,
) -> nn.Module:
    """Load a model from a folder, from "nano", or from a Hub repo id.

    Args:
        source: a folder with config.json and safetensors, "nano", or "organisation/name" on the Hub.
        quant: "int4", "int8", "nf4", "fp4", "none", a QuantConfig or BnbConfig, or None for what is stored. A
            checkpoint that is quantized already is loaded as it is; another quant than its own is refused, "none" too.
            "int4" is calibrated, which runs a short text through the layers; QuantConfig(method="search") is quicker
            and less exact. "nf4" and "fp4" are bitsandbytes'. A checkpoint of its 4-bit weights is also decoded:
            to "int4", "int8" or "none" where that is asked for, to int4 where bitsandbytes is not installed.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1".
        dtype: of the activations (and of weights that are not quantized): "auto", "float32", "bfloat16".
        progress: called after each block with the bytes read; an exception it raises stops the load.
        cls: Glm4ForCausalLM unless given.
        calibration: a UTF-8 text to calibrate with, instead of the one that comes with the package.

    Returns:
        The model in eval mode. With quantized weights its norms and biases are float32 and nothing requires gradients.

    Raises:
        Glm4liteError: one line saying which file, tensor, key or argument cannot be used, and what to do.
    """
    wanted, target, chosen = check_arguments(quant, device, dtype)
    text = calibration_text(calibration, wanted)
    checkpoint = Checkpoint.open(resolve(source, progress))
    stored = stored_quant(checkpoint, quant)
    if isinstance(stored, BnbConfig):
        checkpoint, stored, wanted = adapt(checkpoint, stored, wanted, quant is not None)
    config = read_config(checkpoint)
    model = skeleton(checkpoint, config, cls)
    plan = make_plan(model, checkpoint, None if stored else wanted)
    activations = chosen or automatic_dtype(checkpoint, plan, target)
    _check_memory(checkpoint, plan, wanted, target, activations)
    say_notices(model, checkpoint, plan)
    if plan.bitsandbytes and target.type == "cpu":
        logger.warning("on a CPU bitsandbytes unpacks a whole weight at each use: quant='int4' is several times faster")
    meter = Meter("load", _total_bytes(checkpoint, plan), progress)
    calibrator = begin(checkpoint, plan, config, text, meter)
    for fill in plan.fills:
        if fill.quant is None:
            _fill(model, checkpoint, plan, fill, target, activations, meter)
        elif isinstance(fill.quant, BnbConfig):
            _replace(model, fill, bnb_weight(checkpoint, fill, meter, target), target, activations)
        else:
            _replace(model, fill, quantize_weight(checkpoint, fill, meter, calibrator), target, activations)
    if isinstance(stored, QuantConfig):
        _check_as_stored(model, checkpoint, stored)
    _initialise(model, plan, target, activations)
    if plan.tied:
        _tie(model)
    if plan.quantized:
        model.requires_grad_(False)
        made = recorded(stored or wanted or QuantConfig(), calibrator)
        cast(Any, model).config.quantization_config = made.to_dict()
    _check_complete(model)
    return model.eval()


def check_arguments(
    quant: str | Quant | None, device: str | torch.device, dtype: str | torch.dtype
) -> tuple[Quant | None, torch.device, torch.dtype | None]:
    """What can be refused before a model is looked for or downloaded: `load`'s arguments (dtype None: "auto").

    Raises:
        ConfigError: naming the argument.
        QuantError: GLM4LITE_ISA or GLM4LITE_THREADS asks for what this machine has not, or bitsandbytes is needed.
    """
    native.check_environment()
    found = parse_quant(quant), _device(device), _dtype(dtype)
    if isinstance(found[0], BnbConfig):
        bnb.library()
    return found


def _fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    plan: Plan,
    fill: Fill,
    device: torch.device,
    activations: torch.dtype,
    meter: Meter,
) -> None:
    if fill.parts:
        weight = _mapped_weight(checkpoint, fill) if fill.bnb is None else read_weight(checkpoint, fill.bnb)
        meter.add(sum(checkpoint.nbytes(part) for part in fill.parts))
        _replace(model, fill, weight, device, activations)
    else:
        values = _read_plain(checkpoint, fill, device, plan.plain_dtype(fill, activations), meter)
        _assign(model.get_submodule(fill.module), fill.parameter, values)


def _mapped_weight(checkpoint: Checkpoint, fill: Fill) -> QuantTensor:
    """A weight that is quantized in the file: its tensors over the map, checked against each other and the model."""
    file = checkpoint.file(fill.parts[0])
    try:
        weight = QuantTensor.from_tensors({part.rpartition(".")[2]: checkpoint.mapped(part) for part in fill.parts})
    except QuantError as error:
        raise CheckpointError(f"{fill.source} in {file}: {error}; download it or quantize the original again") from None
    if weight.shape != fill.shape:
        raise CheckpointError(
            f"{fill.source} in {file} has shape {list(weight.shape)}, config.json needs {list(fill.shape)}; "
            "correct config.json or quantize the original again"
        )
    return weight


def _replace(
    model: nn.Module, fill: Fill, weight: QuantTensor | BnbTensor, device: torch.device, dtype: torch.dtype
) -> None:
    """Put a quantized module in the place of the skeleton's."""
    old = model.get_submodule(fill.module)
    if isinstance(weight, BnbTensor):
        if not isinstance(old, nn.Linear):
            raise CheckpointError(f"{fill.source} is {weight.kind}, but no linear layer; load it with quant='int4'")
        _set_module(model, fill.module, BnbLinear(weight.to(device), old.bias is not None))
        return
    config = QuantConfig(weight.bits, weight.group_size)
    new: QuantLinear | QuantEmbedding
    if isinstance(old, nn.Linear):
        bias, parts = old.bias is not None, input_parts(fill.module)
        new = QuantLinear(old.in_features, old.out_features, config, bias, device="meta", input_parts=parts)
    elif isinstance(old, nn.Embedding):
        new = QuantEmbedding(old.num_embeddings, old.embedding_dim, config, device="meta", dtype=dtype)
    else:
        raise CheckpointError(f"{fill.parts[0]} quantizes {fill.module}, which is neither linear nor an embedding")
    new.load(_moved(weight, device))
    _set_module(model, fill.module, new)


def _moved(weight: QuantTensor, device: torch.device) -> QuantTensor:
    if weight.device == device:
        return weight
    return QuantTensor.from_tensors({name: tensor.to(device) for name, tensor in weight.tensors().items()})


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _read_plain(checkpoint: Checkpoint, fill: Fill, device: torch.device, dtype: torch.dtype, meter: Meter) -> Tensor:
    """A tensor straight into its final memory, converted block by block."""
    values = torch.empty(fill.shape, dtype=dtype, device=device)
    for start, rows in blocks(checkpoint, fill.source, meter):
        values[start : start + rows.shape[0]] = rows
    return values


def _assign(module: nn.Module, name: str, values: Tensor) -> None:
    is_parameter = isinstance(getattr(module, name), nn.Parameter)
    setattr(module, name, nn.Parameter(values) if is_parameter else values)


def _tie(model: nn.Module) -> None:
    """The head shares the embedding's tensors: one copy under two modules."""
    embedding = model.get_submodule("model.embed_tokens")
    if isinstance(embedding, QuantEmbedding):
        weight = embedding.weight_tensor
        config = QuantConfig(weight.bits, weight.group_size)
        shape, parts = (embedding.embedding_dim, embedding.num_embeddings), input_parts("lm_head")
        head = QuantLinear(*shape, config, bias=False, device="meta", input_parts=parts)
        head.load(weight)
        _set_module(model, "lm_head", head)
    else:
        cast(Any, model).lm_head.weight = cast(Any, embedding).weight


def _check_as_stored(model: nn.Module, checkpoint: Checkpoint, stored: QuantConfig) -> None:
    """The weights must be what config.json says of them: a config.json of another folder would be believed."""
    for name, module in model.named_modules():
        said = stored.for_module(name)
        if said is None or not isinstance(module, QuantLinear | QuantEmbedding):
            continue
        weight = module.weight_tensor
        if (weight.bits, weight.group_size) != (said.bits, said.group_size):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is stored in int{weight.bits}, groups of {weight.group_size}, but "
                f"config.json says int{said.bits}, groups of {said.group_size}; get back the config.json that belongs "
                "to the weights, or quantize the original again"
            )


def _initialise(model: nn.Module, plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
    """Values for a classification head that no file holds: N(0, initializer_range), biases 0, as the reference does."""
    std = cast(Any, model).config.initializer_range
    for module, parameter in plan.fresh:
        layer = model.get_submodule(module)
        values = torch.zeros(getattr(layer, parameter).shape, dtype=dtype, device=device)
        _assign(layer, parameter, values if parameter == "bias" else values.normal_(std=std))


def _check_complete(model: nn.Module) -> None:
    left = [name for name, value in model.state_dict().items() if value.is_meta]
    if left:
        raise CheckpointError(f"{left[0]} got no values; this is a defect of glm4lite, please report it")


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device {device!r} is not known; use auto, cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {str(device)!r} is not supported; use auto, cpu, cuda or cuda:N")
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {str(device)!r} was asked for, but torch finds no CUDA device; use device='cpu'")
        count = torch.cuda.device_count()
        if found.index is not None and found.index >= count:
            raise ConfigError(f"device {str(device)!r} was asked for, but there are {count} CUDA devices")
        return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    return found


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None means "auto"."""
    if dtype == "auto":
        return None
    found = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype).removeprefix("torch."))
    if found == torch.float16:
        raise ConfigError(
            "dtype float16 is refused: GLM-4's activations reach 68000, above float16's largest number; "
            "use bfloat16 or float32"
        )
    if found not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"dtype {str(dtype)!r} is not supported; use auto, float32 or bfloat16")
    return found


def _total_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    return sum(checkpoint.nbytes(name) for fill in plan.fills for name in (fill.parts or (fill.source,)))


def _check_memory(
    checkpoint: Checkpoint, plan: Plan, wanted: Quant | None, device: torch.device, activations: torch.dtype
) -> None:
    """Refuse at once what cannot fit. What is mapped does not count: its pages can be dropped."""
    needed, free = plan.held_bytes(activations), memory.available()
    if needs_calibration(plan):
        needed += layer_bytes(checkpoint, plan)
    if device.type != "cpu" or free is None or needed <= free:
        return
    advice = "load a folder made by `glm4lite quantize`, which is mapped"
    if wanted is None and not plan.quantized:
        advice = f"quantize it (quant='int4'), or {advice}"
    elif isinstance(wanted, QuantConfig) and wanted.bits == 8:
        advice = f"use quant='int4', or {advice}"
    raise CheckpointError(
        f"{checkpoint.folder} needs {memory.readable(needed)} of memory, {memory.readable(free)} are free; {advice}"
    )
