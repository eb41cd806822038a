"""The process that reads a stranger's file: `python -m glm4lite.untrusted.process READER LIMITS`, run by apart.py.

The file is stdin; what is found goes to stdout, a JSON object a line, the last one {"end": true} or {"error": why}.
"""

from __future__ import annotations

import gc
import json
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from typing import IO, Any

Reading = Callable[[IO[bytes]], Iterator[dict[str, Any]]]

_READABLE = ("/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def _limit(memory: int, seconds: float) -> None:
    """Of memory and time; no files written, no processes. Windows has none: there apart.py looks at time and memory."""
    if sys.platform == "win32":
        return
    import resource

    wanted = {"RLIMIT_AS": memory, "RLIMIT_CPU": int(seconds) + 1, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
    for name, value in (wanted | {"RLIMIT_NPROC": 0}).items():
        with suppress(OSError, ValueError):  # macOS knows RLIMIT_AS and refuses it
            resource.setrlimit(getattr(resource, name), (value, value))


def _wall_in() -> None:
    """On Linux: ends with its parent, opens no files but Python's own, makes no connections."""
    if sys.platform != "linux":
        return
    import signal

    from glm4lite.tools.sandbox import landlock, seccomp
    from glm4lite.tools.sandbox.kernel import call

    own = [*sys.path, sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()]
    with suppress(OSError):
        call("prctl", 1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
        call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which the two below ask for
        with suppress(OSError):
            landlock.restrict([*_READABLE, *filter(None, own)], _DEVICES, [])
        seccomp.install(False, False)


def _reading(reader: str) -> Reading:
    """The reader, with all that it imports. Its name is our own program's, never the file's."""
    module, _, function = reader.partition(":")
    if function:
        found: Reading = getattr(import_module(module), function)
        return found
    from glm4lite.untrusted import documents

    return documents.READERS[reader]()


def main(reader: str, limits: dict[str, Any]) -> None:
    """Reads stdin with the reader."""
    from glm4lite.base.errors import said_by
    from glm4lite.base.extras import MissingPackageError
    from glm4lite.base.sentences import Sentence
    from glm4lite.untrusted.documents import Refused

    out, sys.stdout = sys.stdout.buffer, sys.stderr  # what a library prints is no answer

    def say(said: dict[str, Any]) -> None:
        out.write(json.dumps(said, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        out.flush()

    try:
        reading = _reading(reader)
    except MissingPackageError as missing:
        say({"error": said_by(missing).to_json()})
        return
    gc.disable()  # it would look through millions of lists many times; what leaks here ends with the process
    _limit(limits["memory"], limits["seconds"])
    _wall_in()
    try:
        for said in reading(sys.stdin.buffer):
            say(said)
        last: dict[str, Any] = {"end": True}
    except Refused as refused:
        last = {"error": said_by(refused).to_json()}
    except MemoryError:
        why = Sentence("reading it takes more than {size} MiB of memory", size=limits["memory"] >> 20)
        last = {"error": why.to_json()}
    except RecursionError:
        last = {"error": Sentence("it is nested too deeply").to_json()}
    except Exception as error:  # of a library, about a file that is damaged
        why = Sentence("it is damaged ({problem})", problem=said_by(error)[:200])
        last = {"error": why.to_json()}
    say(last)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
