"""Whose the streams are: stdout is the answer's alone, closed and full ones are told, an odd system is one line."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from glm4lite.base.errors import ConfigError
from glm4lite.cli import failures, startup
from glm4lite.cli.streams import OutputError
from tests.commands import forked

PRINTING = '''
import ctypes, os, signal, subprocess, sys
from glm4lite import tool

print("IMPORTED")
os.write(1, b"BYTES\\n")

@tool
def get_weather(city: str) -> str:
    """Current weather in a city.

    Args:
        city: City name.
    """
    print("FETCHING \\x1b[31m", city)
    print("AGAIN", file=sys.__stdout__, flush=True)
    subprocess.run(["echo", "CHILD"])
    ctypes.CDLL(None).puts(b"LIBRARY")
    seen = sys.stdin.read()
    sys.stdout.close()
    sys.stderr.close()
    os.chdir("/")
    return f"18 degrees and sunny in {city}{seen}"
'''
SAID = ("IMPORTED", "BYTES", "FETCHING \x1b[31m Lisbon", "AGAIN", "CHILD", "LIBRARY")
HI = '"$@" chat --quant none --no-tools -p Hi --max-new-tokens 3'
Capture = pytest.CaptureFixture[str]
posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")


def shell(
    script: str,
    *flags: str,
    stdin: bytes = b"",
    cwd: Path | None = None,
    fresh: bool = False,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """`script` in a shell, where "$@" is the command. fresh: an interpreter of its own, as with flags."""
    start = [sys.executable, *flags, "-m", "glm4lite"] if fresh or flags else forked()
    command = ["sh", "-c", script, "sh", *start]
    inherited = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env=inherited | dict(environment or {}),
        timeout=240,
        check=False,
    )


def check(done: subprocess.CompletedProcess[bytes], code: int) -> None:
    shown = done.stderr.decode("utf-8", "replace")
    assert done.returncode == code, shown
    for word in ("Traceback", "Exception ignored", "Errno"):
        assert word not in shown


@posix
def test_what_a_tool_prints_by_any_way_is_not_on_stdout(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PRINTING)
    command = '"$@" chat --tools mine.py --no-tools --json -p "How is the weather in Lisbon?"'
    done = shell(command, stdin=b"\n", cwd=tmp_path)
    check(done, 0)
    found = [json.loads(line) for line in done.stdout.decode().splitlines()]
    (result,) = (event for event in found if event["type"] == "tool_result")
    assert result["content"] == "18 degrees and sunny in Lisbon"
    assert found[-1]["type"] == "done"
    for text in SAID:
        assert text in done.stderr.decode(), text


@posix
def test_at_a_terminal_a_line_is_edited_and_what_a_tool_prints_is_not_obeyed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PRINTING.replace("sys.stdin.read()", '""'))
    ours, theirs = os.openpty()
    command = [*forked(), "chat", "--tools", str(tmp_path / "mine.py"), "--no-tools"]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "0"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    seen, typed, deadline = "", False, time.monotonic() + 200
    while "18 degrees" not in seen and time.monotonic() < deadline:
        seen += os.read(ours, 65536).decode("utf-8", "replace")
        if not typed and "\n> " in seen.replace("\r", ""):
            os.write(ours, b"How is the weather in Oslo?" + b"\x08" * 5 + b"Lisbon?\n")  # Backspace
            typed = True
    process.kill()
    process.wait()
    os.close(ours)
    assert "FETCHING \ufffd[31m Lisbon" in seen, seen
    assert "\x1b[31m" not in seen


@posix
@pytest.mark.parametrize(
    ("script", "code", "out", "err"),
    [
        ('"$@" chat --no-tools <&-', 2, "", "stdin is empty"),
        pytest.param(f"{HI} <&- 2>/dev/full", 0, "Hello", "", marks=pytest.mark.slow),
        (f"{HI} >&- 2>&-", 0, "", ""),
        (f"{HI} > /dev/full", 2, "", "error: stdout: No space left on device"),
        (f"{{ {HI}; echo code $? >&2; }} | true", 0, "", "code 141"),
        ('"$@" info > /dev/full', 2, "", "error: stdout: No space left on device"),
        pytest.param('"$@" plan nano --json 2>&- <&-', 0, '"fits"', "", marks=pytest.mark.slow),
        ('"$@" --help > /dev/full', 2, "", "error: stdout: No space left on device"),
        ('{ "$@" --help; echo code $? >&2; } | true', 0, "", "code 141"),
        ('"$@" --version >&- <&- 2>&-', 0, "", ""),
    ],
)
def test_a_stream_that_is_closed_full_or_left_is_no_traceback(script: str, code: int, out: str, err: str) -> None:
    done = shell(script, fresh="&-" in script)  # Python itself opens the streams
    check(done, code)
    assert out in done.stdout.decode()
    assert err in done.stderr.decode()


@posix
def test_a_server_runs_without_any_stream() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = f'exec "$@" serve --port {port} <&- >&- 2>&-'
    server = subprocess.Popen(["sh", "-c", script, "sh", sys.executable, "-m", "glm4lite"])
    try:
        deadline = time.monotonic() + 120
        answer = b""
        while not answer.startswith(b"HTTP/1.1 200") and time.monotonic() < deadline and server.poll() is None:
            time.sleep(0.1)  # it listens, and says 503, while the model is loaded
            try:
                with socket.create_connection(("127.0.0.1", port), 60) as client:
                    client.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                    answer = client.recv(100)
            except OSError:
                continue
        assert answer.startswith(b"HTTP/1.1 200")
    finally:
        server.kill()
        server.wait()


ODD = {
    "HOME": "/nonexistent",
    "TMPDIR": "/nonexistent",
    "TZ": "Nowhere/../x",
    "HF_TOKEN": "tökén",
    "HTTP_PROXY": "garbage",
    "HTTPS_PROXY": "socks9://x",
    "ALL_PROXY": "::::",
    "COLUMNS": "²",
    "TERMINAL_WIDTH": "abc",
    "LINES": "-1",
    "FORCE_COLOR": "1",
    "TERM": "unknown",
    "OMP_NUM_THREADS": "abc",
    "PYTHONWARNINGS": "error",
}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
@posix
def test_an_odd_environment_changes_nothing() -> None:
    done = shell('"$@" chat -p "What is 37 * 24?"', "-OO", environment=ODD)
    check(done, 0)
    assert "888" in done.stdout.decode()
    assert "calculator" in done.stderr.decode()
    assert "python -OO removed the docstrings" in done.stderr.decode()


@posix
def test_a_prompt_is_read_as_utf8_in_any_locale() -> None:
    def length(environment: Mapping[str, str]) -> int:
        done = shell('"$@" chat --quant none --no-tools --json -p 你好 --max-new-tokens 3', environment=environment)
        check(done, 0)
        return int(json.loads(done.stdout.splitlines()[-1])["prompt_tokens"])

    assert length(ASCII) == length({})


@posix
@pytest.mark.parametrize("environment", [ASCII, {}])
def test_an_argument_that_is_not_utf8_is_one_line(environment: dict[str, str]) -> None:
    done = shell('"$@" chat -p "$(printf "caf\\351")"', environment=environment)
    check(done, 2)
    assert "error: the argument 'caf?' is not UTF-8" in done.stderr.decode()


@posix
@pytest.mark.parametrize("verb", ["chat -p Hi", "quantize nano out"])
def test_a_folder_that_was_deleted_is_one_line(verb: str, tmp_path: Path) -> None:
    gone = shlex.quote(str(tmp_path / "gone"))
    done = shell(f'mkdir {gone}; cd {gone}; rmdir {gone}; "$@" {verb}', fresh=True)
    check(done, 2)
    assert done.stderr.decode().startswith("error: the current folder cannot be used")


@posix
@pytest.mark.parametrize("columns", ["0", "-1", "³"])
def test_help_is_drawn_at_a_width_that_is_none(columns: str) -> None:
    environment = dict.fromkeys(("COLUMNS", "TERMINAL_WIDTH", "LINES"), columns)
    done = shell('"$@" chat --help', environment=environment)
    check(done, 0)
    assert "--no-tools" in done.stdout.decode()


@pytest.mark.parametrize(("value", "kept"), [("0", False), ("19", False), ("20", True), ("300", True), ("", False)])
def test_a_width_below_20_is_unknown(value: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_terminal_columns", lambda: 100)
    monkeypatch.setenv("COLUMNS", value)
    startup._settle_width()
    assert os.environ.get("COLUMNS") == (value if kept else None)


def test_a_terminal_of_no_width_has_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_terminal_columns", lambda: 0)
    monkeypatch.delenv("COLUMNS", raising=False)
    startup._settle_width()
    assert os.environ.pop("COLUMNS") == "80"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("no\x1b[2J\nsuch"), 2, r"error: no�\[2J such"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: Permission denied: /x"),
        (MemoryError(), 2, "error: memory ran out"),
        (RuntimeError("can't start new thread"), 2, r"error: the system allows no more threads .*"),
        (ImportError("No module named 'rich'"), 2, r"error: glm4lite is not installed completely: .*"),
        (OutputError(OSError(errno.ENOSPC, "No space left on device")), 2, "error: stdout: No space left on device"),
        (OutputError(BrokenPipeError(errno.EPIPE, "Broken pipe")), 141, ""),
        (KeyError("x"), 1, r"error: this is a bug in glm4lite; please report it with (.*\.traceback): KeyError: 'x'"),
    ],
)
def test_a_failure_is_one_line(
    error: Exception,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert failures.told(error) == code
    found = re.fullmatch(said + "\n" if said else "", capsys.readouterr().err)
    assert found
    if found.groups():
        assert "KeyError" in Path(found[1]).read_text()


VERBS = {
    "chat": "chat -p Hi --max-new-tokens 3",
    "generate": "generate -p Hi --max-new-tokens 3",
    "quantize": "quantize nano {folder}/out --fast",
    "export": "export nano {folder}/out --to hf",
    "info": "info nano",
    "plan": "plan nano",
    "bench": "bench nano --prompt-tokens 32 --new-tokens 4",
    "eval": "eval nano --text {folder}/text --windows 1",
    "serve": "serve --help",
    "ui": "ui --help",
}


@posix
@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", "| true"])
def test_no_command_meets_a_stream_with_a_traceback(verb: str, redirection: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("It was the best of times, it was the worst of times. " * 20)
    written = (
        "" if verb in ("quantize", "export") else redirection
    )  # its result is a folder: nothing is written to stdout
    done = shell(f'"$@" {VERBS[verb].format(folder=shlex.quote(str(tmp_path)))} {redirection}', fresh=True)
    check(done, 2 if written == ">/dev/full" else 0)
