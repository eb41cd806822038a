"""A command at a real pseudo-terminal, and the screen that a user would see."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pyte

from tests.commands import forked

ENTER, TAB, UP, CTRL_C, CTRL_D = "\r", "\t", "\x1b[A", "\x03", "\x04"


COLUMNS = 200


def pasted(text: str) -> str:
    """As a terminal gives what is pasted (bracketed paste)."""
    return f"\x1b[200~{text}\x1b[201~"


class Screen:
    """Runs a command with a pseudo-terminal as its stdin, stdout and stderr; `home` holds its user's data."""

    def __init__(
        self, home: Path, *options: str, command: Sequence[str] = (), rows: int = 40, **variables: str
    ) -> None:
        self.screen = pyte.HistoryScreen(COLUMNS, rows, history=5000)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, COLUMNS, 0, 0))
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        environment |= {"TERM": "xterm-256color", "XDG_DATA_HOME": str(home), "HOME": str(home)}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
        self.process = subprocess.Popen(
            [
                *(command or (*forked(), "chat", "--temperature", "0", "--quant", "none")),
                *options,
            ],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            cwd=home,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.theirs = theirs  # kept open, so that its modes can be looked at

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def text(self) -> str:
        """All lines, also those that scrolled away, without spaces at their ends."""
        scrolled = ["".join(row[x].data for x in range(COLUMNS)) for row in self.screen.history.top]
        return "\n".join(line.rstrip() for line in (*scrolled, *self.screen.display)).rstrip()

    def wait_for(self, text: str, times: int = 1, seconds: float = 60) -> str:
        """What stands on the screen once `text` stands there so often."""
        deadline = time.monotonic() + seconds
        while (shown := self.text()).count(text) < times:
            assert time.monotonic() < deadline, f"{text!r} is not shown {times} times:\n{shown}"
            assert self.process.poll() is None or self.read(), f"it ended:\n{shown}"
            self.read()
        return shown

    def wait_for_prompt(self) -> str:
        """Until the cursor stands behind an empty prompt."""
        deadline = time.monotonic() + 60
        while not (self.screen.display[self.screen.cursor.y].rstrip() == ">" and self.screen.cursor.x == 2):
            assert time.monotonic() < deadline, self.text()
            self.read()
        return self.text()

    def ended(self, seconds: float = 20) -> int:
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text()
            self.read()
        self.read()
        return self.process.returncode

    def echoes(self) -> bool:
        """Whether the terminal shows what is typed and edits lines, as a shell expects it."""
        flags = termios.tcgetattr(self.theirs)[3]
        return bool(flags & termios.ECHO) and bool(flags & termios.ICANON)

    def read(self) -> bool:
        """Takes in what the command wrote within a moment; False where that is nothing."""
        if not select.select([self.ours], [], [], 0.1)[0]:
            return False
        data = os.read(self.ours, 1 << 16)
        self.raw += data
        self._stream.feed(data)
        return True
