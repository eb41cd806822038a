"""A model that is unloaded: its memory comes back, the page says so, what is written stays, the last one is offered."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import glm4lite
from glm4lite.base.errors import NoModel
from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite.server.metrics import resident_bytes
from glm4lite_ui.chats import Chat
from glm4lite_ui.loading import Loading
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.store import ChatStore
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint, write_tokenizer
from tests.ui.acts import ask, start_long_answer, wait_for_end
from tests.ui.conftest import Serve
from tests.ui.slow_model import slow_engine

Visit = Callable[..., Any]
NANO = Path(glm4lite.__file__).parent / "nano"
SIZES = {"int4": 30 << 20, "int8": 60 << 20, "none": 120 << 20}  # bytes of 60 million weights
QUESTION = "What is 37 * 24?"


@pytest.fixture
def own() -> Engine:
    """nano, for this test alone: it is unloaded."""
    return Engine.load("nano")


def test_the_page_says_that_no_model_is_loaded_keeps_what_is_written_and_loads_the_last_one(
    serve: Serve, visit: Visit, own: Engine
) -> None:
    site = serve(own)
    page = visit(site.url)
    ask(page, QUESTION)
    wait_for_end(page)
    page.click("#open-model")
    page.click("#unload")
    page.wait_for_selector("#unloaded >> text=No model is loaded.")
    page.keyboard.press("Escape")
    assert page.inner_text("#open-model") == "No model"
    page.wait_for_selector("#no-model >> text=What you write stays here until one is.")
    page.fill("#message", "What is 12 * 12?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".toast >> text=No model is loaded.")
    assert page.input_value("#message") == "What is 12 * 12?"
    assert len(site.runtime.store.find()[0].turns) == 1
    page.wait_for_timeout(600)
    page.reload()  # also for a window that comes later
    page.wait_for_selector("#no-model >> text=No model is loaded.")
    page.wait_for_function("document.querySelector('#message').value === 'What is 12 * 12?'")
    page.get_by_role("button", name="Load nano again").click()
    page.wait_for_selector("#no-model", state="hidden")
    page.wait_for_function("document.querySelector('#open-model').textContent === 'nano'")
    page.press("#message", "Enter")
    page.wait_for_selector("text=12 * 12 = 144.")
    wait_for_end(page)


def test_every_window_hears_of_it_and_another_model_can_be_loaded(serve: Serve, visit: Visit, own: Engine) -> None:
    site = serve(own)
    one, other = visit(site.url), visit(site.url)
    one.click("#open-model")
    one.click("#unload")
    other.wait_for_selector("#no-model >> text=No model is loaded.")
    one.fill("#source", str(NANO))
    one.select_option("#quant", "int8")
    one.get_by_role("button", name="Load", exact=True).click()
    other.wait_for_selector("#no-model", state="hidden")
    one.click("#unload")
    other.get_by_role("button", name="Load nano again").click()
    other.wait_for_selector("#no-model", state="hidden")
    assert (site.runtime.source, site.runtime.quant) == (str(NANO), "int8")  # as it was


def test_a_model_that_answers_is_not_unloaded(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    page = visit(site.url)
    start_long_answer(page)
    page.click("#open-model")
    page.click("#unload")
    page.wait_for_selector(".toast >> text=a chat is being answered; stop that first")
    assert site.runtime.engine.loaded
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs each answer that is a refusal


def test_what_the_routes_and_the_api_say_meanwhile(serve: Serve, own: Engine) -> None:
    site = serve(own)
    with httpx.Client(base_url=site.url, trust_env=False, timeout=30) as client:
        assert client.post("/page/model/unload").status_code == 200
        assert client.post("/page/model/unload").status_code == 200  # there is nothing left to unload
        chat = "/page/chats/0123456789abcdef"
        for path in (f"{chat}/send", f"{chat}/drop_oldest"):
            answer = client.post(path, json={"text": "Hi"})
            assert (answer.status_code, answer.json()["error"]["said"]) == (409, "no model is loaded; load one first")
        assert client.post(f"{chat}/set", json={"temperature": 0.5}).status_code == 200
        assert client.post("/page/files?name=a.txt", content=b"text").json()["tokens"] > 0
        assert client.get("/page/model").json()["loaded"] is False
        assert client.get("/page/tools").json()["takes_tools"] is True
        assert site.runtime.store.summaries() == []
        messages = {"model": "nano", "messages": [{"role": "user", "content": "Hi"}]}
        refused = client.post("/v1/chat/completions", json=messages)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_loaded")
        assert client.get("/v1/models").json()["data"] == []
        assert client.get("/health").status_code == 200
        assert "glm4lite_kept_prefixes 0" in client.get("/metrics").text
        assert client.post("/page/model/load", json={"source": "nano"}).status_code == 200
        deadline = time.monotonic() + 60
        while not site.runtime.engine.loaded and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client.post("/v1/chat/completions", json={**messages, "max_tokens": 5}).status_code == 200


@pytest.mark.parametrize("quant", SIZES)
@pytest.mark.skipif(resident_bytes() == 0, reason="this system does not tell a process's memory")
def test_the_memory_comes_back(tmp_path: Path, quant: str) -> None:
    folder = checkpoint(tmp_path / "model")
    chats = ChatStore(tmp_path / "chats")
    runtime = Runtime(EngineWorker(Engine.load("nano")), chats, load_options={"device": "cpu"})
    try:
        seen = list[tuple[int, int]]()
        for _ in range(2):  # what a first load leaves for good is there at the second
            load(runtime, str(folder), quant)
            answer(runtime)
            full = resident_bytes()
            runtime.unload()
            seen.append((full, resident_bytes()))
    finally:
        runtime.close()
    (_, empty), (full, left) = seen
    assert full - empty > SIZES[quant] * 0.8, "the model is too small to tell"
    assert left - empty < (full - empty) * 0.15
    with pytest.raises(NoModel):
        _ = runtime.engine.model


def checkpoint(folder: Path) -> Path:
    """One of 60 million weights, about 120 MB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "head_dim": 64}
    write_checkpoint(folder, tiny_config(num_hidden_layers=4, **sizes), shards=1, tokenizer=False)
    write_tokenizer(folder)
    return folder


def load(runtime: Runtime, source: str, quant: str) -> None:
    for _ in Loading(runtime).load(source, quant):
        pass


def answer(runtime: Runtime) -> None:
    """As a chat does it: the memory it takes is the model's, too."""
    chat = Chat()
    chat.settings.max_new_tokens = 8
    chat.ask("What is 37 * 24?")
    assert runtime.answer(chat).over.wait(60)
    assert runtime.store.load(chat.id).turns[0].error is None


def test_under_a_budget_another_model_is_loaded_once_the_first_is_gone(own: Engine, tmp_path: Path) -> None:
    runtime = Runtime(EngineWorker(own), ChatStore(tmp_path), load_options={"ram": "1GiB"})
    try:
        with pytest.raises(glm4lite.Glm4liteError, match="unload the one that is there first"):
            load(runtime, "nano", "auto")
        runtime.unload()
        load(runtime, "nano", "auto")
        assert runtime.engine.loaded
    finally:
        runtime.close()
