"""`python -m tests.commands.server SOCKET PATH`: imports what a chat needs, then forks for each client.

What that is to run, a client (client.py) says.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import re
import runpy
import selectors
import signal
import socket
import sys
from dataclasses import dataclass, field
from typing import TextIO

from tests.commands.client import limits as own_limits

# Read where they are used, or set by a library that the tests imported (torch, gradio). With another value
# of any other variable a command is begun anew: that may be one which Python, C or a library reads while it starts.
READ_LATE = re.compile(
    "HOME|TERM|COLUMNS|LINES|TMPDIR|PWD|OLDPWD|SHLVL|_|PYTEST_.*|TRANSFORMERS_OFFLINE|.*_PROXY|(GLM4LITE|HF|XDG)_.*"
    "|_?TORCHINDUCTOR_.*|GRADIO_.*",
    re.IGNORECASE,
)


@dataclass
class Request:
    """What a client wants, and its folder and streams."""

    client: socket.socket
    descriptors: list[int]
    streams: list[int] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    limits: str = ""
    arguments: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)


def received(client: socket.socket) -> Request:
    """Raises ConnectionError where the client went away."""
    size, descriptors, *_ = socket.recv_fds(client, 20, 4)
    request = Request(client, descriptors)
    message = b""
    while len(message) < int(size or 0):
        if not (piece := client.recv(1 << 16)):
            raise ConnectionError
        message += piece
    if not size:
        raise ConnectionError
    streams, ignored, request.limits, count, *rest = map(os.fsdecode, message.split(b"\0"))
    request.streams, request.ignored = [int(number) for number in streams], ignored.split()
    request.arguments, pairs = rest[: int(count)], rest[int(count) :]
    request.variables = dict(pair.split("=", 1) for pair in pairs)
    return request


def needs_a_start(request: Request, variables: dict[str, str], limits: str) -> bool:
    """Whether a process forked from this one is not what the client would have started."""
    names = variables.keys() | request.variables.keys()
    changed = {name for name in names if variables.get(name) != request.variables.get(name)}
    if request.variables.get("PYTHONPATH") == sys.argv[2]:  # as tests set it to find in any folder what they import
        changed.discard("PYTHONPATH")
    if request.arguments[:1] not in (["-m"], ["-c"]):
        return True
    return request.limits != limits or not all(map(READ_LATE.fullmatch, changed))


def serve(listening: socket.socket, variables: dict[str, str], limits: str) -> Request:
    """Forks for each client; comes back in the forked processes alone, with what they are to do.

    variables, limits: what this process was started with.
    """
    woken, waking = socket.socketpair()
    for end in (woken, waking):
        end.setblocking(False)
    signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    running: dict[int, socket.socket] = {}  # process id -> its client
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listening:
                    client, _ = listening.accept()
                    try:
                        request = received(client)
                    except (ConnectionError, ValueError):
                        client.close()
                        continue
                    if needs_a_start(request, variables, limits):
                        client.sendall(b"fresh")
                        client.close()
                    elif pid := os.fork():
                        running[pid] = client
                        selector.register(client, selectors.EVENT_READ, pid)
                    else:
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        for end in (listening, woken, waking, client, *running.values()):
                            end.close()
                        return request
                    for number in request.descriptors:
                        os.close(number)
                elif key.fileobj == 0:  # the tests have ended
                    for pid in running:
                        os.kill(pid, signal.SIGKILL)
                    os._exit(0)
                elif key.fileobj is woken:
                    woken.recv(1 << 12)
                    while pid := ended(running):
                        client = running.pop(pid)
                        selector.unregister(client)
                        client.close()
                else:
                    hand_on(key.data, running[key.data])


def ended(running: dict[int, socket.socket]) -> int:
    """The id of a process that ended, whose client was told how; 0 where there is none."""
    if not running:
        return 0
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid:
        with contextlib.suppress(OSError):
            running[pid].sendall(str(status).encode())
    return pid


def hand_on(pid: int, client: socket.socket) -> None:
    """A client's signals to its process; a client that was killed takes it along."""
    try:
        numbers = client.recv(64)
    except ConnectionError:
        numbers = b""
    for number in numbers or [signal.SIGKILL]:
        os.kill(pid, number)


def become(request: Request) -> None:
    """Makes this process what the client's command would be: its folder, streams, variables and arguments."""
    os.setsid()
    folder, *given = request.descriptors
    os.fchdir(folder)
    for number in (0, 1, 2):
        if number in request.streams:
            os.dup2(given[request.streams.index(number)], number)
        else:
            os.close(number)
    for number in request.descriptors:
        os.close(number)
    for name in request.ignored:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = opened(number, mode, getattr(sys, name)) if number in request.streams else None
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.environ.clear()
    os.environ.update(request.variables)
    kind, _, *arguments = request.arguments
    sys.path[0] = os.getcwd() if kind == "-m" else ""
    sys.argv = [kind, *arguments]
    sys.orig_argv = [sys.executable, *request.arguments]


def opened(number: int, mode: str, like: TextIO) -> io.TextIOWrapper:
    """A standard stream as Python makes it."""
    binary = os.fdopen(number, f"{mode}b", closefd=False)
    stream = io.TextIOWrapper(
        binary,
        like.encoding,
        like.errors,
        newline="\n" if mode == "w" else None,
        line_buffering=bool(like.line_buffering) or binary.isatty(),
    )
    stream.mode = mode  # type: ignore[misc]  # as Python sets it
    return stream


def preload() -> None:
    """All that a chat in a terminal imports, and nothing that starts a thread: a fork has only its own."""
    # ruff: noqa: F401
    import glm4lite.chat.session
    import glm4lite.cli.chat.conversation
    import glm4lite.cli.chat.keyboard
    import glm4lite.cli.markdown
    import glm4lite.cli.terminal
    import glm4lite.engine.engine
    import glm4lite.loading.loader
    import glm4lite.tools.toolbox
    import glm4lite_quant.bnb
    import glm4lite_ui.command

    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        raise RuntimeError(f"{len(threads)} threads run after the imports")
    gc.collect()
    gc.freeze()


class Leaving:
    """Ends a command behind all that atexit calls: taking 1,500 modules apart takes longer than most commands."""

    def __init__(self) -> None:
        self.status: int | None = None
        atexit.register(self)  # the first that is registered is called last

    def __call__(self) -> None:
        if self.status is None:
            return
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # where that fails, Python goes on to end and says so
        os._exit(self.status)


def main() -> None:
    leaving = Leaving()
    variables = dict(os.environ)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as glm4lite sets it before torch is imported
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's library would start threads
    preload()
    request = serve(socket.socket(fileno=int(sys.argv[1])), variables, own_limits())
    become(request)
    kind, what = request.arguments[:2]
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
        leaving.status = 0
    except SystemExit as end:
        leaving.status = 0 if end.code is None else end.code if isinstance(end.code, int) else None
        raise


if __name__ == "__main__":
    main()
