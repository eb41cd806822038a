"""`client.py SOCKET -m glm4lite|-c CODE …`: has that forked with this process's streams, and ends as it ends.

Signals are handed on. Needs the standard library alone: it is to start fast.
"""

import contextlib
import os
import resource
import signal
import socket
import sys

HANDED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGCONT")


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def limits() -> str:
    """What a command that is forked would not have: limits, the user, the mask of new files."""
    names = sorted(name for name in dir(resource) if name.startswith("RLIMIT_"))
    mask = os.umask(0)
    os.umask(mask)
    return repr(([resource.getrlimit(getattr(resource, name)) for name in names], os.getresuid(), mask))


def main() -> None:
    path, *arguments = sys.argv[1:]
    streams = [number for number in (0, 1, 2) if is_open(number)]
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    while folder < 3:  # 0 to 2 stay closed for the command
        folder = os.dup(folder)
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    ignored = [name for name in HANDED_ON if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN]
    given = ("".join(map(str, streams)), " ".join(ignored), limits(), str(len(arguments)), *arguments)
    variables = [b"%s=%s" % item for item in os.environb.items()]
    message = b"\0".join([*map(os.fsencode, given), *variables])
    socket.send_fds(server, [b"%20d" % len(message)], [folder, *streams])
    server.sendall(message)
    for name in HANDED_ON:
        if name not in ignored:
            signal.signal(getattr(signal, name), lambda number, _: server.sendall(bytes([number])))
    answer = server.recv(20)
    if answer == b"fresh":
        os.execv(sys.executable, [sys.executable, *arguments])
    status = int(answer)
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # SIGKILL has no other
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
