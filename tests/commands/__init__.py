"""Processes for tests, with streams, signals and exit codes of their own, for which torch was imported once.

Importing torch takes most of a short command's time. `python()` stands for `sys.executable` before `-m glm4lite` or
`-c CODE`, `forked()` for both before a command's arguments: a small program (client.py) that gives its arguments,
environment, folder and streams to a process that has imported all that `glm4lite chat` imports (server.py), which forks
for it. What is forked cannot show how a command starts, ends its interpreter or closes streams that it never had: tests
of that, and of limits, flags and namespaces, take `FRESH`.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

FRESH = [sys.executable, "-m", "glm4lite"]
_HERE = Path(__file__).parent
# The server is begun by whichever test asks first; what that test has set is not to be every other's.
_ENVIRONMENT = dict(os.environ)


def forked() -> list[str]:
    """What stands before the arguments of a `glm4lite` command."""
    return [*python(), "-m", "glm4lite"]


@functools.cache
def python() -> list[str]:
    """A Python that has imported what a chat needs, for `-m glm4lite` and `-c CODE`."""
    if not sys.platform.startswith("linux"):
        return [sys.executable]
    folder = tempfile.mkdtemp(prefix="glm4lite-commands-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = f"{folder}/socket"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.commands.server", str(listening.fileno()), os.pathsep.join(sys.path)],
        pass_fds=[listening.fileno()],
        cwd=_HERE.parents[1],
        env=_ENVIRONMENT,
        stdin=subprocess.PIPE,  # which closes with this process, however that ends
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    listening.close()
    atexit.register(_end, server)
    # -I and -S: what the tests' environment holds is for the command, and nothing but the standard library is needed
    return [sys.executable, "-I", "-S", str(_HERE / "client.py"), path]


def run(
    *arguments: str | Path, stdin: str = "", cwd: Path | None = None, seconds: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`glm4lite` with these arguments; the variables are added to the environment."""
    return subprocess.run(
        [*forked(), *map(str, arguments)],
        input=stdin,
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def _end(server: subprocess.Popen[bytes]) -> None:
    server.kill()
    server.wait()
