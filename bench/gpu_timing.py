"""How the GPU benchmarks time: events on the device, CUDA graphs, weights that no cache holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

ROUNDS = 9


def milliseconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median time of one call on the device, after three that do not count."""
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def captured(work: Callable[[], object]) -> Callable[[], object]:
    """`work` as one CUDA graph, so that launches cost what they cost in a decode step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and fills the allocators
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def copies(n: int, k: int, device: torch.device) -> int:
    """So many int4 weights that the caches hold a small part of them; at most 64."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    return max(2, min(64, int(8 * cache / (n * k * 0.5625)) + 1))


class guarded:
    """Prints why a row is left out (no memory, an engine that fails) and goes on; a wrong product still stops all."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        text = str(error).splitlines()
        print(f"{self.what} left out: {type(error).__name__}: {text[0] if text else ''}", flush=True)
        torch.cuda.empty_cache()
        return True
