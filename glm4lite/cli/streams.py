"""The process's three streams: stdin is the message, stdout belongs to the answer, stderr takes all else.

Programs read stdout, so nothing but a command's own result may reach it: not what a tool prints, nor a library written
in C, nor a child. While a command runs, descriptor 1 therefore leads to stderr, and `streams().out` alone to stdout.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from glm4lite.base.errors import Glm4liteError

MAX_INPUT = 8 << 20  # bytes; more than any context holds
PATIENCE_S = 3.0  # until a wait for stdin is said

Remark = Callable[[str], None]


class InputError(Glm4liteError):
    """What stdin holds cannot be a message."""


class OutputError(Exception):
    """Stdout takes nothing more. No Glm4liteError: a conversation does not go on after it."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"stdout: {error.strerror}")
        self.reader_left = error.errno == errno.EPIPE


@dataclass
class Streams:
    """What a command reads and writes itself. `stdin` is a descriptor, or None where there is nothing to read."""

    stdin: int | None
    out: TextIO
    err: TextIO


_own: Streams | None = None


def streams() -> Streams:
    """The real streams, also while `sys.stdout` leads to stderr."""
    return _own or Streams(None, sys.stdout, sys.stderr)


def settle_streams() -> None:
    """To be called before anything is opened: a file must not get a closed stream's number, and be written to by it.

    From then on all is UTF-8, whatever the locale; stderr drops what it cannot take, stdout raises OutputError once.
    """
    global _own
    for number in (0, 1, 2):
        _open_if_closed(number)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text do not end a chat
    if not (_is(sys.stdout, 1) and _is(sys.stderr, 2)):  # another program's, such as a test's
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
                stream.reconfigure(errors="replace")  # a code page does not have every letter
        return
    if sys.platform != "win32":
        sys.stdout, sys.stderr = _text(os.dup(1), _refuse), _text(os.dup(2), _drop)
    else:  # Python's own streams know how a console of Windows is written to
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="replace")
    _own = Streams(0, sys.stdout, sys.stderr)


@contextmanager
def owned_stdout() -> Iterator[None]:
    """In here what others print goes to stderr, and where stdin is no terminal they read nothing from it.

    A process does not give stdout back: threads and C's buffers may have something left to print until it ends.
    """
    global _own
    before = sys.stdout
    borrowed = _own is None
    if borrowed:
        _own = Streams(None, sys.stdout, sys.stderr)
        sys.stdout = sys.stderr
    else:
        _divert()
    try:
        yield
        streams().out.flush()
    finally:
        if borrowed:
            sys.stdout, _own = before, None


@contextmanager
def lent_terminal() -> Iterator[None]:
    """For input(), which edits lines only where descriptor 1 is the terminal."""
    if sys.platform == "win32" or _own is None or not _own.out.isatty():
        yield
        return
    os.dup2(_own.out.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(2, 1)


@contextmanager
def echo(on: bool) -> Iterator[None]:
    """In here the terminal of stdin shows what is typed, or does not; where there is none, nothing changes.

    While an answer is drawn a key must not move the cursor. What is typed then is read, and shown, by the next prompt.
    """
    if sys.platform == "win32" or sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    import termios

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    changed = list(before)
    changed[3] = before[3] | termios.ECHO if on else before[3] & ~termios.ECHO
    termios.tcsetattr(number, termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


def is_interactive() -> bool:
    """Whether stdin is a terminal, where a message is typed."""
    number = streams().stdin
    return number is not None and os.isatty(number)


def prompt_text(prompt: str | None, remark: Remark) -> str:
    """A prompt, and below it what stdin holds; None and `-` are stdin alone, typed where it is a terminal.

    The line end that files and echo have is none of the text's. Raises InputError where there is no text at all.
    """
    prompt = None if prompt == "-" else prompt
    if prompt is None and is_interactive():
        remark("(type the text; Ctrl-D on a line of its own ends it)")
        piped = _typed_text()
    else:
        piped = _piped_text(prompt is not None, remark)
    piped = piped.rstrip("\n")
    if prompt is None and not piped.strip():
        raise InputError("stdin is empty: give a text there, or with -p")
    return "\n\n".join(text for text in (prompt, piped) if text)


def _piped_text(optional: bool, remark: Remark) -> str:
    """All of stdin as one text; "" where it is empty, or a terminal.

    `optional`: there is a prompt too. Then a stdin that cannot be read is none (nohup makes one), and so is a socket on
    which nothing comes (programs that start others leave one open); a pipe is waited for, since a slow program may
    stand before it. Raises InputError for what is no text, and for more than MAX_INPUT.
    """
    number = streams().stdin
    if number is None or os.isatty(number):
        return ""
    if optional and _is_silent_socket(number):
        remark(f"(nothing came from stdin within {PATIENCE_S:g} s: the prompt goes alone)")
        return ""
    waiting = "reading stdin to its end (what is in it belongs to the message; < /dev/null leaves it out)"
    timer = threading.Timer(PATIENCE_S, remark, [waiting])
    timer.daemon = True
    timer.start()
    try:
        return _decoded(_read_all(number), remark)
    except OSError as error:
        if optional:
            return ""
        raise InputError(f"stdin cannot be read ({error.strerror})") from error
    finally:
        timer.cancel()


def _typed_text() -> str:
    """All that is typed until Ctrl-D. Raises InputError for more than MAX_INPUT."""
    number = streams().stdin
    return "" if number is None else _read_all(number).decode("utf-8", "replace")


def piped_lines() -> TextIO:
    """Stdin for `piped_line`."""
    number = streams().stdin
    if number is None:
        return io.StringIO()
    return open(number, encoding="utf-8", errors="replace", closefd=False)


def piped_line(lines: TextIO) -> str:
    """The next line with its end; "" at the end of input. Raises InputError for one that has none."""
    line = lines.readline(MAX_INPUT + 1)
    if len(line) > MAX_INPUT:
        raise InputError(f"stdin holds a line of more than {MAX_INPUT >> 20} MiB")
    return line


def _read_all(number: int) -> bytes:
    data = bytearray()
    while chunk := _read(number):
        data += chunk
        if len(data) > MAX_INPUT:
            raise InputError(f"stdin holds more than {MAX_INPUT >> 20} MiB, which no model's context takes")
    return bytes(data)


def _read(number: int) -> bytes:
    while True:
        try:
            return os.read(number, 1 << 16)
        except BlockingIOError:  # another process may have made a shared stream so
            select.select([number], [], [])


def _decoded(data: bytes, remark: Remark) -> str:
    """UTF-8 with or without a mark at its start, and lines that end as Windows' do or not."""
    if b"\0" in data:
        raise InputError("stdin holds NUL bytes, as UTF-16 and binary files do; give text in UTF-8")
    text = data.decode("utf-8-sig", "replace")
    broken = text.count("\ufffd") - data.count("\ufffd".encode())
    if broken:
        remark(f"({broken} places of stdin are not UTF-8; they are read as \ufffd)")
    return text.replace("\r\n", "\n")


def _is_silent_socket(number: int) -> bool:
    try:
        is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError:
        return False
    return is_socket and not select.select([number], [], [], PATIENCE_S)[0]


def _open_if_closed(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:  # then the lowest free number is this one
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _is(stream: TextIO | None, number: int) -> bool:
    """Whether a standard stream leads to its descriptor; one that was closed at the start is None."""
    try:
        return stream is None or stream.fileno() == number
    except (OSError, ValueError, AttributeError):
        return False


def _divert() -> None:
    """Descriptor 1 leads to stderr from now on, and 0 to nothing unless it is a terminal."""
    if sys.platform == "win32" or _own is None:
        sys.stdout = sys.stderr
        return
    os.dup2(2, 1)
    sys.stdout, sys.stderr = (_text(number, _drop, _OfOthers) for number in (1, 2))
    if not os.isatty(0):
        _own.stdin = os.dup(0)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)


def _refuse(error: OSError) -> None:
    raise OutputError(error)


def _drop(error: OSError) -> None:
    """Nobody could be told."""


class _Descriptor(io.FileIO):
    """A descriptor whose first error is reported, and which then takes and drops everything.

    Python would try again what is left in its buffers when it ends, and then print an error that nobody can catch.
    """

    def __init__(self, number: int, failed: Callable[[OSError], None]) -> None:
        super().__init__(number, "w", closefd=number > 2)
        self._failed = failed
        self._broken = False

    def write(self, data: Any, /) -> int:
        if self._broken:
            return len(data)
        try:
            while (written := super().write(data)) is None:  # another process may have made it so
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            self._broken = True
            self._failed(error)
            return len(data)


class _OfOthers(io.TextIOWrapper):
    """What tools and libraries print. They may print what a model or a server wrote, which no terminal obeys."""

    def write(self, text: str, /) -> int:
        from glm4lite.cli.printable import printable

        if self.isatty():  # a progress bar returns to the start of its line
            super().write("\r".join(printable(part) for part in text.split("\r")))
        else:
            super().write(text)
        return len(text)


def _text(
    number: int, failed: Callable[[OSError], None], kind: type[io.TextIOWrapper] = io.TextIOWrapper
) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(_Descriptor(number, failed))
    return kind(buffer, encoding="utf-8", errors="replace", line_buffering=True)
