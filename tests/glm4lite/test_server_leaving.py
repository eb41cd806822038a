"""A client that leaves stops its answer; the queue is bounded; answers end with the server."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from glm4lite.server.requests import ChatRequest
from tests.glm4lite.served import EndlessModel, Served, endless, served, wait_for

HELLO: dict[str, Any] = {"model": "nano", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def slow() -> Iterator[Served]:
    with served(endless(), queue_size=2) as server:
        yield server


def is_idle(server: Served) -> bool:
    state = server.worker.state()
    return state.running == state.waiting == 0


def test_a_client_that_leaves_a_stream_stops_its_answer(slow: Served) -> None:
    stream = slow.chat(stream=True)
    for _, chunk in zip(range(4), stream, strict=False):
        assert chunk.choices
    assert not is_idle(slow)
    model: Any = slow.worker.engine.model
    passes = model.passes
    stream.close()
    wait_for(lambda: is_idle(slow), 30)
    assert model.passes - passes < 25  # half a second of an answer without end
    time.sleep(0.1)  # a pass that was under way
    passes = model.passes
    time.sleep(0.1)
    assert model.passes == passes
    assert slow.worker.state().cancelled == 1


def test_a_client_that_leaves_without_a_stream_stops_its_answer(slow: Served) -> None:
    with pytest.raises(openai.APITimeoutError):
        slow.client.with_options(timeout=0.3).chat.completions.create(**HELLO)
    wait_for(lambda: is_idle(slow), 30)


def test_a_client_that_leaves_while_it_waits_leaves_the_queue(slow: Served) -> None:
    running = slow.chat(stream=True)
    next(running)
    waiting = slow.chat(stream=True)
    next(waiting)  # the role comes at once
    wait_for(lambda: slow.worker.state().waiting == 1)
    waiting.close()
    wait_for(lambda: slow.worker.state().waiting == 0, 5)
    assert slow.worker.state().running == 1
    running.close()


def test_a_full_queue_is_429_with_the_time_to_wait(slow: Served) -> None:
    streams = [slow.chat(stream=True) for _ in range(3)]
    for stream in streams:
        next(stream)
    wait_for(lambda: slow.worker.state().waiting == 2)
    with pytest.raises(openai.RateLimitError) as refused:
        slow.chat()
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert refused.value.code == "queue_full"
    for stream in streams:
        stream.close()
    wait_for(lambda: is_idle(slow), 30)


def test_an_answer_ends_with_the_server() -> None:
    with served(endless()) as server:
        stream = server.chat(stream=True)
        next(stream)
        model = server.worker.engine.model
        assert isinstance(model, EndlessModel)
        server.stop()
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)
    passes = model.passes
    time.sleep(0.1)
    assert model.passes == passes


def test_a_client_that_leaves_in_its_own_request_is_no_error(slow: Served, caplog: pytest.LogCaptureFixture) -> None:
    address = slow.http.base_url
    with socket.create_connection((address.host, address.port)) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f'{head}Content-Length: 1000\r\n\r\n{{"model": '.encode())
    time.sleep(0.2)
    assert slow.http.get("/health").status_code == 200
    assert caplog.records == []


@pytest.mark.slow
def test_the_command_serves_and_ends_with_an_interrupt() -> None:
    command = [sys.executable, "-m", "glm4lite", "serve", "--port", "0", "--quant", "int8"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        lines = list[str]()
        assert process.stderr is not None
        threading.Timer(60, process.kill).start()
        for line in process.stderr:
            lines.append(line)
            if "answers at" in line:
                break
        url = lines[-1].split("answers at ")[1].split()[0]
        assert httpx.get(f"{url}/models").json()["data"][0]["id"] == "nano"
        process.send_signal(2)
        assert process.wait(20) == 0


def test_a_client_that_leaves_before_its_body_is_looked_at_costs_nothing(
    slow: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, go_on = list[str](), threading.Event()
    read = ChatRequest.read

    def watching(body: dict[str, Any]) -> ChatRequest:
        looked.append(body["model"])
        go_on.wait(5)
        return read(body)

    monkeypatch.setattr(ChatRequest, "read", watching)
    with httpx.Client(base_url=slow.url, timeout=0.4) as http:
        for model in ("first", "second"):
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json={**HELLO, "model": model})
    time.sleep(0.4)
    go_on.set()
    monkeypatch.undo()
    assert slow.post("/v1/chat/completions", {**HELLO, "max_tokens": 1}).status_code == 200
    assert looked == ["first"]
