"""Another model in place of the loaded one, read on the engine's thread between two answers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from glm4lite.base.errors import Glm4liteError, said_by
from glm4lite.base.events import Progress
from glm4lite.engine.engine import Engine
from glm4lite.hub.sources import locate
from glm4lite_ui.runtime import BusyError, Runtime

UPDATE_S = 0.2


class Loading:
    """One load at a time. A model that was not unloaded stays until the new one is whole: both are in memory then."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._busy = threading.Lock()

    def load(self, source: str, quant: str, lora: tuple[str, ...] = ()) -> Iterator[Progress | None]:
        """Yields progress, None while the engine is busy with answers. Closing it stops the load.

        Raises:
            BusyError: another window loads a model.
            Glm4liteError: the model cannot be loaded; the old one is still there. What can be known at once is said
                before the engine is waited for.
        """
        budget = any(self.runtime.load_options.get(name) is not None for name in ("ram", "gpu_memory"))
        if budget and self.runtime.engine.loaded:
            raise Glm4liteError(
                "under a memory budget (--ram, --gpu-memory) there is no room for two models at once; "
                "unload the one that is there first"
            )
        locate(source)
        if not self._busy.acquire(blocking=False):
            raise BusyError("another window is loading a model")
        try:
            yield from self._load(source, quant, lora)
        finally:
            self._busy.release()

    def _load(self, source: str, quant: str, lora: tuple[str, ...]) -> Iterator[Progress | None]:
        cancel, over = threading.Event(), threading.Event()
        heard: queue.SimpleQueue[Progress] = queue.SimpleQueue()
        failures: list[BaseException] = []

        def hear(progress: Progress) -> None:
            if cancel.is_set():
                raise Glm4liteError("loading was stopped")
            heard.put(progress)

        def job(_: Engine) -> Iterator[None]:
            self._replace(source, quant, lora, hear)
            yield

        def run() -> None:
            try:
                for _ in self.runtime.worker.run(job, cancel, alone=True):
                    pass
            except BaseException as error:  # raised again where the page reads
                failures.append(error)
            over.set()

        threading.Thread(target=run, name="loading", daemon=True).start()
        last: Progress | None = None
        try:
            while not over.wait(UPDATE_S):
                while not heard.empty():
                    last = heard.get()
                yield last
        finally:
            cancel.set()
        if failures:
            raise Glm4liteError(said_by(failures[0])) from failures[0]

    def _replace(self, source: str, quant: str, lora: tuple[str, ...], hear: Callable[[Progress], None]) -> None:
        runtime, limits = self.runtime, self.runtime.load_options
        runtime.worker.engine = Engine.load(source, quant, progress=hear, need_template=True, lora=lora, **limits)
        runtime.source, runtime.quant, runtime.lora = source, quant, lora
