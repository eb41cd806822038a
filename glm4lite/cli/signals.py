"""What the signals of a terminal and of a system that shuts down do."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """SIGTERM, SIGHUP (a closed terminal) and Windows' Ctrl-Break end the program as Ctrl-C does: what is half written
    is removed.

    Those that are ignored (`nohup`) stay so. A server has its own way to end on SIGTERM, which a closed terminal takes.
    """

    def leave(number: int, _: object) -> None:
        if signal.getsignal(signal.SIGTERM) not in (leave, signal.SIG_IGN):
            signal.raise_signal(signal.SIGTERM)
            return
        for ours in numbers:
            signal.signal(ours, signal.SIG_IGN)  # a shell and a terminal may both say so, while we tidy up
        sys.exit(128 + number)

    names = ("SIGTERM", "SIGHUP", "SIGBREAK")
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            if signal.getsignal(number) is leave:
                signal.signal(number, signal.SIG_DFL)


@contextmanager
def interrupt_stops(answering: Any) -> Iterator[None]:
    """Ctrl-C ends the answer, not the program; a second one during the same answer interrupts for good."""

    def on_interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, previous)
        answering.stop()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
