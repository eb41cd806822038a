"""Loads, uses and unloads a model twice, and prints what memory of the process that took, in bytes, as JSON.

python -m tests.ui.loads_twice CHECKPOINT QUANT CHATS
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from pathlib import Path

from glm4lite.base.errors import NoModel
from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite.memory.system import resident
from glm4lite_ui.chats import Chat
from glm4lite_ui.loading import Loading
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.store import ChatStore

_M_ARENA_MAX = -8  # of glibc's mallopt


def load(runtime: Runtime, source: str, quant: str) -> None:
    for _ in Loading(runtime).load(source, quant):
        pass


def answer(runtime: Runtime) -> None:
    """As a chat does it: the memory it takes is the model's, too."""
    chat = Chat()
    chat.settings.max_new_tokens = 8
    chat.ask("What is 37 * 24?")
    if not runtime.answer(chat).over.wait(120):
        raise RuntimeError("the answer does not end")
    if error := runtime.store.load(chat.id).turns[0].error:
        raise RuntimeError(error)


def main(source: str, quant: str, chats: str) -> None:
    with contextlib.suppress(AttributeError):  # each thread's own heap keeps up to 20 MB, more or less by chance
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    runtime = Runtime(EngineWorker(Engine.load("nano")), ChatStore(Path(chats)), load_options={"device": "cpu"})
    seen = list[tuple[int, int]]()
    for _ in range(2):  # what a first load leaves for good is there at the second
        load(runtime, source, quant)
        answer(runtime)
        full = resident()
        runtime.unload()
        seen.append((full, resident()))
    try:
        _ = runtime.engine.model
    except NoModel:
        (_, empty), (full, left) = seen
        print(json.dumps({"held": full - empty, "stayed": left - empty}))
    runtime.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
