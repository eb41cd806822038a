"""Where the answers of a batch go, and what is there already, so that a run that was stopped can go on.

A line is written whole as soon as there is an answer. What a process that was killed had half written has no line end:
it is dropped, and its request answered again.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

from glm4lite.base.errors import ConfigError
from glm4lite.cli.streams import streams
from glm4lite.cli.terminal import json_line
from glm4lite.server.batch.lines import LineError, Request, failed
from glm4lite.server.replies import JSON

if sys.platform != "win32":
    import fcntl

_LONGEST = 1 << 30  # bytes of a line; 128 K tokens with the log probabilities of 20 others each take a third
_BEGINNING = b'{"id": "batch_req_'  # of each line that `json_line` wrote


@dataclass
class Held:
    """Whose results there are when a run begins, and how many of them, with the run's own, are errors."""

    ids: set[str] = field(default_factory=set)
    lines: set[int] = field(default_factory=set)  # that could not be read as a request
    failed: int = 0
    cut: bool = False  # a last line without its end was dropped

    def __len__(self) -> int:
        return len(self.ids) + len(self.lines)

    def has(self, request: Request | LineError) -> bool:
        """Whether there is a result."""
        return request.number in self.lines if isinstance(request, LineError) else request.custom_id in self.ids

    def add(self, line: bytes) -> bool:
        """Takes a line into account; False where it is no result."""
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return False
        if not isinstance(found, dict) or not {"custom_id", "response", "error"} <= found.keys():
            return False
        error = found["error"]
        if isinstance(found["custom_id"], str):
            self.ids.add(found["custom_id"])
        elif isinstance(error, dict) and isinstance(error.get("line"), int):
            self.lines.add(error["line"])
        self.failed += failed(found)
        return True


class Results(Protocol):
    """Takes results. `kept`: whether a later run finds them again."""

    held: Held
    kept: bool

    def write(self, result: JSON) -> None:
        """One line; OSError or OutputError where it cannot be written."""
        ...


@contextmanager
def opened(path: str) -> Iterator[Results]:
    """The results of a file, which this process alone may write meanwhile; of stdout for "-".

    Raises:
        ConfigError: the file holds something else, or another process writes it.
        OSError: it cannot be read or written.
    """
    if path == "-":
        yield _Stdout()
        return
    with open(path, "ab", buffering=0) as file:
        plain = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        if plain:
            _lock(file, path)
        yield _File(file, _read(path, file) if plain else Held(), plain)


class _Stdout(Results):
    def __init__(self) -> None:
        self.held, self.kept = Held(), False

    def write(self, result: JSON) -> None:
        self.held.failed += failed(result)
        streams().out.write(json_line(result))
        streams().out.flush()


class _File(Results):
    def __init__(self, file: BinaryIO, held: Held, kept: bool) -> None:
        self._file, self.held, self.kept = file, held, kept

    def write(self, result: JSON) -> None:
        self.held.failed += failed(result)
        left = json_line(result).encode("utf-8", "replace")
        while left:
            left = left[self._file.write(left) :]


def _lock(file: BinaryIO, path: str) -> None:
    if sys.platform != "win32":  # whose locks would keep others from reading, too
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = "is being written by another process; wait for it, or name another file"
            raise ConfigError(f"{path} {why}") from None
        except OSError:  # a disk without locks
            return


def _read(path: str, appending: BinaryIO) -> Held:
    """What a file holds; its end is made one behind which a line can begin."""
    held, end, line = Held(), 0, b"\n"
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), 1):
            if line.strip() and not held.add(line):
                held.cut = not line.endswith(b"\n") and _may_be_ours(line)
                if not held.cut:
                    raise ConfigError(f"{path}: line {number} is no result of a batch; name another file")
                appending.truncate(end)
                return held
            end += len(line)
    if not line.endswith(b"\n"):
        appending.write(b"\n")
    return held


def _may_be_ours(line: bytes) -> bool:
    """Whether a process that was killed may have left this of a line, or a power cut, where some disks put zeros."""
    written = line.rstrip(b"\0")
    return written.startswith(_BEGINNING) or _BEGINNING.startswith(written)
