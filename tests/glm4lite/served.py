"""A real server on loopback for the length of a test, and what the tests ask it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from openai import OpenAI

import glm4lite
from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite.model.step import Span
from glm4lite.server import Access, Address, ModelNames, create_app
from glm4lite.server.launch import Server, url_of
from glm4lite.text.template import ChatTemplate
from glm4lite.text.tokenizer import Tokenizer
from tests.glm4lite.scripted import ScriptedModel, scripted_engine

NANO = Path(glm4lite.__file__).parent / "nano"


@dataclass
class Served:
    """A running server: its URL, its worker, a plain client and the official one."""

    url: str
    worker: EngineWorker
    http: httpx.Client
    client: OpenAI
    server: Server

    def stop(self) -> None:
        """As Ctrl-C does."""
        self.server.should_exit = True

    def chat(self, text: str = "Hello", **more: Any) -> Any:
        """One question through the official client."""
        messages = [{"role": "user", "content": text}]
        return self.client.chat.completions.create(model="nano", **{"messages": messages, **more})

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.http.post(path, json=body, headers=headers)


@contextmanager
def served(
    engine: Engine,
    api_key: str | None = None,
    queue_size: int = 8,
    names: ModelNames | None = None,
    access: Access | None = None,
) -> Iterator[Served]:
    """uvicorn on a free port of 127.0.0.1, as `glm4lite serve` runs it."""
    worker = EngineWorker(engine, queue_size)
    listening = Address(port=0, api_key=api_key).listen()
    ready = threading.Event()
    server = Server(create_app(worker, names or "nano", access or Access(api_key)), ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    url = url_of(listening)
    try:
        assert ready.wait(20)
        with httpx.Client(base_url=url, timeout=30) as http:
            client = OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0, timeout=30)
            yield Served(url, worker, http, client, server)
    finally:
        server.should_exit = True
        thread.join(20)
        worker.close()
        listening.close()


def scripted(*replies: str, context: int = 4096, template: ChatTemplate | None = None) -> Engine:
    """An engine that gives these outputs in turn."""
    tokenizer = Tokenizer.from_folder(NANO)
    found = template or ChatTemplate.from_folder(NANO)
    assert found is not None
    return scripted_engine(tokenizer, found, list(replies), context)


def prompts_of(engine: Engine) -> list[str]:
    """The prompts that the engine gets from now on, as text with its special tokens."""
    prompts, generate = list[str](), engine.generate

    def watching(prompt: list[int], *rest: Any) -> Any:
        prompts.append(engine.tokenizer.text(prompt, keep_special=True))
        return generate(prompt, *rest)

    engine.generate = watching  # type: ignore[method-assign, assignment]
    return prompts


class EndlessModel(ScriptedModel):
    """Says "a" for ever, a token each `pause` seconds; `passes` counts its forward passes."""

    def __init__(self, tokenizer: Tokenizer, pause: float) -> None:
        super().__init__(tokenizer, [])
        self.token, self.pause, self.passes = tokenizer.ids("a")[0], pause, 0

    def step(self, spans: Sequence[Span]) -> list[torch.Tensor]:
        time.sleep(self.pause)
        self.passes += 1
        self.left = [self.token] * len(spans)
        return super().step(spans)


def endless(pause: float = 0.02) -> Engine:
    """An engine whose answers only end when they are stopped, one at a time."""
    like = scripted()
    model: Any = EndlessModel(like.tokenizer, pause)
    return Engine(model, like.tokenizer, like.template, like.generation_config, parallel=1)


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Seconds until the condition held; AssertionError when it did not."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not happen in time"
        time.sleep(0.01)
    return time.monotonic() - started
