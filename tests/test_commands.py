"""A process that tests/commands forks is what the same command begun anew would be; what cannot be is begun anew."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import python

if not sys.platform.startswith("linux"):
    pytest.skip("nothing is forked here", allow_module_level=True)

TELLS = """
import json, os, signal, sys
json.dump({
    "arguments": sys.argv, "flags": list(sys.flags), "folder": os.getcwd(), "path": sys.path[0],
    "variables": {name: value for name, value in os.environ.items() if name not in ("LINES", "COLUMNS")},
    "streams": [stream and [stream.fileno(), stream.encoding, stream.errors, stream.isatty(), stream.line_buffering]
                for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "descriptors": [number for number in range(3, 200) if os.path.exists(f"/proc/self/fd/{number}")
                    and os.readlink(f"/proc/self/fd/{number}").startswith("/") and "/proc/" not in
                    os.readlink(f"/proc/self/fd/{number}")],
    "ignored": [number for number in range(1, 32) if signal.getsignal(number) == signal.SIG_IGN],
    "read": sys.stdin and sys.stdin.read(),
}, sys.stdout, indent=1)
"""


def told(start: list[str], shell: str, folder: Path) -> str:
    command = ["sh", "-c", shell, "sh", *start, "-c", TELLS, "one", "zwei ü"]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "HF_HOME": "/x"}, input="in", capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("shell", ['exec "$@"', 'exec "$@" <&-', 'exec "$@" 2>&-', "trap '' INT; exec \"$@\""])
def test_it_has_the_arguments_variables_folder_streams_and_signals_it_was_given(shell: str, tmp_path: Path) -> None:
    assert told(python(), shell, tmp_path) == told([sys.executable], shell, tmp_path)


@pytest.mark.parametrize(
    ("code", "status"),
    [("raise SystemExit(7)", 7), ("raise SystemExit('no')", 1), ("1 / 0", 1), ("", 0)]
    + [(f"import os; os.kill(os.getpid(), {number})", -number) for number in (signal.SIGTERM, signal.SIGKILL)],
)
def test_it_ends_as_it_would(code: str, status: int) -> None:
    assert subprocess.run([*python(), "-c", code], capture_output=True, check=False).returncode == status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_it_gets_the_signals_that_are_sent(number: int) -> None:
    code = "import os, signal, time; signal.signal(1, signal.SIG_DFL); print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen([*python(), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(60) == -number
        assert process.stdout.read() == b""  # which ends when all that write to it have ended
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


def preloaded(start: list[str], *flags: str, limit: Callable[[], None] | None = None, **variables: str) -> bool:
    """Whether what begins so was forked."""
    environment = os.environ | variables
    command = [*start, *flags, "-c", "import sys; print('torch' in sys.modules)"]
    done = subprocess.run(command, env=environment, preexec_fn=limit, capture_output=True, check=True)
    return done.stdout == b"True\n"


def lower_limits() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))


def test_only_what_would_start_alike_is_forked() -> None:
    start = python()
    assert preloaded(start)
    assert preloaded(start, HF_HUB_OFFLINE="1", TERM="dumb", HOME="/")
    assert preloaded(start, GRADIO_SHARE="False", TORCHINDUCTOR_CACHE_DIR="/tmp/x")  # as libraries set them
    assert not preloaded(start, "-O")
    assert not preloaded(start, PYTHONHASHSEED="0")
    assert not preloaded(start, LC_ALL="C")
    assert not preloaded(start, OMP_NUM_THREADS="1")
    assert not preloaded(start, limit=lower_limits)


def test_what_the_first_test_to_run_a_command_has_set_is_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as set_meanwhile:
        set_meanwhile.setenv("PYTHONPATH", "/elsewhere")
        set_meanwhile.setenv("LC_ALL", "C")
        start = python.__wrapped__()
        assert not preloaded(start)
    assert preloaded(start)
