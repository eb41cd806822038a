"""glm4lite_check (quant/check): the kernels without Python, under sanitizers, and the NEON ones under an emulator."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "quant"
SANITIZED = "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all"
AARCH64, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"


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
    """What a command that must succeed within four minutes printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | environment)
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


@pytest.mark.slow
def test_every_isa_is_right_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    lines = finished(str(sanitized(tmp_path, "address,undefined"))).splitlines()
    assert lines[0].startswith("scalar:")
    assert all(line.endswith("all right") for line in lines)


@pytest.mark.slow
def test_avx_vnni_is_right_where_only_avx_512_has_its_instruction(tmp_path: Path) -> None:
    program = sanitized(tmp_path, "address,undefined", "-DGLM4LITE_EVEX_VNNI")
    if subprocess.run([str(program), "avx512vnni", "threads"]).returncode:
        pytest.skip("this host has no AVX-512 VNNI")
    assert finished(str(program), "avxvnni").endswith("all right\n")


@pytest.mark.slow
def test_no_two_threads_touch_the_same_memory(tmp_path: Path) -> None:
    finished(str(sanitized(tmp_path, "thread")), "threads", TSAN_OPTIONS="halt_on_error=1")


# A processor that has both is the next test's.
@pytest.mark.slow
@pytest.mark.parametrize(("cpu", "isas"), [("neoverse-n1", ["neon"]), ("cortex-a53", [])])
def test_an_arm_processor_gets_the_kernels_it_has(neon: Path, cpu: str, isas: list[str]) -> None:
    have = [isa for isa in ("neon", "neoni8mm") if subprocess.run(emulated(neon, cpu, isa, "threads")).returncode == 0]
    assert have == isas


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "neon", "neoni8mm"])
def test_the_kernels_are_right_on_arm(neon: Path, isa: str) -> None:
    assert finished(*emulated(neon, "max", isa)).endswith("all right\n")


def emulated(program: Path, cpu: str, *words: str) -> list[str]:
    return [EMULATOR, "-cpu", cpu, "-L", LIBRARIES, str(program), *words]


@pytest.fixture(scope="module")
def neon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [tool for tool in (AARCH64, EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {' and '.join(missing)} (Debian: g++-aarch64-linux-gnu, qemu-user)")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={AARCH64}"]
    return build(tmp_path_factory.mktemp("neon"), *target, "-DCMAKE_BUILD_TYPE=Release")
