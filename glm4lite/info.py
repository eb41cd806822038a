"""What `glm4lite info` says: the machine, the kernels, and what a checkpoint needs."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from glm4lite import __version__
from glm4lite.weights.memory import readable

if TYPE_CHECKING:
    import torch

    from glm4lite_quant import QuantConfig

Fact = tuple[str, str]

# Packages a feature hangs on, and that feature.
PACKAGES = (
    ("safetensors", "checkpoints"),
    ("tokenizers", "text"),
    ("huggingface-hub", "downloads"),
    ("bitsandbytes", "NF4 on GPUs"),
    ("gradio", "the web chat"),
    ("triton", "GPU kernels"),
)


def machine_facts() -> list[Fact]:
    """Versions, devices, kernels; what is missing is named with what it is for."""
    import torch

    from glm4lite_quant import kernels

    facts = [
        ("glm4lite", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores"),
        ("cuda", _cuda()),
        ("cpu kernels", kernels.status()),
    ]
    return facts + [(name, _installed(name, purpose)) for name, purpose in PACKAGES]


def model_facts(source: str) -> list[Fact]:
    """A checkpoint's shape, and the bytes of its weights at each precision."""
    import torch

    from glm4lite.checkpoint import Checkpoint
    from glm4lite.config import Glm4Config
    from glm4lite.hub import resolve
    from glm4lite.model import Glm4ForCausalLM
    from glm4lite_quant import QuantConfig

    folder = resolve(source)
    checkpoint = Checkpoint.open(folder)
    config = Glm4Config.from_dict(checkpoint.config, folder / "config.json")
    stored = checkpoint.config.get("quantization_config")
    with torch.device("meta"):
        model = Glm4ForCausalLM(config)
    heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads"
    kv_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    sizes = [(name, weight_bytes(model, QuantConfig.parse(name))) for name in ("int4", "int8", "none")]
    return [
        ("model", str(folder)),
        ("architecture", f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}, {heads}"),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("stored as", f"int{stored['bits']}, groups of {stored['group_size']}" if stored else str(config.dtype)),
        ("context", f"{config.max_position_embeddings:,} tokens, {kv_bytes:,} bytes of bfloat16 cache each"),
        *((f"weights, {'bfloat16' if name == 'none' else name}", readable(size)) for name, size in sizes),
    ]


def weight_bytes(model: torch.nn.Module, quant: QuantConfig | None) -> int:
    """Bytes of a meta model's weights once quantized (None: as bfloat16); tied weights count once."""
    import torch

    from glm4lite_quant import QuantTensor

    total, seen = 0, set()
    for name, parameter in model.named_parameters():
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        layer = isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
        rule = quant.for_module(module_name) if quant and layer else None
        if parameter in seen:
            continue
        seen.add(parameter)
        if rule is not None and leaf == "weight":
            rows, columns = parameter.shape
            total += QuantTensor.empty(rows, columns, rule, device="meta").nbytes
        else:
            total += parameter.numel() * (4 if quant else 2)
    return total


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none found: everything runs on the CPU"
    cards = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)


def _installed(name: str, purpose: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f"not installed (for {purpose})"
