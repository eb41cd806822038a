"""Folders that one process fills: what killed ones left goes, what is in use stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from glm4lite.base.owned_folder import LOCK, OwnedFolder, is_abandoned, remove_abandoned_temporary
from glm4lite.tools.sandbox.process import run_python

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no locks that end with their process")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary files, of this process and those it starts."""
    tmp_path.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def killed(program: str, temporary: Path, pattern: str) -> Path:
    """What a Python program had made when it was killed, and no process that it had begun to start lives either."""
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    deadline = time.monotonic() + 60
    while not (made := list(temporary.glob(pattern))) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    lock = made[0].parent / LOCK
    while not is_abandoned(lock) and time.monotonic() < deadline:  # a child has the lock, too, until it is begun
        time.sleep(0.01)
    return made[0]


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(temporary: Path) -> None:
    code = ("import time", "from glm4lite.base.owned_folder import OwnedFolder")
    program = "; ".join((*code, "f = OwnedFolder('glm4lite-x-')", "time.sleep(60)"))
    left = killed(program, temporary, "glm4lite-x-*/.glm4lite-lock").parent
    living, unknown = OwnedFolder("glm4lite-x-"), temporary / "glm4lite-x-abcdefgh"
    unknown.mkdir()
    remove_abandoned_temporary("glm4lite-x-")
    assert not left.exists()
    assert living.path.exists()
    assert unknown.exists()
    living.discard()
    assert not living.path.exists()


def test_the_work_folder_of_a_killed_program_is_removed_by_the_next_run(temporary: Path) -> None:
    program = "from glm4lite.tools.sandbox.process import run_python; run_python('import time; time.sleep(60)')"
    left = killed(program, temporary, "glm4lite-python-*/work")
    (left / "deep").mkdir(exist_ok=True)
    run_python("print(1)")
    assert list(temporary.iterdir()) == []
