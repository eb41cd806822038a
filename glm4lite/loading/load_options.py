"""LoadOptions: all that can be asked of a load, checked before a model is looked for or downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from glm4lite.base.errors import ConfigError
from glm4lite.base.files import CONFIG
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.codec_choice import Aim
from glm4lite.checkpoint.formats.format import Quant
from glm4lite.checkpoint.lora.folder import Loras
from glm4lite.checkpoint.quant_choice import AUTO, parse_quant
from glm4lite.checkpoint.streaming import ProgressCallback
from glm4lite.hub.options import HubOptions
from glm4lite.memory.budget import Budget
from glm4lite.model.config import Glm4Config
from glm4lite.runtime.cuda_graph import eager_by_choice
from glm4lite_quant import BnbConfig, bnb
from glm4lite_quant.kernels.picking import check_environment

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}


@dataclass(frozen=True)
class LoadOptions:
    """The arguments of `glm4lite.load`, and what only `from_pretrained` takes.

    aim: bits a weight or memory to fit, for which each weight's codec is chosen, instead of quant.
    config: instead of the checkpoint's config.json. overrides: keys of config.json with other values.
    ignore_mismatched_sizes: a tensor whose shape is not config's starts from initial values instead of being an error.

    Raises:
        ConfigError: naming the argument.
        QuantError: a GLM4LITE_ variable asks for what this machine has not, or bitsandbytes is needed.
    """

    quant: str | Quant | None = None
    device: str | torch.device = "auto"
    dtype: str | torch.dtype = "auto"
    progress: ProgressCallback | None = None
    calibration: str | Path | None = None
    budget: Budget = field(default_factory=Budget)
    config: Glm4Config | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    ignore_mismatched_sizes: bool = False
    hub: HubOptions = field(default_factory=HubOptions)
    loras: Loras = field(default_factory=Loras)
    aim: Aim | None = None

    def __post_init__(self) -> None:
        check_environment()
        eager_by_choice()
        _ = self.target, self.activations
        if isinstance(self.wanted, BnbConfig):
            bnb.library()
        if self.aim is not None and self.quant not in (None, AUTO):
            raise ConfigError(f"quant and {self.aim.option} contradict each other; give one of them")
        if self.config is not None and self.overrides:
            name = next(iter(self.overrides))
            raise ConfigError(f"{name} is given beside config; set it on the config instead")

    @property
    def wanted(self) -> Quant | None:
        """What the weights are quantized to, unless they are stored quantized; None: nothing, or as they are stored."""
        return parse_quant("int4" if self.quant == AUTO or self.aim else self.quant)

    @property
    def limits(self) -> Budget:
        """The budget; memory to fit limits RAM, where nothing else does."""
        fits = self.aim is not None and self.aim.fit is not None and self.budget.ram is None
        return replace(self.budget, ram=self.aim.fit) if self.aim is not None and fits else self.budget

    @property
    def target(self) -> torch.device | None:
        """The one device to load to; None: as the machine's memory suggests."""
        return _device(self.device)

    @property
    def activations(self) -> torch.dtype | None:
        """None: as suits the weights and the device."""
        return _dtype(self.dtype)

    def config_for(self, checkpoint: Checkpoint, quantized: bool) -> Glm4Config:
        """The model's config: a copy of the one given, or the checkpoint's with the overrides.

        quantized: whether the checkpoint is. Raises ConfigError.
        """
        if self.config is None:
            return Glm4Config.from_dict(checkpoint.config, checkpoint.folder / CONFIG, **self.overrides)
        config: Any = self.config.model_copy(deep=True)
        if getattr(config, "quantization_config", None) is not None:
            if not quantized:
                raise ConfigError(
                    f"config has a quantization_config, but {checkpoint.folder} is not quantized; "
                    "take it out of the config, and give quantization_config or quant"
                )
            del config.quantization_config
            if "quantization_config" in checkpoint.config:
                config.quantization_config = checkpoint.config["quantization_config"]
        return cast(Glm4Config, config)


def _device(device: str | torch.device) -> torch.device | None:
    """None means "auto"."""
    if device == "auto":
        return None
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
