"""`glm4lite batch`: OpenAI's batch files with a real model, in real processes that are interrupted and killed."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from glm4lite.base.errors import ConfigError, DeviceError
from glm4lite.cli.batch_results import opened
from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite.server.batch.lines import LINE_LIMIT, Request, lines, requests
from glm4lite.server.batch.local import LocalModel
from glm4lite.server.batch.running import results
from glm4lite.server.replies import JSON
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from tests.commands import FRESH, forked, run
from tests.glm4lite.served import endless, scripted, served, wait_for

TOOLS = [tool.schema() for tool in BUILTIN_TOOLS]


def asked(custom_id: object, body: object, url: object = "/v1/chat/completions", method: object = "POST") -> JSON:
    return {"custom_id": custom_id, "method": method, "url": url, "body": body}


def chat(text: str = "Hello", **more: Any) -> JSON:
    return {"model": "nano", "messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def completion(prompt: str, tokens: int) -> JSON:
    return {"model": "nano", "prompt": prompt, "temperature": 0, "max_tokens": tokens}


def write(path: Path, found: list[JSON]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in found))
    return path


def read(path: Path) -> list[JSON]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def said(result: JSON) -> Any:
    """What of a result is the same at every run, in plain torch too, whose sums differ a little."""
    response = result["response"]
    if response is None:
        return result["error"]
    body = response["body"]
    for choice in body.get("choices", ()):
        for call in choice.get("message", {}).get("tool_calls", ()):
            call.pop("id")
        for token in (choice["logprobs"] or {}).get("content", ()):
            token["logprob"] = round(token["logprob"], 3)
            token["top_logprobs"] = [one["token"] for one in token["top_logprobs"]]
    return response["status_code"], body.get("choices"), body.get("error")


def by_id(found: list[JSON]) -> dict[str, Any]:
    assert len({one["custom_id"] for one in found}) == len(found)
    return {one["custom_id"]: said(one) for one in found}


def many(count: int, tokens: int) -> list[JSON]:
    """Requests that a run takes a while for, each with an answer of its own."""
    return [asked(f"r{n}", completion(f"{n} " * (n % 7 + 1), tokens), "/v1/completions") for n in range(count)]


def test_a_file_of_requests_becomes_a_file_of_what_the_server_would_answer(tmp_path: Path) -> None:
    given = [
        asked("plain", {**chat(), "max_completion_tokens": 50}),
        asked("calls", chat("What is 37 * 24?", tools=TOOLS)),
        asked("scores", chat("Who are you?", logprobs=True, top_logprobs=2)),
        asked("text", completion("Once upon", 9), "/v1/completions"),
        asked("中文", chat("你好")),
    ]
    source = write(tmp_path / "in.jsonl", given)
    done = run("batch", source, tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "5 of 5 requests done, 0 errors" in done.stderr
    found = read(tmp_path / "out.jsonl")
    for one in found:
        assert one.keys() == {"id", "custom_id", "response", "error"}
        assert one["response"].keys() == {"status_code", "request_id", "body"}
        assert (one["response"]["status_code"], one["error"]) == (200, None)
        kind = Completion if one["custom_id"] == "text" else ChatCompletion
        kind.model_validate(one["response"]["body"], strict=True)
    assert len({one["id"] for one in found} | {one["response"]["request_id"] for one in found}) == 10
    with served(Engine.load("nano", device="cpu")) as server:
        answers = {one["custom_id"]: server.post(one["url"], one["body"]).json() for one in given}
    expected = {name: said({"response": {"status_code": 200, "body": body}}) for name, body in answers.items()}
    assert by_id(found) == expected


def test_a_run_that_was_killed_goes_on_and_each_request_is_answered_once(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", many(60, 60))
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    with subprocess.Popen([*FRESH, "batch", source, out], stderr=subprocess.DEVNULL) as command:
        wait_for(lambda: out.exists() and out.read_bytes().count(b"\n") >= 5, 60)
        command.kill()
    assert command.returncode == -signal.SIGKILL
    before = out.read_bytes()
    count = before.count(b"\n")
    assert count < 60
    rest = run("batch", source, out, "--parallel", "7")
    assert rest.returncode == 0, rest.stderr
    assert f"holds {count} results" in rest.stderr
    assert out.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert run("batch", source, whole, "--parallel", "1").returncode == 0
    assert by_id(read(out)) == by_id(read(whole))
    assert len(read(out)) == 60


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", many(60, 60)), tmp_path / "out.jsonl"
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)):
        with subprocess.Popen([*forked(), "batch", source, out], stderr=subprocess.PIPE, text=True) as command:
            begun = out.stat().st_size if out.exists() else 0
            wait_for(lambda begun=begun: out.exists() and out.stat().st_size > begun, 60)  # type: ignore[misc]
            command.send_signal(number)
            _, errors = command.communicate(timeout=60)
        assert command.returncode == code
        assert "the same command goes on from here" in errors.splitlines()[-1]
        assert "Traceback" not in errors
    assert out.read_bytes().endswith(b"\n")
    assert len(by_id(read(out))) < 60


def test_what_is_wrong_with_a_line_is_its_own_answer(tmp_path: Path) -> None:
    long = chat("word " * 5000)
    bad: dict[str, tuple[Any, int | str, str]] = {  # what, the status or code, what the message says
        "stream": (asked("stream", chat(stream=True)), 400, "stream: true is not supported"),
        "long": (asked("long", long), 400, "context"),
        "model": (asked("model", {**chat(), "model": "gpt-4o-mini"}), 404, "'gpt-4o-mini' does not exist"),
        "url": (asked("url", chat(), "/v1/embeddings"), 404, "url: '/v1/embeddings'"),
        "no url": ({"custom_id": "no url", "method": "POST", "body": chat()}, 404, "url: None"),
        "method": (asked("method", chat(), method="GET"), 405, "method: must be 'POST'"),
        "body": (asked("body", [chat()]), 400, "body: must be a JSON object"),
        "field": (asked("field", chat(temperature=9)), 400, "temperature"),
        "grammar": (asked("grammar", chat(grammar="x")), 400, "grammar: 'x' is not supported"),
        "ids": (asked("ids", {"model": "nano", "prompt": [10**9]}, "/v1/completions"), 400, "is no token"),
        "no id": ({"method": "POST", "url": "/v1/completions", "body": {}}, "invalid_custom_id", "found None"),
        "number": (asked(7, chat()), "invalid_custom_id", "found 7"),
        "half": (asked("\ud800", chat()), "invalid_custom_id", "custom_id must be text"),
        "endless": (asked("x" * 513, chat()), "invalid_custom_id", "1 to 512"),
        "list": ([1, 2], "invalid_json_line", "must be a JSON object, found list"),
        "again": (asked("first", chat()), "duplicate_custom_id", "'first' is that of line 1"),
    }
    given = [asked("first", chat()), *(one for one, _, _ in bad.values()), asked("last", chat())]
    source, out = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    done = run("batch", source, out)
    assert done.returncode == 3, done.stderr
    assert f"18 of 18 requests done, {len(bad)} errors" in done.stderr
    assert done.stderr.count("(the first error, ") == 1
    found = {one["custom_id"] or one["error"]["line"]: one for one in read(out)}
    for place, (name, (_, code, message)) in enumerate(bad.items(), 2):
        if isinstance(code, int):
            response = found[name]["response"]
            assert (response["status_code"], found[name]["error"]) == (code, None), name
            text = response["body"]["error"]["message"]
        else:
            assert (found[place]["custom_id"], found[place]["response"]) == (None, None), name
            assert found[place]["error"]["code"] == code
            text = found[place]["error"]["message"]
        assert message in text, name
    assert said(found["first"]) == said(found["last"])
    assert found["last"]["response"]["status_code"] == 200
    before = out.read_bytes()
    again = run("batch", source, out)
    assert again.returncode == 3  # OUT still holds errors
    assert out.read_bytes() == before


def test_odd_bytes_spoil_no_line_but_their_own(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = [json.dumps(asked(f"g{n}", chat())).encode() for n in range(3)]
    odd = '{"custom_id": "a\u2028b\\u0000\u0085", "method": "POST", "url": "/v1/completions", "body": '.encode()
    odd += json.dumps(completion("\u2028", 3)).encode() + b"}"
    pieces = [
        b"\xef\xbb\xbf" + good[0] + b"\r\n",
        b"\n \t \r\n",
        b"\xff\xfe\n",
        b'{"custom_id": "\x00"}\n',
        odd + b"\n",
        b"[" * 100_000 + b"\n",
        b'{"custom_id": "big", "body": "' + b"x" * LINE_LIMIT + b'"}\n',
        b'{"custom_id": NaN}\n',
        good[1] + good[1] + b"\n",
        good[2],
    ]
    source.write_bytes(b"".join(pieces))
    assert run("batch", source, out).returncode == 3
    found = read(out)
    assert len(out.read_bytes().splitlines()) == len(out.read_text().splitlines()) == 9
    errors = {one["error"]["line"]: one["error"]["code"] for one in found if one["error"]}
    assert errors == {4: "invalid_json_line", 5: "invalid_json_line", 7: "invalid_json_line", 8: "line_too_long"} | {
        9: "invalid_json_line",
        10: "invalid_json_line",
    }
    answered = {one["custom_id"] for one in found if one["response"]}
    assert answered == {"g0", "g2", "a\u2028b\0\u0085"}
    assert run("batch", source, out).returncode == 3
    assert read(out) == found


def test_a_pipe_gets_each_answer_before_it_sends_the_next_request() -> None:
    command = subprocess.Popen(
        [*forked(), "batch", "-", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with command:
        assert command.stdin
        assert command.stdout
        for name in ("one", "two"):
            command.stdin.write(json.dumps(asked(name, chat())) + "\n")
            command.stdin.flush()
            assert json.loads(command.stdout.readline())["custom_id"] == name
        rest, errors = command.communicate(timeout=60)
    assert (command.returncode, rest) == (0, "")
    assert "2 requests done, 0 errors" in errors


def test_files_that_cannot_be_meant_are_refused_and_stay_as_they_are(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [asked("a", chat())])
    (tmp_path / "link").symlink_to(source)
    notes = tmp_path / "notes.txt"
    notes.write_text("what I must not forget")
    for out, why in ((source, "both the requests"), (tmp_path / "link", "both"), (notes, "line 1 is no result")):
        before = out.read_bytes()
        refused = run("batch", source, out)
        assert (refused.returncode, out.read_bytes()) == (2, before)
        assert why in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    if Path("/dev/full").exists():
        full = run("batch", source, "/dev/full")
        assert (full.returncode, full.stderr.splitlines()[-1]) == (2, "error: No space left on device")
    missing = run("batch", tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    assert missing.returncode == 2
    assert not (tmp_path / "out.jsonl").exists()


def test_two_runs_never_write_one_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    out = tmp_path / "out.jsonl"
    with opened(str(out)) as first:
        first.write({"custom_id": "a", "response": None, "error": None})
        refused = run("batch", write(tmp_path / "in.jsonl", []), out)
    assert refused.returncode == 2
    assert "is being written by another process" in refused.stderr


def test_names_that_mean_nothing_are_said_once(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [asked(f"{n}", chat(flavour="\x1b[31msweet", colour=n)) for n in range(3)])
    done = run("batch", source, tmp_path / "out.jsonl")
    assert done.returncode == 0
    assert done.stderr.count("bodies hold 'flavour', 'colour'") == 1


@pytest.mark.parametrize("left", range(-12, 0))
def test_a_line_that_was_cut_anywhere_is_dropped(tmp_path: Path, left: int) -> None:
    out = tmp_path / "out.jsonl"
    line = {
        "id": "batch_req_1",
        "custom_id": "a",
        "response": {"status_code": 200, "body": "你好\ud800"},
        "error": None,
    }
    with opened(str(out)) as file:
        file.write(line)
        file.write({**line, "custom_id": "b"})
    whole = out.read_bytes()
    second = whole.index(b"\n") + 1
    cut = [second + 1 + 3 * (left + 12), len(whole) + left]
    for end, zeros in zip(cut, (b"", b"\0" * 9), strict=True):
        out.write_bytes(whole[:end] + (zeros if end < len(whole) - 1 else b""))
        with opened(str(out)) as file:
            assert file.held.has(Request("a", {}))
            if end == len(whole) - 1:  # but for its end, the line is whole
                assert not file.held.cut
                assert file.held.has(Request("b", {}))
            else:
                assert file.held.cut
                assert not file.held.has(Request("b", {}))
                file.write({**line, "custom_id": "b"})
        assert out.read_bytes() == whole


def test_what_was_not_written_here_is_never_cut_off(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for text in ('{"id": "mine"', '{"custom_id": "a"}\n', "x", '{"id": "batch_req_1", "custom\n'):
        out.write_text(text)
        with pytest.raises(ConfigError, match="name another file"), opened(str(out)):
            pass
        assert out.read_text() == text


class Endless(io.RawIOBase):
    """A file of as many bytes as it is asked to hold, of one line each `every` bytes."""

    def __init__(self, size: int, every: int) -> None:
        self.left, self.place, self.every = size, 0, every

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.left, self.every - self.place % self.every)
        buffer[:count] = b"x" * count
        self.left -= count
        self.place += count
        if count and self.place % self.every == 0:
            buffer[count - 1 : count] = b"\n"
        return count


@pytest.mark.parametrize("every", [1000, 1 << 40])
def test_no_more_than_a_line_is_held(every: int) -> None:
    file = io.BufferedReader(Endless(100_000_000, every))
    tracemalloc.start()
    try:
        count = sum(1 for _ in lines(file))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == (100_000 if every == 1000 else 1)
    assert peak < 3 * LINE_LIMIT


def test_as_many_requests_are_under_way_as_may_be_and_none_when_the_run_ends() -> None:
    with closing(EngineWorker(endless(), 6)) as worker:
        begun = list[int]()

        def given() -> Iterator[Request]:
            yield Request("wrong", asked("wrong", chat(), "/nowhere"))
            for number in range(1000):
                begun.append(number)
                yield Request(f"{number}", asked(number, chat()))

        def under_way() -> int:
            state = worker.state()
            return state.running + state.waiting

        with closing(results(LocalModel(worker, "nano", 6), given())) as found:
            assert next(found).line["response"]["status_code"] == 404
            wait_for(lambda: under_way() == 5)  # the sixth is that which the caller has
            time.sleep(0.2)
            assert (under_way(), len(begun)) == (5, 6)
        wait_for(lambda: under_way() == 0)


@pytest.mark.parametrize(("error", "status"), [(DeviceError("memory ran out"), 400), (ZeroDivisionError(), 500)])
def test_an_answer_that_fails_is_an_error_of_its_own(error: Exception, status: int) -> None:
    engine = scripted("one", "two", "three")
    model: Any = engine.model
    step, calls = model.step, list[None]()

    def failing(spans: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise error
        return step(spans)

    model.step = failing
    given = [Request(name, asked(name, chat(max_tokens=1))) for name in "abc"]
    with closing(EngineWorker(engine, 3)) as worker:
        found = {
            one.line["custom_id"]: one.line["response"] for one in results(LocalModel(worker, "nano", 3), iter(given))
        }
    assert {name: one["status_code"] for name, one in found.items()} == {"a": 200, "b": status, "c": 200}
    assert found["b"]["body"]["error"]["message"].startswith(str(error) or "the request failed: ZeroDivisionError")


def test_what_cannot_be_read_ends_the_run() -> None:
    class Broken(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            raise OSError(5, "the disk failed")

    with closing(EngineWorker(scripted(), 3)) as worker, pytest.raises(OSError, match="the disk failed"):
        list(results(LocalModel(worker, "nano", 3), requests(io.BufferedReader(Broken()), 4096)))
