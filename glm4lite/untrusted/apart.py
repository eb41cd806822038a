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
from typing import IO, Any

from glm4lite.base.errors import Glm4liteError, one_line
from glm4lite.base.processes import apart, bounded
from glm4lite.base.sentences import Sentence

_AT_ONCE = threading.BoundedSemaphore(4)  # more wait: each may take its memory


class UnreadableError(Glm4liteError):
    """A file that cannot be read, in one line that does not name it."""


@dataclass(frozen=True)
class Limits:
    """What reading a file may take: `memory`, and `line`, of what the process says at once, in bytes."""

    seconds: float = 60.0
    memory: int = 1 << 30
    line: int = 32 << 20


def read_apart(reader: str, source: Path | bytes, limits: Limits | None = None) -> Iterator[dict[str, Any]]:
    """What the reader says of the file, one JSON object at a time. Closing the iterator ends the process.

    reader: a name of `documents.READERS`, or `package.module:function` for one that takes the open file.

    Raises:
        UnreadableError: the reader's reason, or that a limit was met.
    """
    with _AT_ONCE:
        yield from _read(reader, source, limits or Limits())


def _read(reader: str, source: Path | bytes, limits: Limits) -> Iterator[dict[str, Any]]:
    with _opened(source) as file:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "glm4lite.untrusted.process", reader, json.dumps(asdict(limits))],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                **apart(),
            )
        except OSError as error:
            raise UnreadableError("no process can be started to read it ({problem})", problem=one_line(error)) from None
    try:
        with bounded(process, limits.seconds, limits.memory) as late:
            yield from _lines(process, limits, late)
    finally:
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
            raise UnreadableError(Sentence.from_json(said["error"]))
        if "end" in said:
            return
        yield said
    if late.is_set():
        raise UnreadableError("reading it takes longer than {seconds} s", seconds=f"{limits.seconds:g}")
    raise UnreadableError(
        "reading it takes more than {size} MiB of memory, or its content is too long", size=limits.memory >> 20
    )


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
        raise UnreadableError("the system does not let it be read ({problem})", problem=error.strerror) from None
