"""How much memory the system says this process can still have."""

import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def available(swap: bool = True) -> int | None:
    """Bytes that can be allocated without pushing others out; None where the system does not tell.

    swap: count what is free there too.

    The smaller of what the machine has free and what the process's control group (a container, a batch job) may still
    take. Only Linux tells it in files; elsewhere nothing is refused up front.
    """
    fields = _fields(MEMINFO)
    if "MemAvailable" not in fields:
        return None
    free = min([fields["MemAvailable"] * 1024, *_left_in_cgroups()])
    return free + (fields.get("SwapFree", 0) * 1024 if swap else 0)


def give_back() -> None:
    """Returns what was freed to the system, where its C library keeps it for the next time otherwise (glibc does)."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return
    trim(0)


def _left_in_cgroups() -> Iterator[int]:
    """What each limited control group above this process may still take, by version 2 and by version 1."""
    for line in _read(OWN_CGROUPS).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield from _left(CGROUPS, path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            yield from _left(CGROUPS / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _left(root: Path, path: str, limit_name: str, used_name: str) -> Iterator[int]:
    folder = root / path.strip("/")
    for group in (folder, *folder.parents):
        limit, used = _read(group / limit_name).strip(), _read(group / used_name).strip()
        if limit.isdecimal() and used.isdecimal():
            stat = _fields(group / "memory.stat")
            cached = stat.get("file", stat.get("total_cache", 0))  # of files: can be dropped
            yield max(0, int(limit) - int(used) + cached)
        if group == root:
            return


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number, as in /proc/meminfo and memory.stat."""
    words = (line.replace(":", " ").split() for line in _read(path).splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def _read(path: Path) -> str:
    """The file's text, "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
