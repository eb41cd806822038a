"""On Windows and macOS every module is imported and the main job done, as far as this system can stand in for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from glm4lite.base import processes, whole_file
from glm4lite.base.errors import CheckpointError
from glm4lite.base.processes import bounded, end_tree, tree_bytes
from glm4lite.checkpoint.writer import FolderWriter
from glm4lite_quant.kernels import native
from tests.commands import python

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "win32": {
        **{f"glm4lite.tools.sandbox.{name}": "Windows has none of the sandbox's calls" for name in
           ("jail", "kernel", "landlock", "mounts", "seccomp")},
    },
    "darwin": {"glm4lite.base.windows_io": "these are calls of Windows"},
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="Linux stands in for the others")
@pytest.mark.parametrize("system", ["win32", pytest.param("darwin", marks=pytest.mark.slow)])
def test_every_module_is_imported_and_the_main_job_done(system: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.glm4lite.other_system", system, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "GLM4LITE_KERNELS": native._library().path},  # whose name would be another there
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == EXPECTED[system]
    assert "888" in found["answer"]
    assert found["served"].strip()
    assert found["on disk"] > 0
    assert found["left"] == ["int4"]
    assert all(count > 1 << 20 for count in found["memory"])
    assert int(found["cores"].split()[0]) >= 1
    assert ("Windows has none" in found["sandbox"]) == (system == "win32")


def in_use() -> PermissionError:
    """What Windows says where another program has a file open."""
    error = PermissionError(13, "The process cannot access the file")
    error.winerror = 32  # type: ignore[attr-defined]
    return error


def test_a_file_that_is_open_for_a_moment_is_replaced_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refusals = os.replace, [in_use(), in_use()]

    def replace(source: Path, target: Path) -> None:
        if refusals:
            raise refusals.pop()
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(whole_file, "sys", SimpleNamespace(platform="win32"))
    whole_file.write_whole(tmp_path / "kept.json", b"{}")
    assert (tmp_path / "kept.json").read_bytes() == b"{}"


def test_a_model_that_another_program_has_loaded_is_not_replaced_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")

    def replace(source: Path, target: Path) -> None:
        raise in_use()

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(CheckpointError, match=r"cannot be written while a program has its files open, as one that has"):
        save(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.json", "{}")]


def save(folder: Path) -> None:
    with FolderWriter(folder, [], replace=True) as writer:
        writer.write_json("config.json", {"a": 1})


SPAWNS = """
import subprocess, sys, time
code = "import time; kept = bytearray(64 << 20); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_process_ends_with_a_child_that_left_its_session() -> None:
    """Windows has no sessions or groups: what a process started is found by its parents."""
    process = subprocess.Popen([sys.executable, "-c", SPAWNS], stdout=subprocess.PIPE, text=True, **processes.apart())
    assert process.stdout is not None
    child = int(process.stdout.readline())
    deadline = time.monotonic() + 60
    while tree_bytes(process.pid) < 64 << 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert tree_bytes(process.pid) >= 64 << 20
    end_tree(process.pid)
    process.wait(30)
    process.stdout.close()
    while tree_bytes(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert tree_bytes(child) == 0


def test_a_process_that_no_system_limits_ends_when_it_takes_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "sys", SimpleNamespace(platform="darwin"))
    code = "import time; kept = bytearray(256 << 20); kept[::4096] = bytes(len(kept) // 4096); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        with bounded(process, 60, 128 << 20) as late:
            assert process.wait(60) != 0
        assert not late.is_set()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        with bounded(process, 0.2, 1 << 40) as late:
            assert process.wait(60) != 0
        assert late.is_set()


@pytest.mark.parametrize(
    "encoding", ["cp936", *(pytest.param(one, marks=pytest.mark.slow) for one in ("cp1252", "ascii"))]
)
def test_no_code_page_ends_a_command(encoding: str) -> None:
    """Whether it is the locale's or that of a program whose streams are lent."""
    said = subprocess.run(
        [*python(), "-m", "glm4lite", "info", "模型 🙂"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (said.returncode, "模型 🙂" in said.stderr.decode()) == (2, True), said.stderr
    lent = (
        "import io, os, sys\n"
        f"sys.stdout, sys.stderr = (io.TextIOWrapper(open(os.dup(n), 'wb'), encoding={encoding!r}) for n in (1, 2))\n"
        "from glm4lite.cli.app import main\n"
        "sys.argv = ['glm4lite', 'info', '模型 🙂']\n"
        "main()\n"
    )
    said = subprocess.run([*python(), "-c", lent], capture_output=True, timeout=120, check=False)
    assert said.returncode == 2, said.stderr
    assert said.stderr.decode(encoding).startswith("error: "), said.stderr
