"""nano with words put in its mouth, at a speed one can stop it at; as a program, its page, which one can kill.

python -m tests.ui.slow_model PORT FOLDER
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite.model.step import Span
from glm4lite.server import Address
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.store import ChatStore
from glm4lite_ui.serving import serve_page
from tests.glm4lite.scripted import ScriptedEngine


def slow_engine(nano: Engine, reply: str, seconds: float = 0.02) -> Engine:
    """An Engine that computes like nano but answers everything with `reply`, taking `seconds` more a token."""
    words = [*nano.tokenizer.ids(reply), nano.tokenizer.special["<|user|>"]]
    model, left = copy.copy(nano.model), dict[int, list[int]]()  # by what keeps an answer's keys and values

    def told(spans: Sequence[Span]) -> list[torch.Tensor]:
        output = [torch.zeros_like(logits) for logits in nano.model.step(spans)]
        time.sleep(seconds)
        for span, logits in zip(spans, output, strict=True):
            said = left.setdefault(id(span.cache), [])
            if len(span.ids) > 1 or not said:
                said[:] = words
            if span.kept:
                logits[-1, said.pop(0)] = 1
        return output

    model.step = told  # type: ignore[method-assign]
    return ScriptedEngine(model, nano.tokenizer, nano.template, {"do_sample": False})


if __name__ == "__main__":
    engine = slow_engine(Engine.load("nano"), "word " * 3000)
    listening = Address("127.0.0.1", int(sys.argv[1])).listen()
    serve_page(
        Runtime(EngineWorker(engine), ChatStore(Path(sys.argv[2]))), listening, lambda said: print(said, flush=True)
    )
