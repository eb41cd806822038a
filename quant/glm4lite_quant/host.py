"""What the host gives this process: the cores, their caches, and the control groups (containers, batch jobs) it is in.

psutil asks every system; Linux' files say more: which processors share a core, which cores are slow, what groups allow.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

PROCESSORS = Path("/sys/devices/system/cpu")
HYBRID = Path("/sys/devices/cpu_atom/cpus")  # the efficiency cores, where Intel's processors have both kinds
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
_SLOWER = 0.8  # of the fastest core's capacity: below it a core is one of another kind


@dataclass(frozen=True)
class Cores:
    """Processors that this process may use."""

    processors: int  # as the system counts them
    physical: int  # cores: two processors of one core (hyperthreads) share what computes
    efficient: int  # of the cores, those that are slower than the others by their build
    share: float | None  # cores' worth of time that a control group allows; None: no limit

    @property
    def threads(self) -> int:
        """As many as pay: one a core, since its two processors would only share it, and none without time to run.

        Slow cores count: threads take work over from each other, so that a slow one holds nobody up.
        """
        return self.physical if self.share is None else max(1, min(self.physical, math.ceil(self.share)))

    def __str__(self) -> str:
        """For people: "8 (4 fast, 4 efficient), 12 processors, a control group allows 2.5"."""
        kinds = f" ({self.physical - self.efficient} fast, {self.efficient} efficient)" if self.efficient else ""
        threads = f", {self.processors} processors" if self.processors != self.physical else ""
        limit = "" if self.share is None else f", a control group allows {self.share:g}"
        return f"{self.physical}{kinds}{threads}{limit}"


def processors() -> frozenset[int]:
    """The numbers of the processors this process may run on. macOS has no such mask: all."""
    if sys.platform == "darwin":
        return frozenset(range(os.cpu_count() or 1))
    if sys.platform == "linux":  # a hundredth of psutil's time, which opens files of the process; asked at each product
        return frozenset(os.sched_getaffinity(0))
    return frozenset(psutil.Process().cpu_affinity()) or frozenset((0,))


def cores() -> Cores:
    """Of the processors that this process may run on now; what the files say is read once."""
    return _cores_of(processors())


@lru_cache
def _cores_of(allowed: frozenset[int]) -> Cores:
    if sys.platform != "linux":
        physical = psutil.cpu_count(logical=False) or len(allowed)
        return Cores(len(allowed), min(physical, len(allowed)), 0, None)
    siblings = {number: _siblings(number) for number in allowed}
    by_core = {first: number for number, first in siblings.items()}  # a core, and one of its processors
    atoms = _numbers(read(HYBRID))
    capacity = {number: _capacity(number) for number in by_core.values()}
    fastest = max(capacity.values())
    efficient = [number for number, value in capacity.items() if number in atoms or value < _SLOWER * fastest]
    slower = 0 if len(efficient) == len(by_core) else len(efficient)
    return Cores(len(allowed), len(by_core), slower, min(_shares(), default=None))


def _siblings(number: int) -> int:
    """The first processor of the core that this one belongs to."""
    listed = _numbers(read(PROCESSORS / f"cpu{number}" / "topology" / "thread_siblings_list"))
    return min(listed, default=number)


def _capacity(number: int) -> int:
    """Of a processor in the kernel's own measure, where it has one; 1 where all are alike."""
    text = read(PROCESSORS / f"cpu{number}" / "cpu_capacity").strip()
    return int(text) if text.isdecimal() else 1


def _numbers(text: str) -> set[int]:
    """Of a list like "0-3,8"; what is no number is left out."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found.update(range(int(first), min(int(last or first), 1 << 16) + 1))
    return found


def _shares() -> Iterator[float]:
    """Cores' worth of time that each limited control group above this process allows."""
    for group in control_groups("cpu"):
        quota, _, period = read(group / "cpu.max").strip().partition(" ")  # version 2
        if not quota:
            quota, period = read(group / "cpu.cfs_quota_us").strip(), read(group / "cpu.cfs_period_us").strip()
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)


def largest_cache() -> int:
    """Bytes of the first processor's largest cache; 0 where the system does not tell."""
    sizes = [read(file).strip() for file in (PROCESSORS / "cpu0" / "cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size[:-1].isdecimal() and size.endswith("K")), default=0)


def control_groups(controller: str) -> Iterator[Path]:
    """The folders of the groups this process is in, each and what is above it, by version 2 and by version 1."""
    for line in read(OWN_CGROUPS).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield from _up(CGROUPS, path)
        elif controller in controllers.split(","):
            yield from _up(CGROUPS / controller, path)


def _up(root: Path, path: str) -> Iterable[Path]:
    folder = root / path.strip("/")
    for group in (folder, *folder.parents):
        yield group
        if group == root:
            return


def read(path: Path) -> str:
    """A small file of the system; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
