"""Clients that keep a connection and send or read nothing: they are let go, and the others are answered."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from glm4lite.server.connection import Connection
from tests.glm4lite.served import Served, endless, scripted, served, wait_for

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HELLO = json.dumps({"model": "nano", "messages": [{"role": "user", "content": "Hello"}], "stream": True}).encode()
Connect = Callable[[], socket.socket]


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_s", 0.3)
    monkeypatch.setattr(Connection, "body_s", 0.4)
    monkeypatch.setattr(Connection, "read_s", 0.5)
    monkeypatch.setattr(Connection, "most", 12)
    monkeypatch.setattr("glm4lite.server.launch.KEEP_ALIVE_S", 0.5)


@pytest.fixture
def server(limits: None) -> Iterator[Served]:
    with served(scripted(*["\nHi.<|user|>"] * 50)) as running:
        yield running


@pytest.fixture
def connect(server: Served) -> Iterator[Connect]:
    opened = list[socket.socket]()

    def open_one() -> socket.socket:
        opened.append(socket.create_connection((server.http.base_url.host, server.http.base_url.port), timeout=5))
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.close()


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    got = b""
    try:
        while data := connection.recv(65536):
            got += data
    except ConnectionResetError:
        return got
    return got


def test_a_connection_that_says_nothing_is_closed(connect: Connect) -> None:
    started = time.monotonic()
    assert read_all(connect()) == b""
    assert 0.2 < time.monotonic() - started < 20


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["first", "second"])
def test_a_header_that_trickles_is_a_408(connect: Connect, server: Served, before: bytes) -> None:
    connection = connect()
    connection.sendall(before)
    answers = list[bytes]()
    reading = threading.Thread(target=lambda: answers.append(read_all(connection)))
    reading.start()
    for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 40:
        try:
            connection.send(bytes([byte]))
        except OSError:
            break
        time.sleep(0.02)
    reading.join(5)
    statuses = re.findall(rb"HTTP/1.1 (\d+)", answers[0])
    assert statuses == ([b"200"] if before else []) + [b"408"]
    assert server.http.get("/health").status_code == 200


def test_a_body_that_trickles_is_a_408_and_holds_nothing(connect: Connect, server: Served) -> None:
    connection = connect()
    connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
    answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert server.http.get("/health").json()["waiting"] == 0


def test_a_slow_answer_is_no_slow_client(limits: None) -> None:
    with served(endless(pause=0.05)) as server:
        body = {**json.loads(HELLO), "max_tokens": 30, "stream": False}
        started = time.monotonic()
        assert server.post("/v1/chat/completions", body).status_code == 200
        assert time.monotonic() - started > 1  # longer than all the limits
        with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
            assert "data: [DONE]" in list(stream.iter_lines())


def test_a_client_that_does_not_read_its_stream_stops_its_answer(limits: None) -> None:
    with served(endless(pause=0)) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for listening in server.server.servers:
            for one in listening.sockets:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.connect((server.http.base_url.host, server.http.base_url.port))
        body = HELLO[:-1] + b', "logprobs": true, "top_logprobs": 20}'
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: server.worker.state().running == 1)
        wait_for(lambda: server.worker.state().running == 0)
        assert server.worker.state().cancelled == 1


def test_more_connections_than_allowed_are_refused_and_the_others_answered(connect: Connect, server: Served) -> None:
    assert server.http.get("/health").status_code == 200  # keeps its connection
    idle = [connect() for _ in range(Connection.most)]
    refused = read_all(idle[-1])
    assert refused.startswith(b"HTTP/1.1 503")
    assert server.http.get("/health").status_code == 200
    for connection in idle:
        read_all(connection)
    with httpx.Client(base_url=server.url) as other:
        assert other.get("/health").status_code == 200


def test_a_body_in_chunks_of_one_byte_is_taken_in_small_pieces(
    server: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk costs the event loop some microseconds, in which it answers nobody else."""
    taken = list[int]()
    receive = Connection.data_received

    def counting(self: Connection, data: bytes) -> None:
        taken.append(len(data))
        receive(self, data)

    monkeypatch.setattr(Connection, "data_received", counting)
    monkeypatch.setattr(Connection, "body_s", 30)
    connection = connect()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in HELLO + b" " * 10_000)
    connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert sum(taken) > 60_000
    assert max(taken) <= 16 << 10


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Content-Length: 10\r\nContent-Length: 20\r\n", b"400"),
        (b"Content-Length: -1\r\n", b"400"),
        (b"Content-Length: 1e3\r\n", b"400"),
        (b"".join(b"X-%d: a\r\n" % n for n in range(4000)), b"4"),
        (b"X-Long: " + b"a" * 100_000 + b"\r\n", b"4"),
    ],
    ids=["two lengths", "negative", "no number", "many headers", "long header"],
)
def test_headers_that_lie_or_have_no_end_are_refused(
    connect: Connect, server: Served, headers: bytes, status: bytes
) -> None:
    connection = connect()
    connection.sendall(HEAD + headers + b"\r\n" + HELLO)
    assert read_all(connection).split()[1].startswith(status)
    assert server.http.get("/health").status_code == 200
