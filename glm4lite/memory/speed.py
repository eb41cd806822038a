"""How fast a placement should be: bytes over bandwidths in decoding, the slowest of the ways in a prompt."""

from __future__ import annotations

import math

from glm4lite.memory.resources import Machine, Placement, Requirements

# The share of a device's bandwidth that decoding reaches: measured on a CPU (bench/RESULTS.md), a target elsewhere.
CPU_SHARE, GPU_SHARE, DISK_SHARE = 0.9, 0.7, 0.95


def decode(placement: Placement, needs: Requirements, machine: Machine) -> float:
    """Tokens per second with the cache half full: each device reads its weights and its cache.

    What lies on disk is read while the CPU computes the layers before; GPUs and CPU wait for each other.
    """
    gpu_read = sum(share.weights + share.kv / 2 for share in placement.gpus)
    own_head = 0 if placement.gpus else needs.head_read + needs.rest
    cpu_read = needs.bytes_of(placement.on_cpu) + own_head + placement.share("cpu").kv / 2
    on_cpu = max(cpu_read / (machine.ram_bandwidth * CPU_SHARE), _disk_seconds(placement, machine))
    return 1 / (gpu_read / (machine.gpu_bandwidth * GPU_SHARE) + on_cpu)


def prefill(placement: Placement, needs: Requirements, machine: Machine) -> float:
    """Tokens per second of a prompt's first chunk: operations over rates, while layers are read from disk.

    Layers off the GPU go to it over the bus for the chunk, or are computed where they are, whichever takes less time.
    """
    layer = 2 * placement.chunk * needs.layer_parameters
    gpu_layers, cpu_layers = sum(len(share.layers) for share in placement.gpus), len(placement.on_cpu)
    on_cpu = max(layer * cpu_layers / machine.cpu_rate, _disk_seconds(placement, machine))
    if not placement.gpus:
        return placement.chunk / on_cpu
    in_place = on_cpu + layer * gpu_layers / machine.gpu_rate
    crossing = needs.bytes_of(placement.on_cpu) / machine.bus_bandwidth
    computing = layer * (gpu_layers + cpu_layers) / machine.gpu_rate
    return placement.chunk / min(in_place, max(computing, crossing, _disk_seconds(placement, machine)))


def prefetch_tokens(layer_bytes: int, needs: Requirements, machine: Machine) -> float:
    """Tokens from which on a layer is sent to the GPU and computed there in less time than on the CPU."""
    saved = 2 * needs.layer_parameters * (1 / machine.cpu_rate - 1 / machine.gpu_rate)  # seconds for each token
    return layer_bytes / machine.bus_bandwidth / saved if saved > 0 else math.inf


def _disk_seconds(placement: Placement, machine: Machine) -> float:
    return placement.share("disk").weights / (machine.disk_bandwidth * DISK_SHARE)
