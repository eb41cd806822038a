"""A batch's requests answered by a model in this process: several at once, by the steps of one engine."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glm4lite.base.errors import ConfigError
from glm4lite.checkpoint.lora.folder import Loras
from glm4lite.checkpoint.streaming import ProgressCallback
from glm4lite.engine.engine import MOST_PARALLEL, Engine
from glm4lite.engine.scheduler import PARALLEL
from glm4lite.engine.worker import Ended, EngineWorker
from glm4lite.loading.load_options import LoadOptions
from glm4lite.memory.budget import Budget
from glm4lite.server.answer import Piece, answer
from glm4lite.server.batch.lines import Request, Result, no_stream
from glm4lite.server.batch.running import Done
from glm4lite.server.endpoint import CHAT, COMPLETION, Endpoint, ModelNames
from glm4lite.server.replies import JSON, Reply
from glm4lite_quant.kernels import native

READ_AHEAD = 4  # requests that are ready when one of those that run is done
_ENDPOINTS: Mapping[str, Endpoint[Any]] = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}


@dataclass(frozen=True)
class Model:
    """Which model answers, by which name requests call it, and how it is loaded; as `Engine.load` takes it."""

    source: str
    name: str
    quant: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    budget: Budget = field(default_factory=Budget)
    speculate: str = "auto"
    draft: str | None = None
    parallel: int | None = None
    threads: int | None = None
    loras: Loras = field(default_factory=Loras)

    def __post_init__(self) -> None:
        if self.parallel is not None and not 1 <= self.parallel <= MOST_PARALLEL:
            raise ConfigError(
                f"--parallel is {self.parallel}; a model computes from 1 to {MOST_PARALLEL} answers at once"
            )
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads is {self.threads}; use a whole number of at least 1")

    @property
    def at_once(self) -> int:
        return (self.parallel or PARALLEL) + READ_AHEAD

    def open(self, progress: ProgressCallback | None = None) -> LocalModel:
        """Loads it. Raises what loading raises, and QuantError for threads that there are not."""
        if self.threads is not None:
            native.set_threads(self.threads)
        options = LoadOptions(
            self.quant or "auto", self.device, self.dtype, progress, budget=self.budget, loras=self.loras
        )
        engine = Engine.from_options(
            self.source, options, speculate=self.speculate, parallel=self.parallel, draft=self.draft
        )
        at_once = engine.parallel + READ_AHEAD
        # Where it computes fewer at once than was thought (1 with a GPU), those that were sent all the same wait.
        return LocalModel(EngineWorker(engine, max(at_once, self.at_once)), self.name, at_once)


class LocalModel:
    """The Answerer of a worker's engine, which requests call `name`; it closes the worker.

    at_once: requests that run, and those that wait for them: as many as the worker lets wait.
    """

    def __init__(self, worker: EngineWorker, name: str, at_once: int) -> None:
        self.worker, self._name, self.at_once = worker, name, at_once

    @property
    def context(self) -> int:
        return self.worker.engine.model.context

    def begin(self, request: Request, done: Done, cancel: threading.Event) -> None:
        """Puts a request into the worker's queue; what it may not ask for ends it here."""
        engine, ignored = self.worker.engine, tuple[str, ...]()
        try:
            endpoint = _ENDPOINTS[request.url(_ENDPOINTS)]
            names = ModelNames(self._name, adapters=engine.adapters)
            asked = endpoint.read(request.body(), names)
            ignored = tuple(asked.ignored)
            if asked.stream:
                raise no_stream()
            question = endpoint.ask(engine, asked, names)
            ignored += question.ignored
        except Exception as error:
            done(Result.refused(request.custom_id, error, ignored))
            return
        reply, pieces = endpoint.reply(names.answering(asked.model), question, asked), list[Piece]()

        def deliver(piece: Piece | Ended) -> None:
            if not isinstance(piece, Ended):
                pieces.append(piece)
                return
            error = piece.error
            if error is None:
                try:
                    done(Result.of(request.custom_id, 200, _whole(reply, pieces), ignored))
                    return
                except Exception as found:
                    error = found
            done(Result.refused(request.custom_id, error, ignored))

        self.worker.submit(lambda engine: answer(engine, question, cancel), deliver, cancel)

    def close(self) -> None:
        self.worker.close()


def _whole(reply: Reply, pieces: list[Piece]) -> JSON:
    for piece in pieces:
        for _ in reply.chunks(piece):
            pass
    return reply.whole()
