"""glm4lite_check (quant/check) on an emulated ARM: its processors get the kernels they have, and those are right.

A file of its own, so that one may build the program while another runs the sanitizers.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.quant.test_native_check import build, finished

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

AARCH64, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"


@pytest.fixture(scope="module")
def neon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [tool for tool in (AARCH64, EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {' and '.join(missing)} (Debian: g++-aarch64-linux-gnu, qemu-user)")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={AARCH64}"]
    return build(tmp_path_factory.mktemp("neon"), *target, "-DCMAKE_BUILD_TYPE=Release")


# A processor that has both is the next test's.
@pytest.mark.parametrize(("cpu", "isas"), [("neoverse-n1", ["neon"]), ("cortex-a53", [])])
def test_an_arm_processor_gets_the_kernels_it_has(neon: Path, cpu: str, isas: list[str]) -> None:
    have = [isa for isa in ("neon", "neoni8mm") if subprocess.run(emulated(neon, cpu, isa, "threads")).returncode == 0]
    assert have == isas


@pytest.mark.parametrize("isa", ["scalar", "neon", "neoni8mm"])
def test_the_kernels_are_right_on_arm(neon: Path, isa: str) -> None:
    assert finished(*emulated(neon, "max", isa)).endswith("all right\n")


def emulated(program: Path, cpu: str, *words: str) -> list[str]:
    return [EMULATOR, "-cpu", cpu, "-L", LIBRARIES, str(program), *words]
