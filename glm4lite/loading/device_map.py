"""Where a load puts each weight: one device, or what `placement` says for the budgets and this machine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch

from glm4lite.base.errors import CheckpointError, ConfigError
from glm4lite.base.sizes import readable
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.load_plan import LoadPlan, automatic_dtype
from glm4lite.memory import speed, system
from glm4lite.memory.budget import Budget, place_within
from glm4lite.memory.machine import free_gpus, free_ram, prefetch_speeds
from glm4lite.memory.resources import Machine, Placement, Requirements
from glm4lite.model.layers import layer_of
from glm4lite.model.packed_cache import KVType
from glm4lite.model.trunk import CPU_CHUNK, GPU_CHUNK

logger = logging.getLogger("glm4lite")


@dataclass(frozen=True)
class PrefetchRoute:
    """The layers that prompts of at least `threshold` tokens find on a GPU, and how they compute there."""

    layers: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    threshold: float


@dataclass(frozen=True)
class DeviceMap:
    """The device of each module and the type of its activations, by kind of device.

    Without a placement the device is `home`, and stored weights stay in the file's pages.
    """

    home: torch.device
    types: Mapping[str, torch.dtype]
    placement: Placement | None = None
    bus: PrefetchRoute | None = None

    def device(self, module: str) -> torch.device:
        """Where a module's tensors lie; those of layers on disk are computed on the CPU."""
        layer, leaf = layer_of(module), module.rpartition(".")[2]
        if self.placement is None:
            return torch.device("cpu") if leaf == "embed_tokens" else self.home  # a token reads one row of it
        if layer is not None:
            name = self.placement.device_of(layer[0])
        else:
            name = self.placement.embedding if leaf == "embed_tokens" else self.placement.head
        return torch.device("cpu" if name == "disk" else name)

    def dtype(self, module: str) -> torch.dtype:
        """Of the module's activations, and of its weights where they are not quantized."""
        return self.types[self.device(module).type]

    def on_disk(self, module: str) -> bool:
        layer = layer_of(module)
        return self.placement is not None and layer is not None and self.placement.device_of(layer[0]) == "disk"

    def cache(self, needs: Requirements, budget: Budget) -> tuple[KVType, int]:
        """The cache's type, and the tokens it has room for: the model's whole context without a placement."""
        if self.placement is not None:
            return self.placement.kv, self.placement.context
        context = needs.config.context_length
        if budget.kv != "auto":
            return cast(KVType, budget.kv), context
        return _cache_type(needs, context) if self.home.type == "cpu" else "float", context

    def mapped(self, module: str) -> bool:
        """Whether a stored weight stays in the file's pages. An embedding of which a token reads one row does."""
        return self.placement is None or (module.endswith("embed_tokens") and self.placement.share("cpu").mapped > 0)


def choose(
    checkpoint: Checkpoint,
    plan: LoadPlan,
    needs: Requirements,
    device: torch.device | None,
    dtype: torch.dtype | None,
    budget: Budget,
) -> DeviceMap:
    """The destinations on `device` (None: what this machine has) for activations of `dtype` (None: as suits them).

    Raises:
        CheckpointError: it does not fit, with what to change.
    """
    home = torch.device("cpu") if device is None else device
    types = {kind: dtype or automatic_dtype(checkpoint, plan, torch.device(kind)) for kind in ("cpu", "cuda")}
    if home.type == "cuda" and not budget.limits:
        return DeviceMap(home, types)
    gpus = _free_gpus(device, needs.coded)
    needs = replace(needs, stored=needs.stored and plan.quantized and not plan.foreign)
    if not gpus and not budget.limits and not needs.stored:
        return DeviceMap(home, types)  # the loader itself sees whether what it makes fits
    if budget.gpu_memory and not gpus:
        logger.warning("gpu_memory is of no use: there is no GPU that may be used")
    placement = place_within(needs, Machine(free_ram(), gpus), budget)
    if not gpus and not budget.limits and not (placement.fits and placement.share("disk").layers):
        return DeviceMap(home, types)  # mapped: takes no memory that others could not have back
    if not placement.fits:
        raise CheckpointError("{model} does not fit: {advice}", model=checkpoint.origin, advice=placement.advice)
    if budget.kv == "auto" and placement.kv == "int8":
        logger.warning("the cache is int8, to leave memory for weights (--kv float: as it is)")
    return DeviceMap(home, types, placement, _bus(needs, placement, types["cuda"]))


def _bus(needs: Requirements, placement: Placement, dtype: torch.dtype) -> PrefetchRoute | None:
    """The way of the CPU's layers to the first GPU; None where there is neither, or the CPU is as fast (measured)."""
    if not placement.gpus or not placement.on_cpu:
        return None
    largest = max(needs.layers[layer] for layer in placement.on_cpu)
    tokens = speed.prefetch_tokens(largest, needs, prefetch_speeds(needs.coded))
    if tokens > GPU_CHUNK:
        return None
    device = torch.device(placement.gpus[0].device)
    return PrefetchRoute(placement.on_cpu, device, dtype, min(tokens, CPU_CHUNK))


def _cache_type(needs: Requirements, context: int) -> KVType:
    """float, unless a cache of the model's whole context is more than the memory that is free."""
    size, free = context * len(needs.layers) * needs.kv_per_token("float", gpu=False), system.available()
    if size <= free:
        return "float"
    logger.warning(
        "the cache is int8: a whole context of %d tokens takes %s, %s are free (--kv float: as it is)",
        context,
        readable(size),
        readable(free),
    )
    return "int8"


def _free_gpus(device: torch.device | None, quantized: bool) -> tuple[int, ...]:
    """Free bytes of the GPUs that may be used, by index. One that was asked for is used, however slow."""
    if (device is not None and device.type == "cpu") or not torch.cuda.is_available():
        return ()
    if device is not None and device.index:
        raise ConfigError(f"a budget places layers on the first GPU on; use device='auto' instead of {device}")
    return free_gpus(quantized, logger.warning) if device is None else (torch.cuda.mem_get_info(0)[0],)
