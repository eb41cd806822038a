"""Processes that are started beside this one: away from the terminal's keys, with limits, ended with all they started.

process = subprocess.Popen(command, **apart())
with bounded(process, seconds=2.0, memory=1 << 30) as late:
    answer = process.stdout.readline()
end_tree(process.pid)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypedDict

import psutil

_LOOK_S = 0.05


class Apart(TypedDict, total=False):
    """Arguments of subprocess.Popen, those that this system has."""

    start_new_session: bool
    creationflags: int


def apart() -> Apart:
    """For a child that Ctrl-C and Ctrl-Break in the terminal do not reach: they are meant for its parent.

    On Windows it gets a console of its own, which is not shown.
    """
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}


@contextmanager
def bounded(process: subprocess.Popen[Any], seconds: float, memory: int) -> Iterator[threading.Event]:
    """Kills `process` when the block lasts longer than `seconds`; the event says that this was why.

    memory: the bytes beyond which it is killed, too, where it cannot limit itself: only Linux keeps to RLIMIT_AS.
    """
    late, done = threading.Event(), threading.Event()
    deadline = time.monotonic() + seconds
    pause = seconds if sys.platform == "linux" else _LOOK_S

    def watch() -> None:
        while not done.wait(min(pause, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                late.set()
            elif tree_bytes(process.pid) <= memory:
                continue
            return process.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield late
    finally:
        done.set()
        watcher.join()


def end_tree(process: int) -> None:
    """Kills a process that was started `apart`, and all that it started.

    A child whose own parent has ended is found by its session, one that has left the session by its parents.
    """
    with suppress(psutil.Error):
        first = psutil.Process(process)
        family = [first, *first.children(recursive=True)]
        if sys.platform != "win32":
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process, signal.SIGKILL)
        for one in family:
            with suppress(psutil.Error):
                one.kill()


def tree_bytes(process: int) -> int:
    """Bytes in RAM of a process and all that it started; memory that they share counts for each."""
    held = 0
    with suppress(psutil.Error):
        first = psutil.Process(process)
        for one in (first, *first.children(recursive=True)):
            with suppress(psutil.Error):  # it may have ended meanwhile
                held += one.memory_info().rss
    return held
