"""`glm4lite batch --server`: requests to a real server, and to servers that are none or that fail in the middle."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from glm4lite.base.errors import ConfigError
from glm4lite.cli.app import app
from glm4lite.engine.engine import Engine
from glm4lite.server.batch import client
from glm4lite.server.batch.client import Server, ServerError
from glm4lite.server.batch.lines import Request, Result, requests
from glm4lite.server.batch.local import LocalModel
from glm4lite.server.batch.running import results
from glm4lite.server.replies import JSON
from tests.commands import run
from tests.glm4lite.served import served, wait_for
from tests.glm4lite.test_batch import asked, by_id, chat, completion, many, read, write

ANSWER = {"object": "chat.completion", "choices": [], "usage": {"completion_tokens": 3}}
Said = tuple[int, str, str | JSON]  # status, type, body


class Scripted(ThreadingHTTPServer):
    """Answers POSTs with these, then with ANSWER; a status of 0 closes the connection."""

    daemon_threads = True

    def __init__(self, *said: Said, headers: dict[str, str] | None = None, pause: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.said, self.headers, self.pause = list(said), headers or {}, pause
        self.asked, self.keys, self.now, self.most = list[str](), set[str | None](), 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self.answer(200, "application/json", {"object": "list", "data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body["messages"][0]["content"])
        self.server.keys.add(self.headers["Authorization"])
        self.server.now += 1
        self.server.most = max(self.server.most, self.server.now)
        time.sleep(self.server.pause)
        self.server.now -= 1
        self.answer(*(self.server.said.pop(0) if self.server.said else (200, "application/json", ANSWER)))

    def answer(self, status: int, kind: str, body: str | JSON) -> None:
        if not status:
            return
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **self.server.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def scripted(*said: Said, headers: dict[str, str] | None = None, pause: float = 0.0) -> Iterator[Scripted]:
    with Scripted(*said, headers=headers, pause=pause) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WAITS_S", (0.01, 0.01))


def answered(server: Scripted, *names: str, at_once: int = 1, key: str | None = None) -> list[Result]:
    given = [Request(name, asked(name, chat(name))) for name in names]
    with closing(Server(f"{server.url}/v1/", key, at_once).open()) as asking:
        return list(results(asking, given))


def test_a_server_answers_as_the_model_does_here_and_the_same_command_goes_on(tmp_path: Path) -> None:
    given = [*many(12, 20), asked("plain", chat()), asked("wrong", chat(temperature=9)), asked(7, chat())]
    given += [asked("stream", chat(stream=True)), asked("url", chat(), "/v1/files")]
    source, out = write(tmp_path / "in.jsonl", given[:6]), tmp_path / "out.jsonl"
    with served(Engine.load("nano", device="cpu"), api_key="a-key") as server:
        command = ("batch", source, out, "--server", server.url, "--api-key", "a-key", "--parallel", "5")
        done = run(*command)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert "6 of 6 requests done, 0 errors" in done.stderr
        half = out.read_bytes()
        with out.open("ab") as file:  # as a process that was killed leaves it
            file.write(half[: half.index(b"\n") // 2])
        write(source, given)
        assert run(*command).returncode == 3
        assert out.read_bytes().startswith(half)
        with pytest.raises(ServerError, match="answers 401: it takes no request with this key"):
            Server(server.url, "another").open()
        asked_here = requests(io.BytesIO(source.read_bytes()), 4096)
        here = [one.line for one in results(LocalModel(server.worker, "nano", 4), asked_here)]
    assert len(read(out)) == len(given)
    found, expected = by_id(read(out)), by_id(here)
    assert "/v1/embeddings or /v1/responses" in found.pop("url")[2]["message"]  # of which the model here has none
    del expected["url"]
    assert found == expected


def test_what_a_server_says_of_a_request_is_that_requests_answer() -> None:
    bad: JSON = {"error": {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}}
    older: JSON = {"object": "error", "message": "no such model", "code": 404}
    plain: JSON = {"detail": [{"msg": "field required"}]}
    kind = "application/json"
    with scripted(
        (400, kind, bad), (404, kind, older), (422, kind, plain), (500, kind, {"error": "it broke"})
    ) as server:
        found = answered(server, *"abcde")
    assert [one.line["response"]["status_code"] for one in found] == [400, 404, 422, 500, 200]
    assert [one.error for one in found] == [
        "too long",
        "no such model",
        "[{'msg': 'field required'}]",
        "it broke",
        None,
    ]
    assert found[0].line["response"]["body"] == bad
    assert [one.new_tokens for one in found] == [0, 0, 0, 0, 3]


def test_what_may_go_away_is_asked_again() -> None:
    with scripted((503, "text/html", "<p>"), (0, "", ""), headers={"Retry-After": "0"}) as server:
        [found] = answered(server, "a", key="secret")
        assert found.line["response"]["status_code"] == 200
        assert server.asked == ["a", "a", "a"]
        assert server.keys == {"Bearer secret"}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ((200, "text/html", "<html>Welcome</html>"), r"answers 200 with 'text/html', which is no JSON object; is http"),
        ((200, "application/json", "[1]"), "no JSON object"),
        ((401, "application/json", {"error": {"message": "no"}}), "takes no request with this key"),
        ((404, "application/json", {"detail": "Not Found"}), r"completions is not there \(404\)"),
        ((307, "application/json", {}), "leads elsewhere"),
        (None, "answers 503, also after"),
    ],
)
def test_what_is_wrong_with_a_server_ends_the_run_in_one_line(said: Said | None, why: str) -> None:
    script: list[Said] = [(503, "text/plain", "later")] * 3 if said is None else [said]
    with scripted(*script) as server, pytest.raises(ServerError, match=why) as error:
        answered(server, *"abc")
    assert "\n" not in str(error.value)
    assert server.asked[:1] == ["a"]


def test_nobody_there_is_said_at_once() -> None:
    with scripted() as server:
        url = server.url
    with pytest.raises(ServerError, match=f"no server answers at {url} "):
        Server(url).open()


def test_as_many_requests_as_may_be_are_under_way_and_none_when_it_is_closed() -> None:
    with scripted(pause=0.1) as server:
        assert len(answered(server, *map(str, range(12)), at_once=4)) == 12
        assert server.most == 4
    with scripted(pause=1.0) as server:
        asking = Server(server.url, None, 4).open()
        found = results(asking, (Request(name, asked(name, chat(name))) for name in "abcdefgh"))
        threading.Thread(target=lambda: next(found, None), daemon=True).start()
        wait_for(lambda: len(server.asked) == 4)
        began = time.monotonic()
        asking.close()
        assert time.monotonic() - began < 0.5
        time.sleep(0.1)
        assert len(server.asked) == 4


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://a", "http://", "http://a:b", "http://a?b=c", "http://a\n"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^--server is .*; use an address such as"):
        Server(url)


def test_a_key_that_no_header_carries_and_options_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    for key in ("", "a b", "schlüssel", "a\r\nHost: b"):
        with pytest.raises(ConfigError, match="the API key is empty or holds") as error:
            Server("http://a", key)
        assert not key or key not in str(error.value)
    source, out = write(tmp_path / "in.jsonl", [asked("a", completion("a", 1))]), tmp_path / "out.jsonl"
    for option, why in (
        (("--server", "http://127.0.0.1:1", "--model", "nano"), "--model means nothing with --server"),
        (("--server", "http://127.0.0.1:1", "--gpu-memory", "1GiB"), "--gpu-memory means nothing with --server"),
        (("--api-key", "a"), "--api-key means nothing without --server"),
        (("--workers", "2"), "--workers means nothing without --ray"),
        (("--parallel", "65"), "from 1 to 64"),
        (("--server", "http://127.0.0.1:1", "--parallel", "257"), "from 1 to 256"),
    ):
        with pytest.raises(ConfigError, match=re.escape(why)):
            app(["batch", str(source), str(out), *option], standalone_mode=False)
        assert not out.exists()
