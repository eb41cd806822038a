"""What the server did and holds, in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from glm4lite.engine.worker import EngineWorker
from glm4lite.measure.inventory import devices
from glm4lite.memory.system import resident

Samples = Mapping[tuple[tuple[str, str], ...], float]


class Metrics:
    """Counts requests; `text()` adds what the worker and the model say of themselves."""

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker
        self._requests: Counter[tuple[tuple[str, str], ...]] = Counter()

    def count(self, endpoint: str, status: int) -> None:
        """One request answered."""
        self._requests[(("endpoint", endpoint), ("status", str(status)))] += 1

    def text(self) -> str:
        """The page."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        state, engine = self._worker.state(), self._worker.engine
        speed = state.new_tokens / state.decode_s if state.decode_s else 0.0
        yield from _metric("requests_total", "counter", "HTTP requests answered.", dict(self._requests))
        yield from _metric("queue_waiting", "gauge", "Jobs that wait for the model.", state.waiting)
        yield from _metric("queue_limit", "gauge", "Jobs that may wait.", self._worker.queue_size)
        yield from _metric("running", "gauge", "Jobs that run.", state.running)
        ended: Samples = {
            (("result", name),): getattr(state, name) for name in ("finished", "cancelled", "failed", "refused")
        }
        yield from _metric("jobs_total", "counter", "Jobs by how they ended.", ended)
        yield from _metric("prompt_tokens_total", "counter", "Tokens of all prompts.", state.prompt_tokens)
        reused = max(0, state.prompt_tokens - state.prefilled_tokens)
        yield from _metric("prompt_tokens_reused_total", "counter", "Of those, found in a kept prefix.", reused)
        yield from _metric("new_tokens_total", "counter", "Tokens generated.", state.new_tokens)
        yield from _metric("drafted_tokens_total", "counter", "Tokens guessed and computed.", state.drafted_tokens)
        yield from _metric("accepted_tokens_total", "counter", "Of those, right ones.", state.accepted_tokens)
        yield from _metric("steps_total", "counter", "Passes through the model.", state.steps)
        yield from _metric("preempted_total", "counter", "Answers that gave their memory to others.", state.preempted)
        yield from _metric("busy_seconds_total", "counter", "Time the model worked.", round(state.busy_s, 3))
        yield from _metric("tokens_per_second", "gauge", "Mean speed of generation.", round(speed, 2))
        held = devices(engine.model) if engine.loaded else {}
        weights: Samples = {(("device", name),): one["weights"] for name, one in held.items()}
        yield from _metric("weight_bytes", "gauge", "Weights by where they lie.", weights)
        prefixes = engine.prefixes if engine.loaded else None
        yield from _metric(
            "kept_prefix_bytes", "gauge", "Kept keys and values.", prefixes.nbytes if prefixes is not None else 0
        )
        yield from _metric(
            "kept_prefixes", "gauge", "Conversations kept.", len(prefixes) if prefixes is not None else 0
        )
        blocks = prefixes.blocks if prefixes is not None else None
        if blocks is not None:
            yield from _metric("kv_blocks", "gauge", "Blocks of 64 tokens for keys and values.", blocks.blocks)
            yield from _metric("kv_blocks_free", "gauge", "Of those, in no conversation.", blocks.free)
        yield from _metric("resident_bytes", "gauge", "Memory of the process.", resident())


def _metric(name: str, kind: str, help_text: str, samples: Samples | float) -> Iterator[str]:
    yield f"# HELP glm4lite_{name} {help_text}"
    yield f"# TYPE glm4lite_{name} {kind}"
    if not isinstance(samples, Mapping):
        samples = {(): samples}
    for labels, value in samples.items():
        text = ",".join(f'{label}="{_escaped(word)}"' for label, word in labels)
        yield f"glm4lite_{name}{{{text}}} {value}" if text else f"glm4lite_{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
