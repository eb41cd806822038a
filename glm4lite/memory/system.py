"""How much memory the system says this process can still have."""

import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

from glm4lite_quant.host import control_groups, read

MEMINFO = Path("/proc/meminfo")


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
    """What each limited control group above this process may still take."""
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # version 2 and 1
    for group in control_groups("memory"):
        for limit_name, used_name in names:
            limit, used = read(group / limit_name).strip(), read(group / used_name).strip()
            if limit.isdecimal() and used.isdecimal():
                stat = _fields(group / "memory.stat")
                cached = stat.get("file", stat.get("total_cache", 0))  # of files: can be dropped
                yield max(0, int(limit) - int(used) + cached)


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number, as in /proc/meminfo and memory.stat."""
    words = (line.replace(":", " ").split() for line in read(path).splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}
