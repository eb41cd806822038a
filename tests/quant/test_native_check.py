"""glm4lite_check (quant/check): the kernels without Python, under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glm4lite_quant.kernels import native

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SOURCE = Path(__file__).parents[2] / "quant"
SANITIZED = "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all"


def build(folder: Path, *options: str) -> Path:
    """The program, compiled in `folder`; skips where there is no CMake."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    tool = ["-G", "Ninja"] if shutil.which("ninja") else []
    finished(cmake, "-S", str(SOURCE), "-B", str(folder), *tool, "-DGLM4LITE_CHECK=ON", *options)
    finished(cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1))
    return folder / "glm4lite_check"


def finished(*command: str, **environment: str) -> str:
    """What a command that must succeed printed. .ci/run gives it only what other tests leave of the processor."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=os.environ | environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def sanitized(folder: Path, kind: str, *defines: str) -> Path:
    """The program under -fsanitize=`kind`; skips where the compiler cannot."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("no g++ on Linux")
    probe = folder / "probe"
    probe.with_suffix(".cpp").write_text("int main() { return 0; }\n")
    linked = [compiler, f"-fsanitize={kind}", f"{probe}.cpp", "-o", str(probe)]
    if subprocess.run(linked, capture_output=True).returncode or subprocess.run([str(probe)]).returncode:
        pytest.skip(f"{compiler} has no -fsanitize={kind} here")
    flags = " ".join([SANITIZED, f"-fsanitize={kind}", *defines])
    options = (f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}")
    return build(folder / "build", *options)


def test_every_isa_is_right_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    here = native._library().isas
    # AVX-VNNI's kernel with AVX-512's code of its instruction, where a host has that alone
    evex = ["-DGLM4LITE_EVEX_VNNI"] if "avx512vnni" in here and "avxvnni" not in here else []
    lines = finished(str(sanitized(tmp_path, "address,undefined", *evex))).splitlines()
    assert {line.partition(":")[0] for line in lines} >= {"scalar", *here, *(["avxvnni"] if evex else [])}
    assert all(line.endswith("all right") for line in lines)


def test_no_two_threads_touch_the_same_memory(tmp_path: Path) -> None:
    finished(str(sanitized(tmp_path, "thread")), "threads", TSAN_OPTIONS="halt_on_error=1")
