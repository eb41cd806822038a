"""What quant/wheels.py refuses. That it makes wheels, and their kernels are right, `.ci/run --wheels` shows."""

from __future__ import annotations

import platform
import runpy
import zipfile
from pathlib import Path
from typing import Any

import pytest

from glm4lite_quant.kernels import native

pytest.importorskip("lief", reason="no lief (the extra `wheels`)")
WHEELS: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "quant" / "wheels.py"))
examine, WheelError = WHEELS["examine"], WHEELS["WheelError"]
HERE = f"manylinux_2_28_{platform.machine()}"


def wheel(folder: Path, tag: str, library: str, data: bytes, said: str = "") -> Path:
    path = folder / f"glm4lite-0.1.0-py3-none-{tag}.whl"
    with zipfile.ZipFile(path, "w") as files:
        files.writestr(f"glm4lite_quant/{library}", data)
        about = f"Root-Is-Purelib: false\nTag: py3-none-{said or tag}\n"
        files.writestr("glm4lite-0.1.0.dist-info/WHEEL", about)
    return path


def test_a_wheel_without_the_library_of_its_system_is_refused(tmp_path: Path) -> None:
    for name in ("glm4lite_kernels.so", "README"):
        with pytest.raises(WheelError, match=r"^it should hold glm4lite_kernels\.dll, and holds"):
            examine(wheel(tmp_path, "win_amd64", name, b""))
    with pytest.raises(WheelError, match="is no library"):
        examine(wheel(tmp_path, "win_amd64", "glm4lite_kernels.dll", b"MZ"))


def test_a_tag_of_no_platform_or_another_than_the_name_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WheelError, match="has none of the tags"):
        examine(wheel(tmp_path, "any", "glm4lite_kernels.so", b""))
    with pytest.raises(WheelError, match="Tag: py3-none-any"):
        examine(wheel(tmp_path, "win_amd64", "glm4lite_kernels.dll", b"", "any"))


@pytest.mark.skipif(platform.system() != "Linux" or HERE not in WHEELS["PLATFORMS"], reason="reads a library of Linux")
def test_a_library_of_another_machine_or_with_needs_of_its_own_is_refused(tmp_path: Path) -> None:
    built = native._library().path
    if not built:
        pytest.skip("the native library was not built")
    data = Path(built).read_bytes()
    other = next(tag for tag in WHEELS["PLATFORMS"] if tag.startswith("manylinux") and tag != HERE)
    with pytest.raises(WheelError, match=r"^glm4lite_kernels\.so is for"):
        examine(wheel(tmp_path, other, "glm4lite_kernels.so", data))
    with pytest.raises(WheelError, match=r"needs libstdc\+\+\.so\.6|needs glibc"):  # GCC's own build
        examine(wheel(tmp_path, HERE, "glm4lite_kernels.so", data))
