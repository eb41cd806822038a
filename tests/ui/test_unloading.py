"""A model that is unloaded: its memory comes back, the page says so, what is written stays, the last one is offered."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import glm4lite
from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.store import ChatStore
from tests.commands import python
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint, write_tokenizer
from tests.ui.acts import ask, start_long_answer, wait_for_end
from tests.ui.conftest import Serve
from tests.ui.loads_twice import load
from tests.ui.slow_model import slow_engine

Visit = Callable[..., Any]
ROOT = Path(__file__).parents[2]
NANO = Path(glm4lite.__file__).parent / "nano"
SIZES = {"int4": 15 << 20, "int8": 30 << 20, "none": 60 << 20}  # bytes of 30 million weights
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
        metrics = client.get("/metrics").text
        assert "glm4lite_kept_prefixes 0" in metrics
        assert "glm4lite_kv_blocks" not in metrics
        assert client.post("/page/model/load", json={"source": "nano"}).status_code == 200
        deadline = time.monotonic() + 60
        while not site.runtime.engine.loaded and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client.post("/v1/chat/completions", json={**messages, "max_tokens": 5}).status_code == 200


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 30 million weights, about 60 MB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "head_dim": 64}
    folder = tmp_path_factory.mktemp("large")
    write_checkpoint(folder, tiny_config(num_hidden_layers=2, **sizes), shards=1, tokenizer=False)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("quant", ["int4", *(pytest.param(one, marks=pytest.mark.slow) for one in ("int8", "none"))])
def test_the_memory_comes_back(large: Path, tmp_path: Path, quant: str) -> None:
    """In a process of its own: what others have freed and not given back would be taken for the model's."""
    command = [*python(), "-m", "tests.ui.loads_twice", str(large), quant, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["held"] > SIZES[quant] * 0.8, "the model is too small to tell"
    assert found["stayed"] < found["held"] * 0.15


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
