"""Imports every module and runs the main job as another system has it: `python -m … win32|darwin FOLDER`.

Our modules, and they alone, get other modules than they ask for: `sys` says the other system's name, `os`, `signal`,
`mmap` and `select` hold only what they hold there (windows_names.txt, from CPython 3.13 for Windows), and what there is
not cannot be imported. Calls that only the other system has are replaced by this system's nearest. So this shows that
nothing is asked for that is not there, not that Windows or macOS answer as is thought.
"""

from __future__ import annotations

import builtins
import fcntl
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

OURS = ("glm4lite", "glm4lite_quant", "glm4lite_ui")


def words(text: str) -> list[str]:
    return text.split()


ABSENT = {
    "win32": words("fcntl resource pwd grp termios tty pty readline syslog posix crypt spwd nis curses"),
    "darwin": words("msvcrt winreg _winapi spwd"),
}
OF_LINUX = {  # what macOS' modules lack, of what Linux' have; from the conditions in typeshed
    "os": words(
        "O_DIRECT O_PATH O_TMPFILE O_LARGEFILE posix_fadvise POSIX_FADV_DONTNEED sched_getaffinity sched_setaffinity "
        "setresuid setresgid getresuid getresgid memfd_create pidfd_open splice copy_file_range eventfd getrandom "
        "unshare setns posix_fallocate getxattr setxattr listxattr"
    ),
    "signal": words("SIGRTMIN SIGRTMAX SIGPOLL SIGPWR sigtimedwait sigwaitinfo"),
    "mmap": words("MADV_HUGEPAGE MADV_NOHUGEPAGE MADV_DONTFORK MAP_POPULATE MAP_STACK"),
    "select": words("epoll EPOLLIN"),
}


class Other(types.ModuleType):
    """A module as another system has it: `names` of the one here (None: all but `lacks`), and what is `changed`."""

    def __init__(
        self, real: Any, changed: Mapping[str, Any], names: Sequence[str] | None = None, lacks: Sequence[str] = ()
    ) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(_real=real, _changed=changed, _names=names, _lacks=lacks)

    def __getattr__(self, name: str) -> Any:
        if name in self._changed:
            return self._changed[name]
        if name in self._lacks or (self._names is not None and name not in self._names and not name.startswith("__")):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} there")
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


def windows() -> dict[str, Any]:
    text = (Path(__file__).parent / "windows_names.txt").read_text()
    names = {part.partition(":")[0]: part.partition(":")[2].split() for part in text.replace("\n  ", " ").splitlines()}
    direct = types.ModuleType("glm4lite.base.windows_io")
    direct.__dict__.update(
        open_direct=lambda path: os.open(path, os.O_RDONLY),
        read_at=lambda descriptor, target, offset: os.preadv(descriptor, [target], offset),
    )
    sys.modules["glm4lite.base.windows_io"] = direct
    msvcrt = types.ModuleType("msvcrt")
    msvcrt.__dict__.update(
        locking=lambda descriptor, mode, count: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB),
        LK_NBLCK=2,
        kbhit=lambda: False,
    )

    class Process(psutil.Process):
        def memory_info(self) -> Any:
            return types.SimpleNamespace(rss=super().memory_info().rss, private=super().memory_info().rss)

    changes: dict[str, dict[str, Any]] = {
        "os": {"name": "nt", "O_BINARY": 0},
        "signal": {"SIGBREAK": signal.SIGQUIT},
    }
    found: dict[str, Any] = {
        name: Other(importlib.import_module(name), changes.get(name, {}), names[name])
        for name in ("os", "signal", "mmap", "select")
    }
    found |= {
        "sys": Other(sys, {"platform": "win32"}),
        "subprocess": Other(subprocess, {"CREATE_NO_WINDOW": 0}),
        "socket": Other(importlib.import_module("socket"), {"SO_EXCLUSIVEADDRUSE": 2}),  # its number of SO_REUSEADDR
        "psutil": Other(psutil, {"Process": Process}),
        "msvcrt": msvcrt,
    }
    return found


def macos() -> dict[str, Any]:
    class Process(psutil.Process):
        def memory_info(self) -> Any:
            return types.SimpleNamespace(rss=super().memory_info().rss)

        cpu_affinity = property()

    found: dict[str, Any] = {
        name: Other(importlib.import_module(name), {}, lacks=lacks) for name, lacks in OF_LINUX.items()
    }
    return found | {
        "sys": Other(sys, {"platform": "darwin"}),
        "fcntl": Other(fcntl, {"F_NOCACHE": fcntl.F_GETFL}),
        "psutil": Other(psutil, {"Process": Process}),
    }


def become(system: str) -> None:
    """From now on our modules import what the system has."""
    real, absent, found = builtins.__import__, ABSENT[system], {"win32": windows, "darwin": macos}[system]()

    def importing(name: str, globals: Any = None, *rest: Any, **more: Any) -> Any:
        if globals and str(globals.get("__name__", "")).partition(".")[0] in OURS:
            if name in absent:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in found:
                return found[name]
        return real(name, globals, *rest, **more)

    builtins.__import__ = importing


def import_all() -> dict[str, str]:
    """Every module of ours; those that cannot be imported, with their reasons."""
    failed = {}
    for package in map(importlib.import_module, OURS):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if found.name.endswith(("__main__", "glm4lite_kernels")):  # the command; a library of C
                continue
            try:
                importlib.import_module(found.name)
            except ImportError as error:
                failed[found.name] = str(error)
    return failed


def main_job(folder: Path) -> dict[str, Any]:
    """Nano is quantized, and loaded with layers on disk; it calls a tool, and answers over HTTP."""
    import glm4lite
    from glm4lite.base.events import TextDelta
    from glm4lite.checkpoint.quantize import quantize_checkpoint
    from glm4lite.measure.inventory import rings
    from glm4lite.memory import system
    from glm4lite.tools.python import python_tool
    from glm4lite_quant import QuantConfig
    from glm4lite_quant.host import cores
    from tests.glm4lite.served import NANO, served

    quantized = quantize_checkpoint(NANO, folder / "int4", QuantConfig(4, method="search"))
    engine = glm4lite.Engine.load(quantized, ram="519MiB", context=300)
    said = glm4lite.ChatSession(engine, glm4lite.BUILTIN_TOOLS).send("What is 37 * 24?")
    answer = "".join(event.text for event in said if isinstance(event, TextDelta))
    with served(engine) as site:
        reply = site.chat("Hello").choices[0].message.content
    try:
        python_tool()
        sandbox = "runs"
    except glm4lite.Glm4liteError as error:
        sandbox = str(error)
    return {
        "answer": answer,
        "served": reply,
        "on disk": sum(len(ring.extents) for ring in rings(engine.model)),
        "sandbox": sandbox,
        "left": sorted(path.name for path in folder.iterdir()),
        "memory": [system.available(), system.resident(), system.private()],
        "cores": str(cores()),
    }


if __name__ == "__main__":
    become(sys.argv[1])
    print(json.dumps({"failed": import_all(), **main_job(Path(sys.argv[2]))}))
