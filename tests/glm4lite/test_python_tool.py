"""Code of a model in real processes: what it cannot see, what it cannot take, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import threading
import time
from pathlib import Path

import pytest

from glm4lite.base.errors import ToolError
from glm4lite.text.messages import ToolCall
from glm4lite.tools.python import python
from glm4lite.tools.running import nobody_to_ask, run_tool
from glm4lite.tools.sandbox.process import Limits, Outcome, run_python

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="the sandbox needs POSIX"),
    pytest.mark.usefixtures("missing"),
]


@pytest.fixture(scope="module")
def missing() -> tuple[str, ...]:
    """What this system cannot limit; tests of it skip and say so."""
    try:
        return run_python("").missing
    except ToolError as error:
        pytest.skip(str(error))


@pytest.fixture
def isolated(missing: tuple[str, ...]) -> None:
    if "network" in missing:
        pytest.skip("no namespaces on this system")


@pytest.fixture
def confined(missing: tuple[str, ...]) -> None:
    if "reading files" in missing:
        pytest.skip("no Landlock on this system")


def run(code: str, seconds: float = 10, **limits: int) -> Outcome:
    return run_python(code, Limits(seconds=seconds, **limits))


def processes_with(marker: str) -> list[str]:
    """Processes of this machine whose command line holds `marker`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in entry.read_bytes():
                found.append(entry.parent.name)
        except OSError:
            continue
    return found


def test_what_is_printed_comes_back_with_text_of_any_language() -> None:
    assert run("print(6 * 7)\nprint('你好')") == Outcome("42\n你好\n", "", run("").missing)


def test_an_exception_is_its_traceback() -> None:
    outcome = run("x = 1\nx / 0")
    assert outcome.failure == "ended with status 1"
    assert "line 2" in outcome.output
    assert "ZeroDivisionError" in outcome.output


def test_the_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    assert "secret-token" not in run("import os; print(dict(os.environ))").output


@pytest.mark.usefixtures("confined")
def test_the_environment_of_other_processes_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"print(open('/proc/{os.getpid()}/environ').read())"
    assert "PermissionError" in run(code).output or "FileNotFoundError" in run(code).output


@pytest.mark.usefixtures("confined")
def test_the_users_files_cannot_be_read_or_written(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("my secret")
    outcome = run(f"print(open({str(secret)!r}).read())")
    assert re.search("PermissionError|FileNotFoundError", outcome.output)
    assert "my secret\n" not in outcome.output
    assert re.search("PermissionError|FileNotFoundError", run(f"open({str(tmp_path / 'new')!r}, 'w')").output)
    assert not (tmp_path / "new").exists()


def test_the_work_folder_is_its_own_and_goes_away() -> None:
    outcome = run(
        "import os\nopen('a', 'w').write('x')\nos.makedirs('d/e')\nopen('d/e/f', 'w')\nos.chmod('d/e', 0)\n"
        "os.chmod('d', 0)\nprint(os.getcwd())\nprint(os.environ['TMPDIR'] == os.getcwd())"
    )
    folder, is_temporary = outcome.output.split()
    assert (is_temporary, outcome.failure) == ("True", "")
    assert Path(folder).parents[1] == Path(tempfile.gettempdir())
    assert not Path(folder).exists()


def test_a_link_in_the_work_folder_leaves_its_target_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    run(f"import os\nos.symlink({str(tmp_path)!r}, 'link')")
    assert tmp_path.stat().st_mode & 0o777 == 0o500


def test_stdin_is_at_its_end() -> None:
    assert "EOFError" in run("input()").output


@pytest.mark.usefixtures("isolated")
def test_the_network_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        tcp = run(f"import socket\nsocket.create_connection({address!r}, 2)")
        udp = run("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))")
    assert "PermissionError" in tcp.output, tcp.output
    assert "PermissionError" in udp.output, udp.output


def test_a_program_that_does_not_end_is_ended() -> None:
    started = time.monotonic()
    outcome = run("import time\nprint('begun', flush=True)\ntime.sleep(60)", seconds=0.6)
    assert outcome.output == "begun\n"
    assert outcome.failure == "stopped: it ran longer than 0.6 s"
    assert time.monotonic() - started < 5


def test_processor_time_is_limited() -> None:
    outcome = run("while True: pass", cpu_seconds=1)
    assert "CPU" in outcome.failure


@pytest.mark.parametrize(
    "leave", ["", "os.setsid()\n", "os.setsid()\nif os.fork(): os._exit(0)\n"], ids=["child", "session", "daemon"]
)
@pytest.mark.parametrize("waits", [True, False], ids=["timeout", "end"])
@pytest.mark.usefixtures("isolated")
def test_no_process_it_started_stays(leave: str, waits: bool) -> None:
    """Also not one that left the process group, whether the code is ended or ends."""
    marker = f"marker-{os.getpid()}-{time.monotonic_ns()}"
    start = f"os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', {marker!r}])"
    child = f"{leave}{start}".replace("\n", "\n    ")
    wait = "time.sleep(60)" if waits else "time.sleep(0.3)"
    outcome = run(f"import os, sys, time\nif os.fork() == 0:\n    {child}\n{wait}", seconds=1)
    assert ("longer" in outcome.failure) == waits
    deadline = time.monotonic() + 5
    while processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_with(marker) == []


def test_memory_is_limited() -> None:
    assert "MemoryError" in run("x = bytearray(2 << 30)").output
    outcome = run("x = []\nwhile True: x.append(bytearray(1 << 20))", memory=256 << 20)
    assert "MemoryError" in outcome.output


@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize("memory", ["bytearray(30 << 20)", "mmap.mmap(-1, 30 << 20)"])
def test_the_memory_of_all_processes_together_is_limited(memory: str) -> None:
    """Each of them stays below its own limit; also memory that is shared, and of children of children."""
    fork = "import mmap, os, time\nos.fork(); os.fork(); os.fork()\n"
    code = f"{fork}kept = {memory}\nkept[:] = bytes(30 << 20)\ntime.sleep(20)"
    outcome = run(code, total_memory=150 << 20)
    assert "together took more than 150 MiB" in outcome.failure


def test_a_fork_bomb_is_bounded_and_ends() -> None:
    code = "import os\nmade = 0\nwhile True:\n    try: made += os.fork() > 0\n    except OSError: break\nprint(made)"
    outcome = run(code, seconds=3)
    assert max(map(int, outcome.output.split()), default=0) <= 32


def test_the_size_of_files_is_limited() -> None:
    outcome = run("f = open('big', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))", file=4 << 20)
    assert "File too large" in outcome.output or "SIGXFSZ" in outcome.failure


def test_all_files_together_are_limited(missing: tuple[str, ...]) -> None:
    if "space on disk" in missing:
        pytest.skip("no file system of its own on this system")
    code = "for n in range(20): open(str(n), 'wb').write(bytes(1 << 20))"
    assert "No space left" in run(code, disk=8 << 20).output


def test_a_flood_of_output_is_cut_and_ended() -> None:
    outcome = run("while True: print('x' * 1000)")
    assert "printed more than" in outcome.failure
    assert len(outcome.output) <= Limits().output


def test_rights_cannot_be_gained_back() -> None:
    code = (
        "import os\n"
        "for attempt in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.chroot('.')):\n"
        "    try: attempt(); print('gained', os.getuid())\n"
        "    except OSError: print('refused')\n"
    )
    outcome = run(code)
    assert outcome.output.count("refused") >= (3 if os.getuid() == 0 else 1)


def call(code: str) -> ToolCall:
    return ToolCall("call_1", "python", json.dumps({"code": code}))


def test_the_tool_asks_always_and_is_off_where_nobody_answers() -> None:
    result = run_tool(python, call("print(1)"), approve=nobody_to_ask)
    assert result.error
    assert "nobody to ask" in result.content
    assert run_tool(python, call("print(1)"), approve=lambda *_: True).content.startswith("1")


def test_a_failure_is_told_with_its_lines() -> None:
    result = run_tool(python, call("1 / 0"), approve=lambda *_: True)
    assert result.error
    assert result.content.startswith("Error: ended with status 1\nTraceback")


def test_silence_is_told_to_the_model() -> None:
    assert "nothing was printed" in run_tool(python, call("1 + 1"), approve=lambda *_: True).content


@pytest.mark.parametrize("end", ["cancel", "timeout"])
def test_a_call_that_is_given_up_ends_its_process(end: str) -> None:
    marker = f"marker-{os.getpid()}-{time.monotonic_ns()}"
    cancel = threading.Event()
    if end == "cancel":
        threading.Timer(0.5, cancel.set).start()
    sleeper = f"[sys.executable, '-c', 'import time; time.sleep(60)', {marker!r}]"
    code = f"import os, sys\nos.execv(sys.executable, {sleeper})"
    result = run_tool(python, call(code), timeout_s=0.7, cancel=cancel, approve=lambda *_: True)
    assert result.error
    deadline = time.monotonic() + 5
    while processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_with(marker) == []
