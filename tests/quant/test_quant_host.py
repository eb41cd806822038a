"""How many threads the kernels take: from what Linux says of cores, kinds of cores and control groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glm4lite_quant import host
from glm4lite_quant.kernels import native


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system without files; what a test writes below is what the host says."""
    for name, path in (("PROCESSORS", "cpu"), ("HYBRID", "atoms"), ("OWN_CGROUPS", "own"), ("CGROUPS", "groups")):
        monkeypatch.setattr(host, name, tmp_path / path)
    host._cores_of.cache_clear()
    monkeypatch.delenv("GLM4LITE_THREADS", raising=False)
    return tmp_path


def allowed(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(host, "processors", lambda: frozenset(range(count)))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def hyperthreads(machine: Path, cores: int) -> None:
    """Two processors a core, numbered as Intel's are: 0-1, 2-3 and so on."""
    for number in range(2 * cores):
        first = number // 2 * 2
        write(machine / f"cpu/cpu{number}/topology/thread_siblings_list", f"{first}-{first + 1}\n")


def test_hyperthreads_of_one_core_get_one_thread(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hyperthreads(machine, 4)
    allowed(monkeypatch, 8)
    assert (host.cores().threads, str(host.cores())) == (4, "4, 8 processors")


def test_a_mask_that_leaves_half_of_a_core_counts_the_core(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hyperthreads(machine, 4)
    monkeypatch.setattr(host, "processors", lambda: frozenset((1, 2, 3)))
    assert (host.cores().threads, host.cores().processors) == (2, 3)


def test_intels_two_kinds_of_cores_are_told_apart_and_all_used(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hyperthreads(machine, 4)
    write(machine / "atoms", "8-11\n")
    allowed(monkeypatch, 12)
    assert (host.cores().threads, str(host.cores())) == (8, "8 (4 fast, 4 efficient), 12 processors")


def test_arms_small_cores_are_told_by_their_capacity(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, capacity in enumerate((325, 325, 325, 325, 870, 870, 1024, 1024)):
        write(machine / f"cpu/cpu{number}/cpu_capacity", f"{capacity}\n")
    allowed(monkeypatch, 8)
    assert (host.cores().efficient, host.cores().threads) == (4, 8)
    monkeypatch.setattr(host, "processors", lambda: frozenset((0, 1)))
    assert host.cores().efficient == 0  # they are the fastest there are


@pytest.mark.parametrize(
    ("own", "files", "threads"),
    [
        ("0::/\n", {"cpu.max": "250000 100000"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ("3:cpu,cpuacct:/job\n0::/\n", {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000"}, 1),
        ("3:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 4),
        ("0::/gone\n", {}, 4),
        ("0::/\n", {"cpu.max": "? ?"}, 4),
        ("0::/\n", {"cpu.max": "100000 0"}, 4),
    ],
)
def test_no_more_threads_than_a_control_group_gives_time(
    machine: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], threads: int
) -> None:
    write(machine / "own", own)
    for name, text in files.items():
        write(machine / "groups" / name, text)
    allowed(monkeypatch, 4)
    assert host.cores().threads == threads


def test_what_the_files_say_wrongly_is_left_out(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, text in enumerate(("x", "", "1-", "0-99999999999")):
        write(machine / f"cpu/cpu{number}/topology/thread_siblings_list", text)
    allowed(monkeypatch, 4)
    assert 1 <= host.cores().threads <= 4


def test_the_kernels_take_a_thread_a_core_and_as_many_as_are_asked_for(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hyperthreads(machine, 4)
    allowed(monkeypatch, 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert native.thread_count() == 4
    monkeypatch.setenv("GLM4LITE_THREADS", "7")
    assert native.thread_count() == 7
