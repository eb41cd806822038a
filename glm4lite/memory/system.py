"""How much memory this process has, and how much the system says it can still have."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from glm4lite_quant.host import control_groups, read


def available(swap: bool = True) -> int:
    """Bytes that can be allocated without pushing others out.

    swap: count what is free there too.

    The smaller of what the machine has free and what the process's control group (a container, a batch job) may still
    take.
    """
    free = min([psutil.virtual_memory().available, *_left_in_cgroups()])
    return free + (_free_swap() if swap else 0)


def resident() -> int:
    """Bytes of this process in RAM, mapped files too."""
    return int(psutil.Process().memory_info().rss)


def private() -> int:
    """Bytes of memory that are this process's alone: without mapped files, as far as the system tells them apart."""
    own = psutil.Process()
    if sys.platform == "linux":
        told = own.memory_info()
        return int(told.rss - told.shared)  # what Linux calls RssAnon
    return int(own.memory_info().private if sys.platform == "win32" else own.memory_full_info().uss)


def give_back() -> None:
    """Returns what was freed to the system, where its C library keeps it for the next time otherwise (glibc does)."""
    gc.collect()
    if hasattr(psutil, "heap_trim"):  # not with every C library of Linux
        psutil.heap_trim()


def _free_swap() -> int:
    """0 where the system does not tell: Windows' performance counters can be switched off."""
    try:
        return int(psutil.swap_memory().free)
    except (OSError, RuntimeError):
        return 0


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
    """Lines of a name and a number, as in memory.stat."""
    words = (line.split() for line in read(path).splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def booted() -> float:
    """When the system was started, in seconds since 1970."""
    return float(psutil.boot_time())
