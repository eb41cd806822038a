"""Whether a terminal shows what is typed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def echo(on: bool) -> Iterator[None]:
    """In here the terminal of stdin shows what is typed, or does not; where there is none, nothing changes.

    While an answer is drawn a key must not move the cursor. What is typed then is read, and shown, by the next prompt.
    """
    if os.name != "posix" or sys.stdin is None or not sys.stdin.isatty():
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
