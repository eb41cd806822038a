"""The way into every use of a checkpoint: found, opened, its config read, its quantization decided, tensors planned.

Loading, quantizing, planning, `info` and `bench` begin here, so that each refuses the same things with the same words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic

from torch import nn

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.decoded import joined
from glm4lite.checkpoint.formats.format import Imported, Quant
from glm4lite.checkpoint.formats.registry import format_of, open_source
from glm4lite.checkpoint.load_plan import LoadPlan, Model, make_load_plan, read_config, skeleton
from glm4lite.checkpoint.lora.adapted import AdaptedCheckpoint, Beside
from glm4lite.checkpoint.lora.folder import Loras
from glm4lite.checkpoint.quant_choice import chosen, parse_quant, stored_quant
from glm4lite.checkpoint.streaming import ProgressCallback
from glm4lite.hub.options import HubOptions
from glm4lite.hub.sources import resolve
from glm4lite.model.causal_lm import CausalLM
from glm4lite.model.classifiers import SequenceClassifier, TokenClassifier
from glm4lite.model.config import Glm4Config
from glm4lite_quant import BnbConfig, QuantConfig
from glm4lite_quant.config import SEARCH


@dataclass
class Prepared(Generic[Model]):
    """A checkpoint before its weights are read.

    checkpoint: a plain one where another tool's weights are to be decoded. model: without weights, on the meta device.
    stored: what its weights are quantized to and stay. wanted: what they are quantized to while they are read.
    beside: the weights that get a low-rank path, since their adapters are not merged. choices: adapters by name.
    """

    checkpoint: Checkpoint
    config: Glm4Config
    model: Model
    plan: LoadPlan
    stored: Quant | None
    wanted: Quant | None
    beside: list[Beside] = field(default_factory=list)
    choices: tuple[str, ...] = ()

    @property
    def quant(self) -> Quant | None:
        """What the weights will be."""
        return self.stored or self.wanted


def opened(source: str | Path, progress: ProgressCallback | None = None, hub: HubOptions = HubOptions()) -> Checkpoint:
    """The checkpoint of a folder, a GGUF file, "nano", or a Hub repo, which is downloaded. Raises Glm4liteError."""
    return open_source(resolve(source, progress, hub))


def prepare(
    checkpoint: Checkpoint,
    quant: str | Quant | None,
    cls: type[Model],
    config_for: Callable[[Checkpoint, bool], Glm4Config] | None = None,
    ignore_mismatched_sizes: bool = False,
    loras: Loras = Loras(),
    keep_codes: bool = True,
    progress: ProgressCallback | None = None,
    hub: HubOptions = HubOptions(),
) -> Prepared[Model]:
    """Everything about a load that can be said from the headers.

    Args:
        quant: as `glm4lite.load` takes it, or "auto".
        config_for: the config for a checkpoint, and whether it is quantized; None: config.json's.
        loras: adapters, merged into what is not quantized yet. keep_codes: whether other weights keep theirs, with the
            adapters beside them, or are quantized again with the adapters in them.

    Raises:
        CheckpointError: tensors are missing, not expected, or of the wrong shape or type.
        ConfigError: config.json cannot be used, or the checkpoint is quantized otherwise than asked.
    """
    quant = chosen(checkpoint, quant)
    stored, wanted = stored_quant(checkpoint, quant), parse_quant(quant)
    quantized = stored is not None
    if isinstance(stored, BnbConfig | Imported):
        checkpoint, stored, wanted = format_of(stored).adapt(checkpoint, stored, wanted, quant is not None)
    elif stored is None:
        checkpoint = joined(checkpoint)
    config = read_config(checkpoint) if config_for is None else config_for(checkpoint, quantized)
    wanted = None if stored else wanted
    model = skeleton(config, cls)
    if not loras:
        plan = make_load_plan(model, checkpoint, wanted, ignore_mismatched_sizes)
        return Prepared(checkpoint, config, model, plan, stored, wanted)
    always, choices = loras.opened(progress, hub)
    adapted = AdaptedCheckpoint(checkpoint, model, always, choices, keep_codes)
    anew = wanted
    if adapted.saves and isinstance(stored, QuantConfig):  # what an adapter brings is quantized as the rest is
        anew = replace(stored, method=SEARCH)
    plan = make_load_plan(model, adapted, anew, ignore_mismatched_sizes)
    return Prepared(adapted, config, model, plan, stored, wanted, adapted.beside(plan), adapted.choices)


def model_class(checkpoint: Checkpoint) -> type[nn.Module]:
    """The class that config.json's `architectures` names, a causal language model if it does not."""
    named = str(checkpoint.config.get("architectures"))
    if "ForSequenceClassification" in named:
        return SequenceClassifier
    return TokenClassifier if "ForTokenClassification" in named else CausalLM
