"""What is loaded, where it lies, which kernels compute it; and another model in its place, with its progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from glm4lite.base.errors import Glm4liteError, said_by
from glm4lite.base.events import Progress
from glm4lite.base.sentences import Sentence
from glm4lite.base.sizes import readable
from glm4lite.checkpoint.lora.folder import Loras
from glm4lite.hub.local import runnable_models
from glm4lite.hub.sources import NANO, locate
from glm4lite.loading.plan_report import plan
from glm4lite.measure.inventory import devices, kernel_names
from glm4lite.memory.budget import Budget
from glm4lite_ui.loading import Loading
from glm4lite_ui.runtime import BusyError, Runtime

QUANTS = ("auto", "int4", "int8", "nf4", "fp4", "none")
_DEVICES = {"cpu": "CPU", "disk": Sentence("the disk")}
Row = list[dict[str, Any]]  # two sentences as JSON
Tell = Callable[[dict[str, Any]], None]


class Models:
    """One load at a time, in a thread of its own; every window is told how far it is."""

    def __init__(self, runtime: Runtime, tell: Tell) -> None:
        self.runtime, self._tell = runtime, tell
        self._loading = Loading(runtime)
        self._lock, self._cancelled = threading.Lock(), threading.Event()
        self._progress: dict[str, Any] | None = None
        self._ended: Sentence | None = None
        self._loaded = [runtime.source]  # newest last; offered again

    def about(self) -> dict[str, Any]:
        """The model, the values it samples with, and how far a load is."""
        runtime = self.runtime
        loaded = runtime.engine.loaded
        return {
            "name": runtime.name,
            "source": runtime.source,
            "quant": runtime.quant,
            "lora": list(runtime.lora),
            "loaded": loaded,
            "facts": [[name.to_json(), value.to_json()] for name, value in self._facts()] if loaded else [],
            "own": asdict(runtime.engine.params()),
            "thinks": loaded and runtime.engine.chat_template().can_think,
            "quants": QUANTS,
            "known": list(dict.fromkeys([*self._loaded, NANO, *runnable_models()])),
            "loading": self._progress,
            "ended": self._said(),
        }

    def plan(self, source: str, quant: str, lora: tuple[str, ...] = ()) -> list[Row]:
        """What loading it would take and give, as `glm4lite plan` says it."""
        limits = self.runtime.load_options
        budget = Budget.of(limits.get("gpu_memory"), limits.get("ram"), limits.get("context"), limits.get("kv", "auto"))
        report = plan(_named(source), None if quant == "auto" else quant, budget, loras=Loras.of(lora))
        return [[name.to_json(), said.to_json()] for name, said in report.lines()]

    def load(self, source: str, quant: str, lora: tuple[str, ...] = ()) -> None:
        """Begins a load; raises what can be known at once."""
        locate(_named(source))
        Loras.of(lora)
        if not self._lock.acquire(blocking=False):
            raise BusyError("another window is loading a model")
        self._cancelled.clear()
        self._ended, self._progress = None, {"source": source}
        self._tell(self._state())
        threading.Thread(target=self._run, args=(source, quant, lora), name="model", daemon=True).start()

    def cancel(self) -> None:
        self._cancelled.set()

    def unload(self) -> None:
        """Gives the model's memory back; BusyError while it answers a chat, or another one is loaded."""
        if not self._lock.acquire(blocking=False):
            raise BusyError("another window is loading a model")
        try:
            self.runtime.unload()
            self._ended = None
        finally:
            self._lock.release()
            self._tell(self._state())

    def _run(self, source: str, quant: str, lora: tuple[str, ...]) -> None:
        began: tuple[str, float, int] | None = None
        try:
            for progress in self._loading.load(source, quant, lora):
                if self._cancelled.is_set():
                    if self.runtime.engine.loaded:
                        raise Glm4liteError("loading was stopped; the model from before is still there")
                    raise Glm4liteError("loading was stopped; none is loaded")
                if progress is not None:
                    if began is None or began[0] != progress.stage:
                        began = progress.stage, time.monotonic(), progress.done
                    self._progress = {"source": source, **_progress(progress, *began[1:])}
                    self._tell(self._state())
            self._ended = Sentence("{source} is loaded.", source=source)
            self._loaded.append(source)
        except Glm4liteError as error:
            said = said_by(error)
            self._ended = said if source in said else Sentence("{name}: {why}", name=source, why=said)
        finally:
            self._progress = None
            self._lock.release()
            self._tell(self._state())

    def _state(self) -> dict[str, Any]:
        name, loaded = self.runtime.name, self.runtime.engine.loaded
        return {"type": "model", "name": name, "loaded": loaded, "loading": self._progress, "ended": self._said()}

    def _said(self) -> dict[str, Any] | None:
        return self._ended.to_json() if self._ended else None

    def _facts(self) -> Iterator[tuple[Sentence, Sentence]]:
        runtime, model = self.runtime, self.runtime.engine.model
        config = model.config
        yield Sentence("Model"), Sentence("{name}", name=runtime.source)
        if runtime.lora:
            yield Sentence("Adapters"), Sentence("{list}", list=[Sentence("{name}", name=one) for one in runtime.lora])
        shape = {"type": config.model_type, "layers": config.num_hidden_layers, "width": config.hidden_size}
        yield Sentence("Shape"), Sentence("{type}, {layers} layers, {width} wide", **shape)
        names = kernel_names(model).items()
        kernels = [Sentence("{name} ({layers} layers)", name=name, layers=layers) for name, layers in names]
        yield Sentence("Kernels"), Sentence("{list}", list=kernels)
        for device, held in devices(model).items():
            where, size = _DEVICES.get(device, device), readable(held["weights"])
            lies = Sentence("{layers} layers, {size} of weights", layers=held["layers"], size=size)
            yield Sentence("On {device}", device=where), lies
        yield Sentence("Context"), Sentence("{count} tokens", count=model.context)
        kept, size = len(runtime.engine.prefixes), readable(runtime.engine.prefixes.nbytes)
        one = Sentence("1 conversation, {size}", size=size)
        said = one if kept == 1 else Sentence("{count} conversations, {size}", count=kept, size=size)
        yield Sentence("Kept conversations"), said
        if runtime.engine.chat_template().takes_tools:
            tools = [tool.name for tool in runtime.toolset.tools()] or [Sentence("none")]
            yield Sentence("Tools"), Sentence("{list}", list=tools)
        else:
            yield Sentence("Tools"), Sentence("This model's template has no place for tools.")


def _named(source: str) -> str:
    if not source.strip():
        raise Glm4liteError("name a model: a folder, or a Hub repository")
    return source.strip()


def _progress(progress: Progress, began: float, begun_with: int) -> dict[str, Any]:
    """How far, and how many seconds more at the pace so far."""
    done, total = (readable(n) if progress.unit == "bytes" else f"{n:,}" for n in (progress.done, progress.total))
    gone, moved = time.monotonic() - began, progress.done - begun_with
    left = gone * (progress.total - progress.done) / moved if moved > 0 and gone > 1 else None
    return {
        "stage": progress.stage,
        "share": progress.done / max(progress.total, 1),
        "said": f"{done} / {total}",
        "left": None if left is None else round(left),
    }
