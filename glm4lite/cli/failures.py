"""How the command line ends when something failed: one line on stderr, and an exit code."""

from __future__ import annotations

import sys
import tempfile
import traceback
from contextlib import suppress

from glm4lite.base.errors import Glm4liteError, one_line
from glm4lite.cli.streams import OutputError, streams

READER_LEFT = 141  # what a shell shows of a program that a closed pipe ended
CANNOT = 2
BUG = 1


def told(error: Exception) -> int:
    """Says what failed and returns the exit code: 2 for what the user or the system caused, 1 for a bug of ours."""
    if isinstance(error, OutputError) and error.reader_left:
        return READER_LEFT
    reason = _cause(error)
    _say(reason or _bug(error))
    return CANNOT if reason else BUG


def _say(line: str) -> None:
    from glm4lite.cli.printable import printable_line

    with suppress(OSError, ValueError):
        streams().err.write(f"error: {printable_line(line)}\n")
        streams().err.flush()


def _cause(error: Exception) -> str | None:
    """What a user can read and change; None where there is nothing."""
    quant = sys.modules.get("glm4lite_quant")  # its own error is known only once it (and torch) is imported
    ours = (Glm4liteError, OutputError)
    if isinstance(error, ours if quant is None else (*ours, quant.QuantError)):
        return str(error)
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or one_line(error)}{where}"
    if isinstance(error, MemoryError):
        return "memory ran out"
    if isinstance(error, ImportError):
        return f"glm4lite is not installed completely: {one_line(error)}"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "the system allows no more threads or processes (see ulimit -u)"
    return None


def _bug(error: Exception) -> str:
    """A line to report it with; the traceback lies in a file, or follows where none can be written."""
    what = one_line(f"{type(error).__name__}: {error}")[:500]
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="glm4lite-", suffix=".traceback", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(trace)
    except OSError:
        return f"this is a bug in glm4lite; please report it: {what}; {one_line(trace)}"
    return f"this is a bug in glm4lite; please report it with {file.name}: {what}"
