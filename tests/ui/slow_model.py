"""nano with words put in its mouth, at a speed one can stop it at; as a program, its page, which one can kill.

python -m tests.ui.slow_model PORT FOLDER
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch

from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite.server import Address
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.store import ChatStore
from glm4lite_ui.serving import serve_page


def slow_engine(nano: Engine, reply: str, seconds: float = 0.01) -> Engine:
    """An Engine that computes like nano but answers everything with `reply`, taking `seconds` more a token."""
    words = [*nano.tokenizer.ids(reply), nano.tokenizer.special["<|user|>"]]
    model, left = copy.copy(nano.model), list[int]()

    def told(ids: torch.Tensor, **named: Any) -> Any:
        output = nano.model(ids, **named)
        time.sleep(seconds)
        if ids.shape[1] > 1 or not left:
            left[:] = words
        output.logits = torch.zeros_like(output.logits)
        output.logits[0, -1, left.pop(0)] = 1
        return output

    model.forward = told  # type: ignore[method-assign, assignment]
    return Engine(model, nano.tokenizer, nano.template, {"do_sample": False})


if __name__ == "__main__":
    engine = slow_engine(Engine.load("nano"), "word " * 3000)
    listening = Address("127.0.0.1", int(sys.argv[1])).listen()
    serve_page(
        Runtime(EngineWorker(engine), ChatStore(Path(sys.argv[2]))), listening, lambda said: print(said, flush=True)
    )
