"""Starts the process that reads a stranger's file (process.py), collects what it found, ends it in time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from glm4lite.base.errors import Glm4liteError, one_line

_AT_ONCE = threading.BoundedSemaphore(4)  # more wait: each may take its memory

Reader = Literal["text", "pdf", "office", "notebook", "chats"]


class UnreadableError(Glm4liteError):
    """A file that cannot be read, in one line that does not name it."""


@dataclass(frozen=True)
class Limits:
    """What reading a file may take: `memory`, and `line`, of what the process says at once, in bytes.

    Windows limits no memory.
    """

    seconds: float = 60.0
    memory: int = 1 << 30
    line: int = 32 << 20


def read_apart(reader: Reader, source: Path | bytes, limits: Limits | None = None) -> Iterator[dict[str, Any]]:
    """What the reader says of the file, one JSON object at a time. Closing the iterator ends the process.

    Raises:
        UnreadableError: the reader's reason, or that a limit was met.
    """
    with _AT_ONCE:
        yield from _read(reader, source, limits or Limits())


def _read(reader: Reader, source: Path | bytes, limits: Limits) -> Iterator[dict[str, Any]]:
    with _opened(source) as file:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "glm4lite_ui.untrusted.process", reader, json.dumps(asdict(limits))],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is meant for the parent
            )
        except OSError as error:
            raise UnreadableError(f"no process can be started to read it ({one_line(error)})") from None
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limits.seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield from _lines(process, limits, late)
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _lines(process: subprocess.Popen[bytes], limits: Limits, late: threading.Event) -> Iterator[dict[str, Any]]:
    while process.stdout is not None:
        line = process.stdout.readline(limits.line)
        if not line.endswith(b"\n"):
            break
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise UnreadableError(str(said["error"]))
        if "end" in said:
            return
        yield said
    if late.is_set():
        raise UnreadableError(f"reading it takes longer than {limits.seconds:g} s")
    raise UnreadableError(f"reading it takes more than {limits.memory >> 20} MiB of memory, or its content is too long")


def _opened(source: Path | bytes) -> IO[bytes]:
    """As an open file, which the process can seek in."""
    try:
        if isinstance(source, Path):
            return source.open("rb")
        file = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
        file.write(source)
        file.seek(0)
        return file
    except OSError as error:
        raise UnreadableError(f"it cannot be read ({error.strerror})") from None
