"""How the server behaves to programs that come by HTTP: names, pages, ids, methods, connections, a model that loads."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from glm4lite.base.errors import ConfigError
from glm4lite.base.events import Progress
from glm4lite.server import Access, Address, ModelNames
from glm4lite.server.connection import Connection
from glm4lite.server.launch import KEEP_ALIVE_S, url_of
from glm4lite.server.loading import Loading
from tests.glm4lite.served import Served, endless, scripted, served, wait_for

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
ORIGIN = "app://obsidian.md"


@pytest.fixture(scope="module")
def hi() -> Iterator[Served]:
    access = Access(hosts=("Host.docker.internal",), origins=(ORIGIN, "https://chat.example"))
    with served(scripted(*["\nHi.<|user|>"] * 200), access=access) as server:
        yield server


def test_a_request_may_leave_the_model_out_and_use_its_aliases() -> None:
    names = ModelNames("nano", ("gpt-4o", "local"))
    with served(scripted(*["\nHi.<|user|>"] * 9), names=names) as server:
        for model in ({}, {"model": None}, {"model": ""}, {"model": "nano"}, {"model": "gpt-4o"}, {"model": "local"}):
            answer = server.post(CHAT, {**HELLO, **model})
            assert (answer.status_code, answer.json()["model"]) == (200, "nano")
        refused = server.post(CHAT, {**HELLO, "model": "gpt-5"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert "'nano' or 'gpt-4o' or 'local'" in refused.json()["error"]["message"]
        assert [card["id"] for card in server.http.get("/v1/models").json()["data"]] == ["nano", "gpt-4o", "local"]
        assert server.http.get("/v1/models/local").json()["id"] == "local"
    with served(scripted("\nHi.<|user|>"), names=ModelNames("nano", any_name=True)) as server:
        assert server.post(CHAT, {**HELLO, "model": "gpt-5"}).json()["model"] == "nano"


def test_addresses_are_answered_without_v1_too(hi: Served) -> None:
    for path, body in (
        ("/chat/completions", HELLO),
        ("/completions", {"prompt": "Hi"}),
        ("/responses", {"input": "Hi"}),
        ("/messages", HELLO),
        ("/tokenize", {"prompt": "Hi"}),
    ):
        assert hi.post(path, body).status_code == 200
        assert hi.post(f"/v1{path}", body).status_code == 200
    for path in ("/models", "/v1/models", "/v1/models/", "/models/"):
        assert hi.http.get(path).json()["data"][0]["id"] == "nano"
    without = OpenAI(base_url=hi.url, api_key="none", max_retries=0)
    assert without.models.list().data[0].id == "nano"


def test_a_method_that_is_not_answered_names_those_that_are(hi: Served) -> None:
    for path, allowed in (
        (CHAT, {"POST"}),
        ("/v1/models", {"GET", "HEAD"}),
        ("/v1/responses/a", {"GET", "HEAD", "DELETE"}),
    ):
        refused = hi.http.put(path)
        assert (refused.status_code, set(refused.headers["allow"].split(", "))) == (405, allowed)
    assert hi.http.head("/v1/models/").status_code == 200


def test_every_answer_has_an_id_which_may_be_the_clients(hi: Served) -> None:
    first, second = (hi.http.get("/health").headers["x-request-id"] for _ in range(2))
    assert first != second
    for path in ("/health", "/nothing", "/v1/models"):
        assert hi.http.get(path, headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    odd = hi.http.get("/health", headers={"X-Request-Id": "<script>"}).headers["x-request-id"]
    assert odd.startswith("req_")
    assert hi.http.get("/", headers={"Host": "evil.example"}).headers["x-request-id"]


def test_embeddings_are_refused_with_a_sentence(hi: Served) -> None:
    answer = hi.post("/v1/embeddings", {"model": "nano", "input": "Hi"})
    assert answer.status_code == 400
    assert "no embeddings" in answer.json()["error"]["message"]


def test_a_named_host_is_answered_and_no_other(hi: Served) -> None:
    assert hi.http.get("/health", headers={"Host": "host.docker.internal:8000"}).status_code == 200
    for host in ("docker.internal", "a.host.docker.internal", "host.docker.internal.evil.example"):
        assert hi.http.get("/health", headers={"Host": host}).status_code == 403


def test_a_page_of_a_named_origin_may_ask_and_read_the_answer(hi: Served) -> None:
    asks = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    leave = hi.http.options(CHAT, headers={**asks, "Access-Control-Request-Headers": "authorization,x-stainless-os"})
    assert leave.status_code == 200
    assert leave.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-os" in leave.headers["access-control-allow-headers"]
    elsewhere = {"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    answer = hi.post(CHAT, HELLO, **elsewhere)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("origin", ["https://chat.example.evil", "http://chat.example", "app://obsidian", "null"])
def test_a_page_of_another_origin_is_refused_as_before(hi: Served, origin: str) -> None:
    refused = hi.post(CHAT, HELLO, Origin=origin)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed")
    leave = hi.http.options(CHAT, headers={"Origin": origin, "Access-Control-Request-Method": "POST"})
    assert leave.status_code >= 400
    assert "access-control-allow-origin" not in {**refused.headers, **leave.headers}


def test_a_page_asks_its_leave_without_the_key_and_reads_that_it_is_missing() -> None:
    with served(scripted("\nHi.<|user|>"), access=Access("secret", origins=(ORIGIN,))) as server:
        asks = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
        assert server.http.options(CHAT, headers=asks).status_code == 200
        refused = server.post(CHAT, HELLO, Origin=ORIGIN)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
        assert server.post(CHAT, HELLO, Origin=ORIGIN, Authorization="Bearer secret").status_code == 200


@pytest.mark.parametrize("origin", ["*", "null", "https://*.example", "chat.example", "https://a.example/", "", "x://"])
def test_an_origin_is_given_exactly_or_not_at_all(origin: str) -> None:
    with pytest.raises(ConfigError, match="give one origin"):
        Access(origins=(origin,))


@pytest.mark.parametrize("host", ["*", "*.local", "a:80", "http://a", "", "a/b"])
def test_a_host_is_a_name(host: str) -> None:
    with pytest.raises(ConfigError, match="give a name"):
        Access(hosts=(host,))


def test_text_becomes_ids_and_ids_become_text(hi: Served) -> None:
    tokenizer = hi.worker.engine.tokenizer
    plain = tokenizer.ids("Hello <|user|> 你好")
    got = hi.post("/tokenize", {"prompt": "Hello <|user|> 你好"}).json()
    assert got == {"count": len(plain) + 2, "max_model_len": 4096, "tokens": [*tokenizer.prefix_ids, *plain]}
    assert hi.post("/tokenize", {"content": "Hello <|user|> 你好"}).json()["tokens"] == plain
    assert hi.post("/tokenize", {"prompt": "Hi", "add_special_tokens": False}).json()["tokens"] == tokenizer.ids("Hi")
    assert hi.post("/detokenize", {"tokens": plain}).json()["content"] == "Hello <|user|> 你好"
    chat = hi.post("/tokenize", HELLO).json()
    assert chat["count"] == hi.post(CHAT, HELLO).json()["usage"]["prompt_tokens"]
    pieces = hi.post("/tokenize", {"content": "Hello you", "with_pieces": True}).json()["tokens"]
    assert "".join(piece["piece"] for piece in pieces) == "Hello you"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
    ],
)
def test_what_is_no_text_and_no_id_is_refused(hi: Served, path: str, body: dict[str, Any], field: str) -> None:
    error = hi.post(path, body).json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: ")


def connected(server: Served) -> socket.socket:
    return socket.create_connection((server.http.base_url.host, server.http.base_url.port or 80), 10)


def read_all(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    answer = b""
    while piece := connection.recv(1 << 16):
        answer += piece
    return answer


def request(path: str, body: bytes = b"", method: str = "POST") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("stream", [b"false", b"true"])
def test_a_client_that_closes_its_sending_side_still_gets_its_answer(hi: Served, stream: bytes) -> None:
    body = b'{"messages": [{"role": "user", "content": "Hello"}], "stream": %s}' % stream
    with connected(hi) as connection:
        connection.sendall(request(CHAT, body))
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert b"HTTP/1.1 200 OK" in answer
    assert b"Hi" in answer
    assert (b"[DONE]" in answer) == (stream == b"true")


def test_a_client_that_waits_with_its_sending_side_closed_is_answered_however_long_it_takes() -> None:
    engine = endless(pause=0.05)
    with served(engine) as server, connected(server) as connection:
        body = b'{"max_tokens": 30, "messages": [{"role": "user", "content": "Hello"}]}'
        connection.sendall(request(CHAT, body))
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 102 ")
    assert b"HTTP/1.1 200 OK" in answer
    assert b'"length"' in answer


def test_a_client_that_leaves_is_told_from_one_that_only_sends_no_more() -> None:
    with served(endless(), queue_size=2) as server:
        with connected(server) as connection:
            connection.sendall(request(CHAT, b'{"messages": [{"role": "user", "content": "Hello"}]}'))
            wait_for(lambda: server.worker.state().running == 1)
        wait_for(lambda: server.worker.state().running == 0, 10)


def test_a_connection_rests_for_a_minute_and_a_header_that_began_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KEEP_ALIVE_S == 60
    monkeypatch.setattr(Connection, "head_s", 0.3)
    with served(scripted("\nHi.<|user|>")) as server, connected(server) as connection:
        for _ in range(2):
            connection.sendall(request("/health", method="GET"))
            answer = b""
            while b"running" not in answer:
                answer += connection.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 200 OK")
            time.sleep(0.8)  # longer than a header may take
        connection.sendall(b"GET /health HT")
        assert b"408" in read_all(connection)


@pytest.fixture
def loading() -> Iterator[tuple[Loading, str, Callable[[], None]]]:
    shown = list[Progress]()
    state, listening = Loading(shown.append), Address(port=0).listen()
    begun, over = threading.Event(), threading.Event()

    def load() -> None:
        with state.answering(listening, Access()):
            begun.set()
            over.wait(20)

    thread = threading.Thread(target=load)
    thread.start()
    begun.wait(20)

    def end() -> None:
        over.set()
        thread.join(20)

    yield state, url_of(listening), end
    end()
    listening.close()


def test_while_a_model_loads_everyone_is_told_how_far_it_is(
    loading: tuple[Loading, str, Callable[[], None]],
) -> None:
    state, url, end = loading
    with httpx.Client(base_url=url, timeout=20) as http:
        first = http.get("/health")
        assert (first.status_code, first.json()) == (503, {"status": "loading"})
        state.show(Progress("load", 3, 40, "tensors"))
        assert http.get("/health").json()["progress"]["done"] == 3
        asked = http.post(CHAT, json=HELLO)
        assert (asked.status_code, asked.json()["error"]["code"]) == (503, "model_loading")
        assert "load, 3 of 40 tensors" in asked.json()["error"]["message"]
        assert int(asked.headers["retry-after"]) > 0
        assert http.post("/v1/messages", json=HELLO).json()["error"]["type"] == "overloaded_error"
        assert http.get("/health", headers={"Host": "evil.example"}).status_code == 403
    end()
    with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port or 80), 5) as waiting:
        waiting.sendall(b"GET /")  # whoever comes in between waits for the model's own server
        waiting.settimeout(0.2)
        with pytest.raises(TimeoutError):
            waiting.recv(1)


def test_the_command_says_what_is_wrong_with_names_and_pages_before_it_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from glm4lite.cli.app import main

    for arguments, found in (
        (["--allow-origin", "*"], "allowed origin '*'"),
        (["--allow-host", "a:1"], "allowed host"),
    ):
        monkeypatch.setattr(sys, "argv", ["glm4lite", "serve", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        error = capsys.readouterr().err
        assert found in error
        assert error.count("\n") == 1


@pytest.mark.slow
def test_the_command_answers_from_its_start_on() -> None:
    with Address(port=0).listen() as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "glm4lite", "serve", "--port", str(port), "--alias", "gpt-4o"]
    statuses = list[int]()
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 60
            while time.monotonic() < end and (not statuses or statuses[-1] != 200):
                try:
                    statuses.append(httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code)
                except httpx.ConnectError:
                    assert not statuses, "it was not reachable any more"
            assert set(statuses) == {503, 200}
            cards = httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"]
            assert [card["id"] for card in cards] == ["nano", "gpt-4o"]
        finally:
            process.send_signal(2)
            assert process.wait(20) == 0
