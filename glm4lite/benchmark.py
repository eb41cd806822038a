"""How fast a model runs here: prefill, decode, load, memory, and how near decoding comes to what memory allows.

Decoding one token reads every weight once, so memory bandwidth bounds it. The bound is measured in the same minutes,
between the repetitions, with the kernels' own threads: a machine shared with others changes from minute to minute.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from glm4lite import __version__
from glm4lite.budget import Budget
from glm4lite.checkpoint import Checkpoint
from glm4lite.errors import BenchmarkError, ContextLengthError
from glm4lite.events import Progress
from glm4lite.generate import Generation
from glm4lite.hub import resolve
from glm4lite.inventory import devices, kernel_names, read_bytes, rings
from glm4lite.loader import check_arguments, load
from glm4lite.machine import read_rate
from glm4lite.model import Glm4ForCausalLM
from glm4lite.sampling import SamplingParams
from glm4lite.weights.memory import readable
from glm4lite.weights.plan import read_config
from glm4lite_quant.kernels import native

REPETITIONS = 5
BUFFER_BYTES = 512 << 20  # read to measure the bandwidth: far more than any cache holds
STATUS = Path("/proc/self/status")
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

    `devices` says what lies where; `disk_bytes_per_token` streams from disk for each token, and `disk` is how fast it
    can be read past the page cache, measured between the repetitions.

    `read_bytes_per_token` counts the weights of every linear layer, the head included, the embedding not, and the
    keys and values of the middle of the decoded part. `memory_gb_per_s` is the fastest of the interleaved readings.
    """

    model: str
    prompt_tokens: int
    new_tokens: int
    threads: int
    kernels: dict[str, int]
    load_s: float
    prefill: Spread
    decode: Spread
    read_bytes_per_token: int
    memory: Spread
    devices: dict[str, dict[str, Any]]
    disk_bytes_per_token: int
    disk: Spread | None
    peak_rss_bytes: int | None
    peak_anon_bytes: int | None
    anon_before_load_bytes: int | None

    @property
    def read_gb_per_s(self) -> float:
        return self.decode.median * self.read_bytes_per_token / 1e9

    @property
    def bound_fraction(self) -> float:
        """Achieved over possible bytes per second in decoding."""
        return self.read_gb_per_s / self.memory.max

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
        del values["memory"], values["disk"]
        values |= {"memory_gb_per_s": self.memory.max, "memory_gb_per_s_median": self.memory.median}
        values |= {"read_gb_per_s": self.read_gb_per_s, "bound_fraction": self.bound_fraction}
        if self.disk is not None:
            values |= {"disk_gb_per_s": self.disk.median, "disk_read_gb_per_s": self.disk_read_gb_per_s}
            values |= {"disk_bound_fraction": self.disk_bound_fraction}
        return values | {"versions": versions()}

    def lines(self) -> Iterator[tuple[str, str]]:
        """The same for people."""
        yield "model", self.model
        yield "kernels", ", ".join(f"{count} x {name}" for name, count in self.kernels.items())
        yield "threads", f"{self.threads} of {os.cpu_count()} cores"
        yield "load", f"{self.load_s:.2f} s"
        yield f"prefill, {self.prompt_tokens} tokens", _rate(self.prefill)
        yield f"decode, {self.new_tokens} tokens", _rate(self.decode)
        per_token = readable(self.read_bytes_per_token)
        yield "decode reads", f"{self.read_gb_per_s:.1f} GB/s ({per_token} for each token)"
        yield "memory gives", f"{self.memory.max:.1f} GB/s (median {self.memory.median:.1f}, min {self.memory.min:.1f})"
        yield "of the bound", f"{self.bound_fraction:.0%}"
        for name, held in self.devices.items():
            yield f"on {name}", f"{held['layers']} layers, {readable(held['weights'])} of weights"
        if self.disk is not None:
            spread = f"median {self.disk.median:.2f}, {self.disk.min:.2f} to {self.disk.max:.2f}"
            yield (
                "disk reads",
                f"{self.disk_read_gb_per_s:.2f} GB/s ({readable(self.disk_bytes_per_token)} for each token)",
            )
            yield "disk gives", f"{spread} GB/s: {self.disk_bound_fraction or 0:.0%} of it is used"
        yield "peak memory", _size(self.peak_rss_bytes)
        before = _size(self.anon_before_load_bytes)
        yield "of it not files", f"{_size(self.peak_anon_bytes)} ({before} before loading)"


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
) -> Benchmark:
    """Load a model and time it with random token ids: one warm-up, then the repetitions.

    `quant` None is int4, or as the checkpoint is stored; `budget` None is whatever there is and a float cache. Its
    context is that of the trial. No tokenizer is needed.

    Raises:
        Glm4liteError: what `load` raises; BenchmarkError for counts that cannot be measured, ContextLengthError where
            prompt and new tokens do not fit the model's context (before the weights are read).
    """
    check_arguments(quant, device, "auto")
    budget = budget or Budget(kv="float")
    if prompt_tokens < 1 or new_tokens < 2:
        raise BenchmarkError(
            f"prompt tokens are {prompt_tokens} and new tokens {new_tokens}; at least 1 and 2 are needed to time them"
        )
    checkpoint = Checkpoint.open(resolve(source, progress))
    context = read_config(checkpoint).max_position_embeddings
    if prompt_tokens + new_tokens > context:
        raise ContextLengthError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit the model's context of {context}"
        )
    if quant is None and checkpoint.config.get("quantization_config") is None:
        quant = "int4"
    before = memory_now("RssAnon")
    peak = _Peak()
    with peak.watched():
        started = time.perf_counter()
        limits = {"gpu_memory": budget.gpu_memory, "ram": budget.ram, "kv": budget.kv}
        room = prompt_tokens + new_tokens if budget.limits else None
        model = load(checkpoint.folder, quant, device, progress=progress, context=room, **limits)  # type: ignore[arg-type]
        load_s = time.perf_counter() - started
        trial = _Trial(model, prompt_tokens, new_tokens)
        trial.run()
    prefill, decode, memory, disk = _repeat(trial, peak, repetitions, progress)
    return Benchmark(
        str(source),
        prompt_tokens,
        new_tokens,
        native.thread_count(),
        kernel_names(model),
        load_s,
        prefill,
        decode,
        read_bytes(model, prompt_tokens + new_tokens // 2),
        memory,
        devices(model),
        sum(ring.layers_bytes for ring in rings(model)),
        disk,
        peak.seen["VmRSS"],
        peak.seen["RssAnon"],
        before,
    )


class _Trial:
    """One prompt of random ids and the greedy tokens after it; nothing stops them early."""

    def __init__(self, model: Glm4ForCausalLM, prompt_tokens: int, new_tokens: int) -> None:
        self.model = model
        seeded = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(0, model.config.vocab_size, (prompt_tokens,), generator=seeded).tolist()
        self.params = SamplingParams(temperature=0, max_new_tokens=new_tokens)

    def run(self) -> tuple[float, float]:
        """(prompt tokens per second, new tokens per second); the first new token belongs to the prompt's pass."""
        generation = Generation(self.model, self.prompt, self.params)
        started = time.perf_counter()
        for _ in generation.prefill():
            pass
        prefill = len(self.prompt) / (time.perf_counter() - started)
        for _ in generation:
            pass
        return prefill, (generation.new_tokens - 1) / generation.seconds


def _repeat(
    trial: _Trial, peak: _Peak, repetitions: int, progress: Callable[[Progress], None] | None
) -> tuple[Spread, Spread, Spread, Spread | None]:
    """Prefill, decode, memory bandwidth, and the disk's where layers stream from it; interleaved."""
    prefill, decode, memory, disk = [], [], [], []
    streamed = [extent for ring in rings(trial.model) for extent in ring.extents]
    for index in range(repetitions):
        with peak.watched():
            rates = trial.run()
        prefill.append(rates[0])
        decode.append(rates[1])
        memory += _read_rates(3)
        found = read_rate(streamed) if streamed else None
        disk += [] if found is None else [found / 1e9]
        if progress is not None:
            progress(Progress("bench", index + 1, repetitions, "repetitions"))
    return Spread.of(prefill), Spread.of(decode), Spread.of(memory), Spread.of(disk) if disk else None


def _read_rates(count: int) -> list[float]:
    """Gigabytes per second of passes over a buffer, which is no memory of the model's and is let go."""
    buffer = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64)
    native.read_all(buffer)
    rates = []
    for _ in range(count):
        started = time.perf_counter()
        native.read_all(buffer)
        rates.append(buffer.nbytes / (time.perf_counter() - started) / 1e9)
    return rates


def memory_now(field: str) -> int | None:
    """Bytes of VmRSS (all resident memory) or RssAnon (without mapped files) of this process; None beside Linux."""
    try:
        lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else None


class _Peak:
    """Largest VmRSS and RssAnon seen while it watched, every few milliseconds; None where the system does not tell."""

    def __init__(self) -> None:
        self.seen: dict[str, int | None] = {field: memory_now(field) for field in ("VmRSS", "RssAnon")}

    @contextmanager
    def watched(self) -> Iterator[None]:
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(SAMPLE_SECONDS):
                for field, known in self.seen.items():
                    if known is not None:
                        self.seen[field] = max(known, memory_now(field) or 0)

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            yield
        finally:
            ended.set()
            sampler.join()


def _rate(spread: Spread) -> str:
    return f"{spread.median:.2f} tok/s ({spread.min:.2f} to {spread.max:.2f})"


def _size(count: int | None) -> str:
    return f"not available on {sys.platform}" if count is None else readable(count)
