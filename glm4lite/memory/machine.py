"""What this machine gives: free memory, and how fast memory, processor, GPUs and disk are, measured in 1 to 2 s."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from glm4lite.base.direct_io import ALIGNMENT, DirectFile, Extent
from glm4lite.base.errors import CheckpointError
from glm4lite.base.sentences import Sentence
from glm4lite.base.sizes import readable
from glm4lite.memory import system
from glm4lite.memory.resources import Machine
from glm4lite_quant import QuantConfig, QuantLinear, QuantTensor, host, pages
from glm4lite_quant.kernels import gpu, native

MARGIN = 0.95  # of the RAM that is free: what is left for the rest of the machine

PROBE_BYTES = 256 << 20
PROBE_SIDE, PROBE_TOKENS = 4096, 128  # one q_proj of the 9B, a short prompt
PROBE_ROWS = 27392  # and its gate_up_proj
PROBE_SECONDS, LEAST_CALLS = 0.5, 3
GPU_CALLS = 16

DISK_BLOCK = 8 << 20
DISK_READERS = 2
DISK_BUFFER = 64 << 20  # of each reader; what stays in a cache is read faster into, and weights do not
DISK_PIECES = 8
DISK_PROBE_BYTES = 1 << 30


def this_machine(quantized: bool = True) -> Machine:
    """Free memory and measured speeds, all but the disk's (see `disk_bandwidth`).

    quantized: the CPU's speeds are those of int4 layers, else of bfloat16.
    """
    free, bandwidth, rate = free_ram(), ram_bandwidth(quantized), cpu_rate(quantized)
    speeds = (
        Sentence("int4 layers {speed} GB/s" if quantized else "memory {speed} GB/s", speed=f"{bandwidth / 1e9:.1f}"),
        Sentence("prompts on the CPU {speed} TOP/s", speed=f"{rate / 1e12:.2f}"),
    )
    machine = Machine(free, ram_bandwidth=bandwidth, cpu_rate=rate, measured=speeds)
    return _with_gpus(machine, quantized) if torch.cuda.is_available() else machine


def free_gpus(quantized: bool, say: Callable[[Sentence], object]) -> tuple[int, ...]:
    """Free bytes of torch's GPUs, by index; none of one that the CPU is faster than, and `say` is told why.

    () where no GPU is of use.
    """
    free = list[int]()
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        why = gpu.slower_than_cpu(device, quantized)
        if why:
            name = torch.cuda.get_device_name(device)
            say(Sentence("{name} is left out, the CPU is faster: {why}", name=name, why=why))
        free.append(0 if why else torch.cuda.mem_get_info(index)[0])
    return tuple(free) if any(free) else ()


def free_ram() -> int:
    """Bytes of RAM that a model may take where no budget says so."""
    return int(system.available(swap=False) * MARGIN)


def prefetch_speeds(quantized: bool) -> Machine:
    """The measured speeds that decide which prompts cross the bus to a GPU; assumed where that fails."""
    first = torch.device("cuda", 0)
    try:
        speeds = Machine(0, bus_bandwidth=bus_bandwidth(first), gpu_rate=gpu_rate(first))
    except RuntimeError:  # out of memory, no pinned memory
        speeds = Machine(0)
    return replace(speeds, cpu_rate=cpu_rate(quantized))


def with_assumed_gpu(machine: Machine, size: int) -> Machine:
    """The machine with one GPU more than it has: an RTX 4060's speeds, `size` bytes free."""
    assumed = Machine(0)
    note = Sentence(
        "a GPU of {size}, {speed} GB/s, {rate} TFLOP/s, as an RTX 4060; its bus {bus} GB/s",
        size=readable(size),
        speed=f"{assumed.gpu_bandwidth / 1e9:.0f}",
        rate=f"{assumed.gpu_rate / 1e12:.0f}",
        bus=f"{assumed.bus_bandwidth / 1e9:.0f}",
    )
    return replace(machine, gpus=(size,), assumed=(*machine.assumed, note))


def ram_bandwidth(quantized: bool) -> float:
    """Bytes of weights per second that one token is multiplied with, over more of them than any cache holds.

    int4 as the kernels read them, which on some processors is less than memory gives; else all that memory gives.
    """
    size = beyond_caches()
    if not quantized:
        buffer = torch.ones(size // 8, dtype=torch.int64)
        return buffer.nbytes / _mean_seconds(lambda: native.read_all(buffer))
    first = _int4_layer(PROBE_ROWS)
    layers = [first, *(_int4_layer(PROBE_ROWS) for _ in range(size // first.weight_tensor.nbytes))]
    x = torch.ones(1, PROBE_SIDE)

    def one_token() -> None:
        for layer in layers:
            layer(x)

    with torch.inference_mode():
        return sum(layer.weight_tensor.nbytes for layer in layers) / _mean_seconds(one_token)


def beyond_caches() -> int:
    """Bytes that no cache of the processor holds: twice the largest one, if the system tells; 256 MiB to 1 GiB."""
    return min(max(PROBE_BYTES, 2 * host.largest_cache()), 1 << 30)


def _int4_layer(rows: int) -> QuantLinear:
    """[rows, PROBE_SIDE] of codes that are written, for memory that is only promised is not read."""
    weight = QuantTensor.empty(rows, PROBE_SIDE, QuantConfig())
    for tensor in weight.tensors().values():
        tensor.fill_(1)
    layer = QuantLinear(PROBE_SIDE, rows, QuantConfig(), bias=False, device="meta")
    layer.load(weight)
    return layer


def cpu_rate(quantized: bool) -> float:
    """Operations per second of a linear layer in a short prompt, int4 or bfloat16."""
    if quantized:
        layer: torch.nn.Module = _int4_layer(PROBE_SIDE)
    else:
        layer = torch.nn.Linear(PROBE_SIDE, PROBE_SIDE, bias=False, dtype=torch.bfloat16)
    x = torch.ones(PROBE_TOKENS, PROBE_SIDE, dtype=torch.float32 if quantized else torch.bfloat16)
    with torch.inference_mode():
        return 2 * PROBE_TOKENS * PROBE_SIDE**2 / _mean_seconds(lambda: layer(x))


def _mean_seconds(work: Callable[[], object]) -> float:
    """Of one call among as many as take PROBE_SECONDS: the mean, for what others do meanwhile slows tokens too."""
    work()
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < PROBE_SECONDS or count < LEAST_CALLS:
        work()
        count += 1
    return passed / count


def _with_gpus(machine: Machine, quantized: bool) -> Machine:
    """Free memory of every GPU; speeds of the first in use: a copy on it, one to it from pinned memory, a product."""
    left_out = list[Sentence]()
    free = free_gpus(quantized, left_out.append)
    machine = replace(machine, assumed=(*machine.assumed, *left_out))
    if not free:
        return machine
    first = torch.device("cuda", next(index for index, size in enumerate(free) if size))
    try:
        copied, crossed, rate = gpu_bandwidth(first), bus_bandwidth(first), gpu_rate(first)
    except RuntimeError:  # out of memory, no pinned memory: the free bytes are known all the same
        note = Sentence("speeds of an RTX 4060 (this GPU could not be measured)")
        return replace(machine, gpus=free, assumed=(*machine.assumed, note))
    found = (
        Sentence("GPU {speed} GB/s", speed=f"{copied / 1e9:.0f}"),
        Sentence("{rate} TFLOP/s", rate=f"{rate / 1e12:.0f}"),
        Sentence("its bus {speed} GB/s", speed=f"{crossed / 1e9:.1f}"),
    )
    measured = (*machine.measured, *found)
    return replace(machine, gpus=free, gpu_bandwidth=copied, bus_bandwidth=crossed, gpu_rate=rate, measured=measured)


def gpu_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy on a GPU, what is read and what is written."""
    both = torch.empty(2, PROBE_BYTES // 2, dtype=torch.uint8, device=device)
    return PROBE_BYTES / _gpu_seconds(device, lambda: both[0].copy_(both[1]))


def bus_bandwidth(device: torch.device) -> float:
    """Bytes per second from pinned memory to a GPU."""
    pinned = torch.empty(PROBE_BYTES // 2, dtype=torch.uint8, pin_memory=True)
    on_gpu = torch.empty_like(pinned, device=device)
    return pinned.nbytes / _gpu_seconds(device, lambda: on_gpu.copy_(pinned, non_blocking=True))


def gpu_rate(device: torch.device) -> float:
    """Operations per second of a bfloat16 product."""
    square = torch.ones(PROBE_SIDE, PROBE_SIDE, dtype=torch.bfloat16, device=device)
    return 2 * PROBE_SIDE**3 / _gpu_seconds(device, lambda: square @ square)


def _gpu_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Of one call among several, so that launching and waiting do not count."""

    def waited() -> None:
        for _ in range(GPU_CALLS):
            work()
        torch.cuda.synchronize(device)

    return _mean_seconds(waited) / GPU_CALLS


def disk_bandwidth(file: Path, most: int = DISK_PROBE_BYTES) -> float | None:
    """Bytes per second read from a file past the page cache; None where it is too short to tell, or cannot be read.

    In pieces all over the file: of a file just written or read in part, some of it is quicker than the rest. They are
    read twice and the second time counts: every token reads the same bytes again, which a virtual disk's host may keep.
    """
    try:
        opened = DirectFile(file)
    except CheckpointError:
        return None
    step = opened.size // DISK_PIECES // ALIGNMENT * ALIGNMENT
    size = min(step, most // DISK_PIECES) // DISK_BLOCK * DISK_BLOCK
    if size == 0:
        return None
    pieces = [Extent(opened, piece * step, size, 0) for piece in range(DISK_PIECES)]
    read_rate(pieces)
    return read_rate(pieces)


def read_rate(extents: Sequence[Extent]) -> float | None:
    """Bytes per second of parts of files, read one after the other by two threads; None where that fails.

    They go into more memory than a processor's cache holds, as a model's weights do.
    """
    blocks = [
        (extent.file, at, min(DISK_BLOCK, extent.offset + extent.nbytes - at))
        for extent in extents
        for at in range(extent.offset, extent.offset + extent.nbytes, DISK_BLOCK)
    ]
    memory = memoryview(cast(Any, pages.zeros(DISK_BUFFER).fill_(0).numpy()))

    def read(number: int) -> None:
        (file, offset, nbytes), at = blocks[number], number * DISK_BLOCK % DISK_BUFFER
        file.read_into(memory[at : at + nbytes], offset)

    started = time.perf_counter()
    try:
        with ThreadPoolExecutor(DISK_READERS) as readers:
            list(readers.map(read, range(len(blocks))))
    except CheckpointError:
        return None
    return sum(nbytes for _, _, nbytes in blocks) / (time.perf_counter() - started)
