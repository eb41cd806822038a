"""What `glm4lite info` says: the machine, the kernels, and what a checkpoint needs."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from glm4lite import __version__
from glm4lite.base.sizes import readable

if TYPE_CHECKING:
    import torch

    from glm4lite.base.events import Progress
    from glm4lite.checkpoint.checkpoint import Checkpoint
    from glm4lite.checkpoint.formats.format import Stored
    from glm4lite.checkpoint.lora.folder import Loras
    from glm4lite.model.config import Glm4Config
    from glm4lite_quant import QuantConfig

Fact = tuple[str, str]

# Packages a feature hangs on, that feature, and how to install them.
PACKAGES = (
    ("safetensors", "checkpoints", "safetensors"),
    ("tokenizers", "text", "tokenizers"),
    ("huggingface-hub", "downloads", "huggingface-hub"),
    ("bitsandbytes", "NF4 and FP4", "'glm4lite[bnb]'"),
    ("gradio", "the web chat", "'glm4lite[ui]'"),
    ("mcp", "MCP servers", "'glm4lite[mcp]'"),
    ("triton", "GPU kernels", "triton"),
)


def machine_facts() -> list[Fact]:
    """Versions, devices, kernels; what is missing is named with what it is for."""
    import torch

    from glm4lite_quant.kernels import picking

    facts = [
        ("glm4lite", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("cuda", _cuda()),
        ("cpu cores", _cores()),
        ("cpu kernels", picking.status()),
        ("gpu kernels", picking.gpu_status()),
        *_gpu_decoding(),
    ]
    return facts + [(package[0], _installed(*package)) for package in PACKAGES]


def model_facts(
    source: str, progress: Callable[[Progress], None] | None = None, loras: Loras | None = None
) -> list[Fact]:
    """A checkpoint's shape, and the bytes of its weights at each precision it can be loaded with, of adapters beside
    them too.

    `progress` sees the download where `source` is a Hub repo. Raises what `load` raises, before reading any weight.
    """
    import torch

    from glm4lite.checkpoint.load_plan import read_config, skeleton
    from glm4lite.checkpoint.lora.folder import Loras
    from glm4lite.checkpoint.prepare import model_class, opened
    from glm4lite.checkpoint.quant_choice import stored_quant
    from glm4lite.loading.requirements import requirements_of
    from glm4lite.model.packed_cache import bytes_per_token

    checkpoint = opened(source, progress)
    config, stored = read_config(checkpoint), stored_quant(checkpoint)
    model = skeleton(config, model_class(checkpoint))
    heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads"
    kv_bytes = bytes_per_token(config, "float", torch.bfloat16.itemsize)
    loras = Loras() if loras is None else loras
    weights = [requirements_of(checkpoint, quant, loras) for quant in _ways(stored)]
    named = _stored_as(checkpoint, stored) if stored else weights[-1].quant
    return [
        ("model", str(checkpoint.origin)),
        ("architecture", f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}, {heads}"),
        ("parameters", f"{_parameters(model):,}"),
        ("stored as", named),
        ("context", f"{config.context_length:,} tokens{_scaled(config)}, {kv_bytes:,} bytes of bfloat16 cache each"),
        *_adapters(loras),
        *((f"weights, {needs.quant}", readable(needs.weight_bytes)) for needs in weights),
    ]


def _adapters(loras: Loras) -> Iterator[Fact]:
    always, choices = loras.opened()
    for name, adapter in (*(("", one) for one in always), *choices.items()):
        ranks = " and ".join(map(str, sorted({factors.rank for factors in adapter.file.factors})))
        changes = f"rank {ranks}, {len(adapter.file.factors)} weights" if ranks else "no weights in low rank"
        saved = f", {len(adapter.file.saved)} tensors saved whole" if adapter.file.saved else ""
        scale = f", times {adapter.scale:g}" if adapter.scale != 1 else ""
        yield f"adapter {name}".rstrip(), f"{adapter.name}: {changes}{saved}{scale}"


def _scaled(config: Glm4Config) -> str:
    rope = config.rope_parameters
    if rope["rope_type"] != "yarn":
        return ""
    return f" (YaRN, {rope['factor']:g} x {rope['original_max_position_embeddings']:,}, in short texts too)"


def _stored_as(checkpoint: Checkpoint, stored: Stored) -> str:
    from glm4lite.checkpoint.formats.registry import format_of
    from glm4lite_quant import QuantConfig

    if isinstance(stored, QuantConfig):
        return _codecs(checkpoint, stored) if stored.mixed else str(stored.codec)
    return format_of(stored).described(checkpoint, stored)


def _codecs(checkpoint: Checkpoint, stored: QuantConfig) -> str:
    """How many bits a weight has on average, and how many modules have which codec."""
    from collections import Counter

    from glm4lite.checkpoint.prepare import model_class, prepare
    from glm4lite.loading.requirements import average_bits

    plan = prepare(checkpoint, None, model_class(checkpoint)).plan
    stored_as = (stored.for_module(fill.module) for fill in plan.fills if fill.parts)
    counts = Counter(config.codec for config in stored_as if config is not None)
    said = "; ".join(f"{counts[codec]} of {codec}" for codec in sorted(counts))
    return f"{average_bits(checkpoint, plan):.2f} bits a weight on average: {said}"


def _ways(stored: Stored | None) -> tuple[str | None, ...]:
    """What `quant` may be where a checkpoint is stored like this; the last one of a plain checkpoint is its own."""
    from glm4lite_quant import BnbConfig, QuantConfig

    if isinstance(stored, QuantConfig):
        return (None,)
    return (*((None,) if isinstance(stored, BnbConfig) else ()), "int4", "int8", "none")


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _cores() -> str:
    """What the process may use, and where another number of threads than the kernels take by themselves may pay."""
    from glm4lite_quant.host import cores

    found = cores()
    fast = found.physical - found.efficient
    hint = (
        f"; `--threads {fast}` uses the fast ones alone: try both" if found.efficient and fast < found.threads else ""
    )
    return f"{found}{hint}"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none found: everything runs on the CPU"
    cards = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)


def _gpu_decoding() -> list[Fact]:
    """How tokens are decoded on the first GPU; nothing where there is none."""
    import torch

    from glm4lite.runtime import cuda_graph

    if not torch.cuda.is_available():
        return []
    return [("gpu decoding", cuda_graph.status(torch.device("cuda", torch.cuda.current_device())))]


def _installed(name: str, purpose: str, source: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f"not installed; {purpose}: pip install {source}"
