"""Makes the wheels with the native kernels inside, each system's on this one machine, and reads and runs what it made.

    python quant/wheels.py OUT [PLATFORM ...]

zig (the package ziglang: Clang, and every system's C library) compiles, scikit-build-core packs. Each library is then
read: it offers the C interface and nothing else, and needs nothing but what its system has. The check program of check/
runs with it, directly or under an emulator; where there is none, that is said. Needs the extra `wheels`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import lief

ROOT = Path(__file__).parents[1]
# What dyld may find of a library beside its interface: C++'s operators new and delete, which zig cannot hide there.
NEW_AND_DELETE = re.compile(r"_Z(na|nw|da|dl)\w+$|_mh_dylib_header$|__dso_handle$")


class WheelError(Exception):
    """A wheel is not what it has to be."""


@dataclass(frozen=True)
class System:
    """What a system calls a library, which of its own one may need, and the oldest version it has to load in."""

    name: str  # CMake's
    library: str
    provided: re.Pattern[str]
    counted: str  # what the version is of
    oldest: tuple[int, int]


@dataclass(frozen=True)
class Platform:
    """What is compiled for a platform tag, and how it runs here."""

    system: System
    processor: str  # CMake's
    triple: str  # zig's
    machine: object  # in the file's header
    emulator: tuple[str, ...] = ()  # a command that runs the system's programs here
    checked: tuple[str, ...] = ()  # instruction sets, where the emulator would take minutes for all of them

    def runner(self) -> list[str] | None:
        """What comes before a program of this platform on the command line; None where it cannot run here."""
        if (platform.system(), platform.machine()) == (self.system.name, self.processor):
            return []
        return list(self.emulator) if self.emulator and shutil.which(self.emulator[0]) else None


GLIBC = re.compile(r"lib(c|m)\.so\.6|lib(pthread|dl)\.so\.\d|ld-linux-.*\.so\.\d")
LINUX = System("Linux", "glm4lite_kernels.so", GLIBC, "glibc", (2, 28))  # as torch's wheels
WINDOWS = System(
    "Windows", "glm4lite_kernels.dll", re.compile(r"KERNEL32\.dll|api-ms-win-crt-.*\.dll"), "Windows", (10, 0)
)
MAC = System("Darwin", "glm4lite_kernels.dylib", re.compile(r"/usr/lib/libSystem\.B\.dylib"), "macOS", (11, 0))
QEMU = ("qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu")
ELF, PE, MACHO = lief.ELF.ARCH, lief.PE.Header.MACHINE_TYPES, lief.MachO.Header.CPU_TYPE

# None for Alpine and other systems of musl: torch, which every installation needs, has no wheels for them.
PLATFORMS = {
    "manylinux_2_28_x86_64": Platform(LINUX, "x86_64", "x86_64-linux-gnu.2.28", ELF.X86_64),
    "manylinux_2_28_aarch64": Platform(
        LINUX, "aarch64", "aarch64-linux-gnu.2.28", ELF.AARCH64, QEMU, ("neon", "neoni8mm")
    ),
    "win_amd64": Platform(WINDOWS, "AMD64", "x86_64-windows-gnu", PE.AMD64, ("wine",)),
    "win_arm64": Platform(WINDOWS, "ARM64", "aarch64-windows-gnu", PE.ARM64),
    "macosx_11_0_arm64": Platform(MAC, "arm64", "aarch64-macos.11.0", MACHO.ARM64),
    "macosx_11_0_x86_64": Platform(MAC, "x86_64", "x86_64-macos.11.0", MACHO.X86_64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the wheels")
    parser.add_argument("platform", nargs="*", help=f"of {', '.join(PLATFORMS)}; all where none is named")
    options = parser.parse_args()
    if unknown := set(options.platform) - set(PLATFORMS):
        parser.error(f"no such platform: {', '.join(sorted(unknown))}")
    for tag in options.platform or PLATFORMS:
        build = ROOT / "build" / "wheels" / tag
        try:
            wheel = make(tag, options.out, build)
            said = (f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB", examine(wheel), run_check(tag, build))
            print("; ".join(said), flush=True)
        except WheelError as error:
            sys.exit(f"{tag}: {error}")


def make(tag: str, out: Path, build: Path) -> Path:
    """The wheel of a platform in `out`; `build` keeps library and check program. WheelError with what failed."""
    ziglang = importlib.util.find_spec("ziglang")
    if ziglang is None or ziglang.origin is None:
        raise WheelError("zig is missing: pip install 'glm4lite[wheels]'")
    target, zig = PLATFORMS[tag], shutil.which("zig", path=str(Path(ziglang.origin).parent))
    defines = {
        "CMAKE_CXX_COMPILER": f"{zig};c++",
        "CMAKE_CXX_COMPILER_TARGET": target.triple,
        "CMAKE_SYSTEM_NAME": target.system.name,
        "CMAKE_SYSTEM_PROCESSOR": target.processor,
        "CMAKE_TRY_COMPILE_TARGET_TYPE": "STATIC_LIBRARY",  # linking would make zig compile its C++ library once more
        "CMAKE_SHARED_LINKER_FLAGS": "-s",
        "CMAKE_EXE_LINKER_FLAGS": "-s",
        "GLM4LITE_CHECK": "ON",
    }
    settings = {
        "build-dir": str(build),
        "install.strip": "false",  # the linker did; the host's strip knows no other system's files
        "wheel.tags": f"py3-none-{tag}",
        **{f"cmake.define.{name}": value for name, value in defines.items()},
    }
    shutil.rmtree(build, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, str(ROOT)]
        words = [word for name, value in settings.items() for word in ("-C", f"{name}={value}")]
        done = subprocess.run([*pip, *words], capture_output=True, text=True)
        made = list(Path(folder).glob("*.whl"))
        if done.returncode or len(made) != 1:
            raise WheelError(f"no wheel was made\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}")
        flags = re.findall(r"^GLM4LITE_CXX_(\w+):INTERNAL=(1?)$", (build / "CMakeCache.txt").read_text(), re.MULTILINE)
        if not flags or not all(known for _, known in flags):
            raise WheelError(f"the compiler knows not all instruction sets of {target.processor}: {flags}")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy2(made[0], out))


def examine(wheel: Path) -> str:
    """What a wheel needs, in words; WheelError where its tag, its library or what that needs is not as it must be."""
    name, _, tag = wheel.stem.partition("-py3-none-")
    if tag not in PLATFORMS:
        raise WheelError(f"{wheel.name} has none of the tags py3-none-PLATFORM, PLATFORM of {', '.join(PLATFORMS)}")
    target = PLATFORMS[tag]
    with zipfile.ZipFile(wheel) as files:
        libraries = [one for one in files.namelist() if re.search(r"\.(so|dll|dylib|pyd|a|lib|pdb)$", one)]
        if libraries != [f"glm4lite_quant/{target.system.library}"]:
            raise WheelError(
                f"it should hold {target.system.library}, and holds {', '.join(libraries) or 'no library'}"
            )
        about = files.read(f"{name}.dist-info/WHEEL").decode()
        if f"Tag: py3-none-{tag}\n" not in about or "Root-Is-Purelib: false\n" not in about:
            raise WheelError(f"its WHEEL says\n{about}")
        data = files.read(libraries[0])
    return f"{target.system.library} {len(data) / 1e6:.2f} MB, needs {_needs(data, target)}"


@dataclass(frozen=True)
class Library:
    """What stands in a library's file."""

    machine: object
    exported: set[str]
    needed: list[str]
    version: tuple[int, int]  # of its system, at least


def _needs(data: bytes, target: Platform) -> str:
    lief.logging.disable()  # of what zig leaves empty in a file of macOS
    binary = lief.parse(list(data))
    system, file = target.system, target.system.library
    if isinstance(binary, lief.ELF.Binary):
        found = _read_elf(binary)
    elif isinstance(binary, lief.PE.Binary):
        found = _read_pe(binary)
    elif isinstance(binary, lief.MachO.Binary):
        found = _read_macho(binary)
    else:
        raise WheelError(f"{file} is no library")
    if found.machine != target.machine:
        raise WheelError(f"{file} is for {found.machine}, not {target.machine}")
    if foreign := [one for one in found.needed if not system.provided.fullmatch(one)]:
        raise WheelError(f"{file} needs {', '.join(foreign)}, which its system may not have")
    if found.exported != interface():
        there, right = (", ".join(sorted(names)) for names in (found.exported, interface()))
        raise WheelError(f"{file} exports {there}, not {right}")
    version = f"{system.counted} {found.version[0]}.{found.version[1]}"
    if found.version > system.oldest:
        raise WheelError(f"{file} needs {version}, not {system.oldest[0]}.{system.oldest[1]}")
    return f"{', '.join(sorted(one.rpartition('/')[2] for one in found.needed))} ({version})"


def interface() -> set[str]:
    """The functions that csrc/qgemm.h exports."""
    header = (ROOT / "quant" / "csrc" / "qgemm.h").read_text(encoding="utf-8")
    return set(re.findall(r"^GLM4_API \w+ (glm4_\w+)\(", header, re.MULTILINE))


def _read_elf(binary: lief.ELF.Binary) -> Library:
    versions = [str(v.name) for one in binary.symbols_version_requirement for v in one.get_auxiliary_symbols()]
    numbers = [tuple(map(int, v.removeprefix("GLIBC_").split("."))) for v in versions if v.startswith("GLIBC_")]
    version = max(((one[0], one[1]) for one in numbers), default=(0, 0))
    exported = {str(one.name) for one in binary.exported_symbols}
    return Library(binary.header.machine_type, exported, list(map(str, binary.libraries)), version)


def _read_pe(binary: lief.PE.Binary) -> Library:
    export, header = binary.get_export(), binary.optional_header
    exported = set() if export is None else {str(one.name) for one in export.entries}
    needed = [str(one.name) for one in binary.imports]
    version = header.major_subsystem_version, header.minor_subsystem_version
    if any(one.startswith("api-ms-win-crt-") for one in needed):  # a part of the system from then on
        version = max(version, (10, 0))
    return Library(binary.header.machine, exported, needed, version)


def _read_macho(binary: lief.MachO.Binary) -> Library:
    if binary.header.cpu_type == MACHO.ARM64 and not binary.has_code_signature:
        raise WheelError("its library is not signed, and a Mac with an ARM processor loads no such library")
    names = {str(one.name)[1:] for one in binary.exported_symbols}  # C's names have one underscore more there
    exported = {one for one in names if not NEW_AND_DELETE.match(one)}
    needed = [str(one.name) for one in binary.libraries if one.command != lief.MachO.LoadCommand.TYPE.ID_DYLIB]
    lowest = binary.build_version
    version = (99, 0) if lowest is None else (lowest.minos[0], lowest.minos[1])
    return Library(binary.header.cpu_type, exported, needed, version)


def run_check(tag: str, build: Path) -> str:
    """What the check program of `build` said in a few words; WheelError where a kernel is wrong."""
    target = PLATFORMS[tag]
    before = target.runner()
    if before is None:
        return f"not run here{f', for want of {target.emulator[0]}' if target.emulator else ''}"
    program = next(one for one in build.glob("glm4lite_check*") if one.suffix in ("", ".exe"))
    environment = os.environ | {"WINEDEBUG": "-all", "WINEPREFIX": str(build / "wine")}
    parts = ("products", "quantizing", "layers", "threads")  # all that do not depend on the time they get
    words = [*before, str(program), *(target.checked if before else ()), *parts]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    if done.returncode or not lines or not all(line.endswith("all right") for line in lines):
        raise WheelError(f"{program.name} failed\n{done.stdout}\n{done.stderr}")
    return f"{', '.join(line.partition(':')[0] for line in lines)} right {f'under {before[0]}' if before else 'here'}"


if __name__ == "__main__":
    main()
