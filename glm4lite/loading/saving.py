"""`save_pretrained`: a model in memory -> a folder that Transformers opens too, unless it holds glm4lite's own weights.

Tensors go to the file one by one, as they are; layers that lie on disk are copied from the checkpoint they stream from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glm4lite.base.errors import CheckpointError, ConfigError, shown
from glm4lite.base.files import CONFIG, some
from glm4lite.base.sizes import parse_size
from glm4lite.base.stored_tensor import StoredTensor
from glm4lite.checkpoint.formats.bitsandbytes import tensors_of
from glm4lite.checkpoint.quantize import destination_folder
from glm4lite.checkpoint.shard import read, torch_dtype
from glm4lite.checkpoint.writer import FolderWriter, PlannedTensor
from glm4lite.model.lora import adapters_in
from glm4lite.runtime.disk_offload import streamed
from glm4lite_quant import BnbLinear, QuantEmbedding, QuantLinear, bnb

if TYPE_CHECKING:
    from glm4lite.model.trunk import ModelBase

GENERATION_CONFIG = "generation_config.json"


def save_model(
    model: ModelBase,
    folder: str | Path,
    max_shard_size: int | str,
    state_dict: Mapping[str, Tensor] | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes shards, index, config.json and, where there is one, generation_config.json.

    Files of other names in the folder stay. What is replaced is replaced as a whole: an error leaves the old files.

    Raises:
        CheckpointError: the folder cannot be written, or the model cannot be saved as it is.
        ConfigError: an argument cannot be used.
    """
    shard_bytes = _shard_bytes(max_shard_size)
    beside = [name for name, module in model.named_modules() if adapters_in(module) is not None]
    if beside and state_dict is None:
        raise CheckpointError(
            f"{some(beside)} has a LoRA adapter beside its weight, which no checkpoint holds; save the model without "
            "lora, or quantize the original with `glm4lite quantize --lora`"
        )
    target = destination_folder(folder, replace=True)
    tensors = _tensors(model) if state_dict is None else _given(model, state_dict)
    planned = [PlannedTensor(name, _dtype(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()]
    with FolderWriter(target, planned, shard_bytes, replace=True) as writer:
        for name, tensor in tensors.items():
            writer.write(name, read(tensor) if isinstance(tensor, StoredTensor) else tensor)
        writer.write_json(CONFIG, _config(model))
        if generation_config is not None:
            writer.write_json(GENERATION_CONFIG, generation_config)


def _shard_bytes(size: int | str) -> int:
    count = parse_size(size) if isinstance(size, str) else size
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"max_shard_size is {shown(size)}; use a number of bytes, or a text such as '5GB'")
    return count


def _dtype(tensor: Tensor | StoredTensor) -> torch.dtype:
    return torch_dtype(tensor) if isinstance(tensor, StoredTensor) else tensor.dtype


def _tensors(model: ModelBase) -> dict[str, Tensor | StoredTensor]:
    """All that is to be written, by its name in the file."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, BnbLinear)}
    on_disk = dict(_on_disk(model))
    tied = _is_tied(model)
    found: dict[str, Tensor | StoredTensor] = {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if tied and module == "lm_head":
            continue
        if module in modules and leaf != "bias":
            if leaf == "packed":
                found |= tensors_of(f"{module}.weight", modules[module].weight_tensor, model.dtype)
            continue
        found[name] = on_disk.get(name, _as_narrow(tensor, model.dtype) if modules else tensor)
    empty = [name for name, tensor in found.items() if isinstance(tensor, Tensor) and tensor.is_meta]
    if empty:
        raise CheckpointError(f"{some(empty)} has no values: the model lies on the meta device; load it first")
    return found


def _as_narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms and biases beside bitsandbytes' layers, in whose type Transformers computes, where no value changes."""
    if tensor.dim() != 1 or tensor.is_meta or tensor.dtype != torch.float32:
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.float(), tensor) else tensor


def _on_disk(model: nn.Module) -> Iterator[tuple[str, StoredTensor]]:
    """The planes of the layers that stream from a checkpoint, by the names they have in the model."""
    from glm4lite.model.layers import DecoderLayer

    for name, layer in model.named_modules():
        place = streamed(layer) if isinstance(layer, DecoderLayer) else None
        if place is not None:
            yield from ((f"{name}.{part}", stored) for part, stored in place.stored().items())


def _is_tied(model: ModelBase) -> bool:
    """Whether the head is left out, being the embedding. CheckpointError where it no longer is."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not model.config.tie_word_embeddings:
        return False
    if isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding):
        one, other = head.weight, embedding.weight
        if one is not other and one.data_ptr() != other.data_ptr() and not torch.equal(one, other.to(one.device)):
            raise CheckpointError(
                "config.tie_word_embeddings is true, but head and embedding differ: call tie_weights(), or set it to "
                "False to save both"
            )
    return True


def _given(model: ModelBase, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor | StoredTensor]:
    """A state dict of the caller's, which must be the whole model's, unquantized."""
    every, tied = model.state_dict(), _is_tied(model)
    own = {name: tensor for name, tensor in every.items() if not (tied and name.startswith("lm_head."))}
    if any(isinstance(module, QuantLinear | QuantEmbedding | BnbLinear) for module in model.modules()):
        raise CheckpointError("a state_dict is given for a quantized model; leave it out")
    given = {name: tensor for name, tensor in state_dict.items() if name in own or name not in every}
    if not all(isinstance(tensor, Tensor) for tensor in given.values()):
        raise CheckpointError("state_dict must hold tensors")
    lacking, strange = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    wrong = [name for name in own.keys() & given.keys() if given[name].shape != own[name].shape]
    for names, what in ((lacking, "lacks"), (strange, "holds, unlike the model,"), (wrong, "has another shape of")):
        if names:
            raise CheckpointError(f"state_dict {what} {some(names)}; give the whole model's, or leave it out")
    odd = [name for name, tensor in given.items() if tensor.dtype not in (torch.float32, torch.bfloat16)]
    if odd:
        raise CheckpointError(f"state_dict holds {some(odd)} as {given[odd[0]].dtype}; use bfloat16 or float32")
    return dict(given)


def _config(model: ModelBase) -> dict[str, Any]:
    """config.json; the class by the name it has in Transformers, which has one of each model type."""
    values = model.config.to_diff_dict()
    name = type(model).__name__
    values["architectures"] = [name.replace("Glm4", "Glm", 1) if model.config.model_type == "glm" else name]
    quantization = values.get("quantization_config")
    if quantization is None or quantization.get("quant_method") == bnb.QUANT_METHOD:
        values["dtype"] = str(model.dtype).removeprefix("torch.")
    if quantization is not None and quantization.get("quant_method") == bnb.QUANT_METHOD:
        plain = [own for own, module in model.named_modules() if isinstance(module, nn.Linear)]
        told = {"bnb_4bit_compute_dtype": values["dtype"], "llm_int8_skip_modules": plain or None}
        values["quantization_config"] = {**quantization, **told}
    return values
