"""Where a load puts each weight: one device, or what the planner says for the budgets and this machine."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import cast

import torch

from glm4lite.cache import KVType
from glm4lite.checkpoint import Checkpoint
from glm4lite.errors import CheckpointError, ConfigError
from glm4lite.placement import Machine, Needs, Placement, place
from glm4lite.weights import memory
from glm4lite.weights.needs import needs_of
from glm4lite_quant import QuantConfig

logger = logging.getLogger("glm4lite")

DEFAULT_CONTEXT = 8192
"""Tokens that a budget has room for where none are asked for."""

_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")


@dataclass(frozen=True)
class Budget:
    """What a load may use: bytes of each GPU and of RAM (None: what is free), tokens of context, the cache's type.

    Memory in RAM is what the process holds itself; pages of mapped files are not in it.
    """

    gpu_memory: int | None = None
    ram: int | None = None
    context: int | None = None
    kv: str = "auto"

    @classmethod
    def of(cls, gpu_memory: int | str | None, ram: int | str | None, context: int | None, kv: str) -> Budget:
        """Sizes as numbers of bytes or as text ("8GiB"); ConfigError for what is none."""
        if kv not in ("auto", "float", "int8"):
            raise ConfigError(f"kv is {kv!r}; use auto, float or int8")
        gpu, held = (memory.parse_size(size) if isinstance(size, str) else size for size in (gpu_memory, ram))
        return cls(gpu, held, context, kv)

    @property
    def limits(self) -> bool:
        """Whether anything was asked for."""
        return not (self.gpu_memory is None and self.ram is None and self.context is None)


@dataclass(frozen=True)
class Destinations:
    """The device of each module. Without a placement that is `home`, and stored weights stay in the file's pages."""

    home: torch.device
    placement: Placement | None = None

    def device(self, module: str) -> torch.device:
        """Where a module's tensors lie; those of layers on disk are computed on the CPU."""
        if self.placement is None:
            return self.home
        layer, leaf = _LAYER.match(module), module.rpartition(".")[2]
        if layer is not None:
            name = self.placement.device_of(int(layer[1]))
        else:
            name = self.placement.embedding if leaf == "embed_tokens" else self.placement.head
        return torch.device("cpu" if name == "disk" else name)

    def on_disk(self, module: str) -> bool:
        layer = _LAYER.match(module)
        return self.placement is not None and layer is not None and self.placement.device_of(int(layer[1])) == "disk"

    def mapped(self, module: str) -> bool:
        """Whether a stored weight stays in the file's pages. The embedding does: a token reads one row of it."""
        return self.placement is None or module.endswith("embed_tokens")


def choose(
    checkpoint: Checkpoint, quant: str | QuantConfig | None, device: torch.device | None, budget: Budget
) -> Destinations:
    """The destinations of a checkpoint loaded with `quant` on `device` (None: what this machine has).

    Raises:
        CheckpointError: it does not fit, with what to change.
    """
    if device is not None and device.type != "cpu" and not budget.limits:
        return Destinations(device)
    gpus = () if device is not None and device.type == "cpu" else _free_gpus(device)
    if not gpus and not budget.limits and not _stored(checkpoint):
        return Destinations(torch.device("cpu"))  # quantized into memory: the loader itself sees whether it fits
    needs, free = needs_of(checkpoint, quant), memory.available()
    machine = Machine(1 << 62 if free is None else free, gpus)
    placement = _place(needs, machine, budget)
    if not gpus and budget.ram is None and placement.fits and not placement.share("disk").layers:
        placement_needed = budget.context is not None
        return Destinations(torch.device("cpu"), placement if placement_needed and not needs.stored else None)
    if not placement.fits:
        raise CheckpointError(f"{checkpoint.folder} does not fit: {placement.advice}")
    return Destinations(torch.device(placement.head), placement)


def _place(needs: Needs, machine: Machine, budget: Budget) -> Placement:
    """With a float cache, or an int8 one where that alone keeps layers from the disk or makes them fit."""
    context = budget.context or min(DEFAULT_CONTEXT, needs.config.max_position_embeddings)

    def with_cache(kv: KVType) -> Placement:
        return place(needs, machine, context=context, kv=kv, gpu_memory=budget.gpu_memory, ram=budget.ram)

    placement = with_cache("float" if budget.kv == "auto" else cast(KVType, budget.kv))
    if budget.kv == "auto" and (not placement.fits or placement.share("disk").layers):
        logger.warning("the cache is int8, to leave memory for weights (--kv float: as it is)")
        return with_cache("int8")
    return placement


def _stored(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("quantization_config") is not None


def _free_gpus(device: torch.device | None) -> tuple[int, ...]:
    """Free bytes of the GPUs that may be used, by index."""
    if not torch.cuda.is_available():
        return ()
    if device is not None and device.index is not None and device.index > 0:
        raise ConfigError(f"a budget places layers on the first GPU on; use device='auto' instead of {device}")
    count = torch.cuda.device_count() if device is None else 1
    return tuple(torch.cuda.mem_get_info(index)[0] for index in range(count))
