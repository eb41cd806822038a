"""How fast a model runs here: prefill, decode, load, memory, and how near decoding comes to what memory allows.

Decoding one token reads every weight once, so memory bandwidth bounds it. The bound is measured in the same minutes,
between the repetitions, with the kernels' own threads: a machine shared with others changes from minute to minute.
"""

from __future__ import annotations

import platform
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from glm4lite import __version__
from glm4lite.base.errors import BenchmarkError, ContextLengthError
from glm4lite.base.events import Progress
from glm4lite.base.sizes import readable
from glm4lite.checkpoint.load_plan import read_config
from glm4lite.checkpoint.lora.folder import Loras
from glm4lite.checkpoint.prepare import opened
from glm4lite.checkpoint.quant_choice import AUTO
from glm4lite.engine.decoding import Generation
from glm4lite.engine.prefix_pool import PrefixPool
from glm4lite.engine.sampling import SamplingParams
from glm4lite.loading.load_options import LoadOptions
from glm4lite.loading.loader import load_checkpoint
from glm4lite.measure.inventory import devices, kernel_names, prefetcher_of, read_bytes, rings
from glm4lite.memory import system
from glm4lite.memory.budget import Budget
from glm4lite.memory.machine import beyond_caches, bus_bandwidth, gpu_bandwidth, read_rate
from glm4lite.model.layers import DecoderLayer
from glm4lite.pretrained.models import Glm4ForCausalLM
from glm4lite.runtime import cuda_graph
from glm4lite.runtime.runner import graphs_of
from glm4lite_quant.host import processors
from glm4lite_quant.kernels import native

REPETITIONS = 5
SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Benchmark:
    """What was measured. Rates in tokens and gigabytes (10**9 bytes) per second; memory None where it is not told.

    `devices` says what lies where, `decoding` how ("eager: why", or one graph) on each GPU.

    `reads` are the bytes that one token reads on each device: the weights of every linear layer, the head included, the
    embedding not, and the keys and values of the middle of the decoded part. `memory`, `gpu` (a copy on it), `bus`
    (from pinned memory to it) and `disk` (past the page cache) are what these give, measured between the repetitions;
    of memory and GPU the fastest counts. `disk_bytes_per_token` streams from disk for each token,
    `bus_bytes_per_prompt` crosses the bus for each prompt.
    """

    model: str
    prompt_tokens: int
    new_tokens: int
    threads: int
    kernels: dict[str, int]
    load_s: float
    prefill: Spread
    decode: Spread
    reads: dict[str, int]
    memory: Spread
    devices: dict[str, dict[str, Any]]
    peak_rss_bytes: int
    peak_anon_bytes: int
    anon_before_load_bytes: int
    disk_bytes_per_token: int = 0
    disk: Spread | None = None
    bus_bytes_per_prompt: int = 0
    bus: Spread | None = None
    gpu: Spread | None = None
    gpu_peak_bytes: dict[str, int] = field(default_factory=dict)
    decoding: dict[str, str] = field(default_factory=dict)

    @property
    def read_bytes_per_token(self) -> int:
        return sum(self.reads.values())

    @property
    def read_gb_per_s(self) -> float:
        return self.decode.median * self.read_bytes_per_token / 1e9

    @property
    def least_seconds(self) -> dict[str, float]:
        """Device -> the least time a token takes there: its bytes over what the device gives.

        Layers on disk are read while others are computed, so the CPU takes what the slower of the two takes.
        """
        found = {}
        for device, nbytes in self.reads.items():
            gives = self.memory if device == "cpu" or self.gpu is None else self.gpu
            found[device] = nbytes / gives.max / 1e9
        if self.disk is not None:
            found["cpu"] = max(found["cpu"], self.disk_bytes_per_token / self.disk.median / 1e9)
        return found

    @property
    def bound_fraction(self) -> float:
        """The least time of a token, one device after the other, over the time it took."""
        return sum(self.least_seconds.values()) * self.decode.median

    @property
    def bus_gb_per_s(self) -> float:
        """What crosses the bus for a prompt, over the time the prompt took."""
        return self.bus_bytes_per_prompt * self.prefill.median / self.prompt_tokens / 1e9

    @property
    def disk_read_gb_per_s(self) -> float:
        return self.decode.median * self.disk_bytes_per_token / 1e9

    @property
    def disk_bound_fraction(self) -> float | None:
        return None if self.disk is None else self.disk_read_gb_per_s / self.disk.median

    def to_json(self) -> dict[str, Any]:
        """One flat object, as `glm4lite bench --json` prints it."""
        values = asdict(self)
        for name, spread in (("prefill", self.prefill), ("decode", self.decode)):
            del values[name]
            values[f"{name}_tokens_per_s"] = spread.median
            values |= {f"{name}_tokens_per_s_min": spread.min, f"{name}_tokens_per_s_max": spread.max}
        for name in ("memory", "disk", "bus", "gpu"):
            del values[name]
        values |= {"memory_gb_per_s": self.memory.max, "memory_gb_per_s_median": self.memory.median}
        values |= {"read_bytes_per_token": self.read_bytes_per_token, "read_gb_per_s": self.read_gb_per_s}
        values |= {"bound_fraction": self.bound_fraction, "least_seconds": self.least_seconds}
        if self.gpu is not None:
            values |= {"gpu_gb_per_s": self.gpu.max}
        if self.bus is not None:
            values |= {"bus_gb_per_s": self.bus.median, "bus_used_gb_per_s": self.bus_gb_per_s}
        if self.disk is not None:
            values |= {"disk_gb_per_s": self.disk.median, "disk_read_gb_per_s": self.disk_read_gb_per_s}
            values |= {"disk_bound_fraction": self.disk_bound_fraction}
        return values | {"versions": versions()}

    def lines(self) -> Iterator[tuple[str, str]]:
        """The same for people."""
        yield "model", self.model
        yield "kernels", ", ".join(f"{count} x {name}" for name, count in self.kernels.items())
        yield "threads", f"{self.threads} of {len(processors())} processors"
        yield "load", f"{self.load_s:.2f} s"
        yield f"prefill, {self.prompt_tokens} tokens", _rate(self.prefill)
        yield f"decode, {self.new_tokens} tokens", _rate(self.decode)
        per_token = readable(self.read_bytes_per_token)
        yield "decode reads", f"{self.read_gb_per_s:.1f} GB/s ({per_token} for each token)"
        yield "memory gives", f"{self.memory.max:.1f} GB/s (median {self.memory.median:.1f}, min {self.memory.min:.1f})"
        if self.gpu is not None:
            yield "the GPU gives", f"{self.gpu.max:.0f} GB/s (a copy; median {self.gpu.median:.0f})"
        least = ", ".join(f"{device} {seconds * 1e3:.1f} ms" for device, seconds in self.least_seconds.items())
        yield "of the bound", f"{self.bound_fraction:.0%} (a token takes at least: {least})"
        for name, held in self.devices.items():
            yield f"on {name}", f"{held['layers']} layers, {readable(held['weights'])} of weights"
        for name, how in self.decoding.items():
            yield f"decoding on {name}", how
        if self.bus is not None:
            used, gives = self.bus_gb_per_s, self.bus.median
            carried = readable(self.bus_bytes_per_prompt)
            yield "bus carries", f"{used:.1f} GB/s in a prompt ({carried}), gives {gives:.1f} GB/s: {used / gives:.0%}"
        if self.disk is not None:
            spread = f"median {self.disk.median:.2f}, {self.disk.min:.2f} to {self.disk.max:.2f}"
            yield (
                "disk reads",
                f"{self.disk_read_gb_per_s:.2f} GB/s ({readable(self.disk_bytes_per_token)} for each token)",
            )
            yield "disk gives", f"{spread} GB/s: {self.disk_bound_fraction or 0:.0%} of it is used"
        yield "peak memory", readable(self.peak_rss_bytes)
        before = readable(self.anon_before_load_bytes)
        yield "of it not files", f"{readable(self.peak_anon_bytes)} ({before} before loading)"
        for name, size in self.gpu_peak_bytes.items():
            yield f"peak on {name}", readable(size)


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {
        "glm4lite": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def benchmark(
    source: str | Path,
    quant: str | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    progress: Callable[[Progress], None] | None = None,
    repetitions: int = REPETITIONS,
    budget: Budget | None = None,
    device: str = "cpu",
    loras: Loras = Loras(),
) -> Benchmark:
    """Load a model and time it with random token ids: one warm-up, then the repetitions.

    `quant` None is int4, or as the checkpoint is stored; `budget` None is whatever there is and a float cache. Its
    context is that of the trial. `loras`: adapters that are on. No tokenizer is needed.

    Raises:
        Glm4liteError: what `load` raises; BenchmarkError for counts that cannot be measured, ContextLengthError where
            prompt and new tokens do not fit the model's context (before the weights are read).
    """
    if prompt_tokens < 1 or new_tokens < 2:
        raise BenchmarkError(
            f"prompt tokens are {prompt_tokens} and new tokens {new_tokens}; at least 1 and 2 are needed to time them"
        )
    budget = budget or Budget(kv="float")
    room = prompt_tokens + new_tokens if budget.limits else None
    quant = AUTO if quant is None else quant
    options = LoadOptions(quant, device, progress=progress, budget=replace(budget, context=room), loras=loras)
    checkpoint = opened(source, progress)
    context = read_config(checkpoint).context_length
    if prompt_tokens + new_tokens > context:
        raise ContextLengthError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit the model's context of {context}"
        )
    before = system.private()
    peak = _Peak()
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)
    with peak.watched():
        started = time.perf_counter()
        model, _ = load_checkpoint(Glm4ForCausalLM, checkpoint, options, str(source))
        load_s = time.perf_counter() - started
        trial = _Trial(model, prompt_tokens, new_tokens)
        trial.run()
    reads = read_bytes(model, prompt_tokens + new_tokens // 2)
    gpus = [torch.device(name) for name in reads if name != "cpu"]
    spreads = _repeat(trial, _Probes(model, gpus), peak, repetitions, progress)
    return Benchmark(
        str(source),
        prompt_tokens,
        new_tokens,
        native.thread_count(),
        kernel_names(model),
        load_s,
        spreads["prefill"],
        spreads["decode"],
        reads,
        spreads["memory"],
        devices(model),
        peak.resident,
        peak.private,
        before,
        disk_bytes_per_token=sum(ring.layers_bytes for ring in rings(model)),
        bus_bytes_per_prompt=trial.bus_bytes,
        gpu_peak_bytes={str(gpu): torch.cuda.max_memory_reserved(gpu) for gpu in gpus},
        decoding={str(gpu): _decoding(model, gpu) for gpu in gpus},
        disk=spreads.get("disk"),
        bus=spreads.get("bus"),
        gpu=spreads.get("gpu"),
    )


class _Trial:
    """One prompt of random ids and the greedy tokens after it; nothing stops them early."""

    def __init__(self, model: Glm4ForCausalLM, prompt_tokens: int, new_tokens: int) -> None:
        self.model = model
        seeded = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(0, model.config.vocab_size, (prompt_tokens,), generator=seeded).tolist()
        self.params = SamplingParams(temperature=0, max_new_tokens=new_tokens)
        self._bus, self.bus_bytes = prefetcher_of(model), 0
        self._cache = PrefixPool(model).take(self.prompt)  # one for all runs: a GPU's recordings stay true

    def run(self) -> tuple[float, float]:
        """(prompt tokens per second, new tokens per second); the first new token belongs to the prompt's pass."""
        self._cache.keep_common_prefix([])
        generation = Generation(self.model, self.prompt, self.params, cache=self._cache)
        before = self._bus.bytes_sent if self._bus else 0
        started = time.perf_counter()
        for _ in generation.prefill():
            pass
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        prefill = len(self.prompt) / (time.perf_counter() - started)
        self.bus_bytes = self._bus.bytes_sent - before if self._bus else 0
        for _ in generation:
            pass
        return prefill, (generation.new_tokens - 1) / generation.seconds


class _Probes:
    """What the devices of a model give, in gigabytes per second."""

    def __init__(self, model: Glm4ForCausalLM, gpus: list[torch.device]) -> None:
        self._gpus, self._crossed = gpus, prefetcher_of(model) is not None
        self._streamed = [extent for ring in rings(model) for extent in ring.extents]

    def measure(self) -> dict[str, list[float]]:
        """Of everything that the model uses; what cannot be measured is left out."""
        found = {"memory": _read_rates(3)}
        disk = read_rate(self._streamed) if self._streamed else None
        if disk is not None:
            found["disk"] = [disk / 1e9]
        if self._gpus:
            found["gpu"] = [gpu_bandwidth(self._gpus[0]) / 1e9]
        if self._crossed and self._gpus:
            found["bus"] = [bus_bandwidth(self._gpus[0]) / 1e9]
        return found


def _repeat(
    trial: _Trial, probes: _Probes, peak: _Peak, repetitions: int, progress: Callable[[Progress], None] | None
) -> dict[str, Spread]:
    """prefill, decode, and what the devices give, interleaved."""
    samples: dict[str, list[float]] = defaultdict(list)
    for index in range(repetitions):
        with peak.watched():
            prefill, decode = trial.run()
        for name, values in ({"prefill": [prefill], "decode": [decode]} | probes.measure()).items():
            samples[name] += values
        if progress is not None:
            progress(Progress("bench", index + 1, repetitions, "repetitions"))
    return {name: Spread.of(values) for name, values in samples.items()}


def _decoding(model: Glm4ForCausalLM, gpu: torch.device) -> str:
    """How a GPU's layers decode a token."""
    first = next(layer for layer in model.model.layers if isinstance(layer, DecoderLayer) and layer.device == gpu)
    graphs = graphs_of(model.model)
    refused = "" if graphs is None else graphs.reason(first)
    return f"eager: {refused}" if refused else cuda_graph.status(gpu)


def _read_rates(count: int) -> list[float]:
    """Gigabytes per second of passes over a buffer, which is no memory of the model's and is let go."""
    buffer = torch.ones(beyond_caches() // 8, dtype=torch.int64)
    native.read_all(buffer)
    rates = []
    for _ in range(count):
        started = time.perf_counter()
        native.read_all(buffer)
        rates.append(buffer.nbytes / (time.perf_counter() - started) / 1e9)
    return rates


class _Peak:
    """The most memory, and the most without files, that was seen while it watched, every few milliseconds."""

    def __init__(self) -> None:
        self.resident, self.private = system.resident(), system.private()

    @contextmanager
    def watched(self) -> Iterator[None]:
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(SAMPLE_SECONDS):
                self.resident = max(self.resident, system.resident())
                self.private = max(self.private, system.private())

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            yield
        finally:
            ended.set()
            sampler.join()


def _rate(spread: Spread) -> str:
    return f"{spread.median:.2f} tok/s ({spread.min:.2f} to {spread.max:.2f})"
