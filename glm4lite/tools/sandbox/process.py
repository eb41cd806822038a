"""Starts the process that runs a model's code (jail.py), collects what it prints, ends it in time."""

import json
import logging
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from glm4lite.base.errors import ToolError, one_line
from glm4lite.base.owned_folder import OwnedFolder, remove_abandoned_temporary, remove_tree
from glm4lite.base.processes import apart, end_tree, tree_bytes

logger = logging.getLogger("glm4lite")

_PREFIX = "glm4lite-python-"
_SCRIPT = Path(__file__).with_name("jail.py")
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")},  # threads count as processes
}
_LOOK_S = 0.05  # between two looks at the memory of all: each asks for every process of the machine
REFUSED = 125  # jail.py's exit status when the code was not run

_REASONS = {"SIGXCPU": "too much CPU time", "SIGKILL": "too much CPU time or memory", "SIGXFSZ": "too large a file"}


@dataclass(frozen=True)
class Limits:
    """What a run may take; sizes in bytes. `memory` and `file` hold for each process and file, `disk` for all files.

    `total_memory` is that of all processes; where they share memory, each counts it.
    """

    seconds: float = 20.0
    cpu_seconds: int = 20
    memory: int = 1 << 30
    total_memory: int = 3 << 30
    file: int = 16 << 20
    disk: int = 64 << 20
    processes: int = 32
    output: int = 64 << 10

    def to_json(self) -> str:
        """For jail.py, with the places of this Python."""
        python = _python_places()
        limits = {"cpu": self.cpu_seconds, "memory": self.memory, "file": self.file, "disk": self.disk}
        return json.dumps({**limits, "processes": self.processes, "python": python})


def _python_places() -> list[str]:
    """Where this Python lies. Not its whole prefix: an environment may be made in a folder that holds more."""
    prefixes = dict.fromkeys((sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix))
    names = ("bin", "lib", "lib64", "pyvenv.cfg", "share/zoneinfo", "ssl")
    places = [os.path.join(prefix, name) for prefix in prefixes for name in names]
    places += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return [sys.executable, *(place for place in places if os.path.exists(place))]


@dataclass(frozen=True)
class Outcome:
    """What the code printed, how it ended ("" when well), and what could not be limited here."""

    output: str
    failure: str
    missing: tuple[str, ...]


def run_python(code: str, limits: Limits | None = None, cancel: threading.Event | None = None) -> Outcome:
    """Run `code` as a Python program with `limits`, until `cancel`; raises ToolError when that is not possible here.

    It sees no environment variables, no stdin and, where the system allows, no network and no files but Python's own.
    Its folder is removed, and every process it started has ended, when this returns.
    """
    if sys.platform == "win32":
        raise ToolError("running code needs the limits for a process that Linux and macOS have; Windows has none")
    with _work_folder() as folder:
        return _Process(code, folder, limits or Limits()).finish(cancel or threading.Event())


class _Process:
    def __init__(self, code: str, folder: Path, limits: Limits) -> None:
        self._limits = limits
        self._printed = bytearray()
        self._flooded = threading.Event()
        reading, writing = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SCRIPT), limits.to_json(), str(writing)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**_ENVIRONMENT, "HOME": str(folder), "TMPDIR": str(folder)},
                pass_fds=[writing],
                **apart(),
            )
        except OSError as error:
            os.close(reading)
            raise ToolError(f"python: no process can be started ({one_line(error)})") from error
        finally:
            os.close(writing)
        self._report = os.fdopen(reading, "rb")
        self._threads = [threading.Thread(target=self._read), threading.Thread(target=self._feed, args=(code,))]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def finish(self, cancel: threading.Event) -> Outcome:
        """Waits for the end, or makes it."""
        try:
            stopped = self._wait(cancel)
        finally:
            self._end()
        with self._report:
            report = self._report.read()
        status = self._process.returncode
        output = bytes(self._printed[: self._limits.output]).decode("utf-8", "replace")
        if not report and not stopped:
            raise ToolError(f"python: the code was not run: {one_line(output)[-500:] or f'status {status}'}")
        return Outcome(output, stopped or _failure(status), tuple(json.loads(report or b"[]")))

    def _wait(self, cancel: threading.Event) -> str:
        """Until it ends; why it must be stopped, if it must."""
        looked = time.monotonic()
        deadline = looked + self._limits.seconds
        while True:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.02)
                return ""
            if self._flooded.is_set():
                return f"stopped: it printed more than {self._limits.output} bytes"
            if time.monotonic() > deadline:
                return f"stopped: it ran longer than {self._limits.seconds:g} s"
            if time.monotonic() > looked + _LOOK_S:
                if tree_bytes(self._process.pid) > self._limits.total_memory:
                    most = self._limits.total_memory >> 20
                    return f"stopped: its processes together took more than {most} MiB of memory"
                looked = time.monotonic()
            if cancel.is_set():
                return "stopped by the user"

    def _end(self) -> None:
        """Kills the group; with it dies the first process of the namespace, and so all that are in it."""
        if self._process.poll() is None:
            end_tree(self._process.pid)
        self._process.wait()
        for thread in self._threads:
            thread.join(2.0)

    def _read(self) -> None:
        pipe = self._process.stdout
        if pipe is None:
            return
        with pipe:
            while chunk := os.read(pipe.fileno(), 65536):
                if len(self._printed) <= self._limits.output:
                    self._printed += chunk
                else:
                    self._flooded.set()

    def _feed(self, code: str) -> None:
        pipe = self._process.stdin
        if pipe is not None:
            with suppress(OSError), pipe:
                pipe.write(code.encode("utf-8", "replace"))


def _failure(status: int) -> str:
    """What an exit status means; 128 + n is how jail.py passes on signal n."""
    if status == 0:
        return ""
    number = -status if status < 0 else status - 128
    if number in signal.valid_signals():
        name = signal.Signals(number).name
        return f"ended by {name}" + (f" ({_REASONS[name]})" if name in _REASONS else "")
    return f"ended with status {status}"


@contextmanager
def _work_folder() -> Iterator[Path]:
    """A new folder, removed afterwards whatever is in it and whoever owns it; so are those of runs that were killed."""
    remove_abandoned_temporary(_PREFIX, _remove)
    owned = OwnedFolder(_PREFIX)
    folder = owned.path / "work"  # the lock is not the code's to see
    try:
        owned.path.chmod(0o711)  # root's code runs as another user
        folder.mkdir(0o700)
        yield folder
    finally:
        owned.discard(_remove)


def _remove(folder: Path) -> None:
    """Whatever is in it; nothing runs there any more.

    Steps down and up again one folder at a time: shutil.rmtree fails on a few thousand folders in each other.
    """
    if sys.platform == "win32":
        return remove_tree(folder)
    here, way = os.open(folder, os.O_RDONLY), list[str]()
    try:
        while (below := _first_folder(here)) is not None or way:
            if below is not None:
                os.chmod(below, 0o700, dir_fd=here)  # one without rights could not be emptied
            there = os.open(below or "..", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = there
            if below is None:
                os.rmdir(way.pop(), dir_fd=here)
            else:
                way.append(below)
        folder.rmdir()
    except OSError as error:
        logger.warning("python: %s could not be removed (%s)", folder, one_line(error))
    finally:
        os.close(here)


def _first_folder(here: int) -> str | None:
    """Of an open folder; what comes before it is removed."""
    with os.scandir(here) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return entry.name
            os.unlink(entry.name, dir_fd=here)
    return None
