"""On Windows and macOS every module is imported and the main job done, as far as this system can stand in for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm4lite_quant.kernels import native

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "win32": {
        **{f"glm4lite.tools.sandbox.{name}": "Windows has none of the sandbox's calls" for name in
           ("jail", "kernel", "landlock", "mounts", "seccomp")},
    },
    "darwin": {"glm4lite.base.windows_io": "these are calls of Windows"},
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="Linux stands in for the others")
@pytest.mark.parametrize("system", EXPECTED)
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
