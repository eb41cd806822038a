"""Completion as typer installs it: a real bash is asked for what goes on from a command that is not finished."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import forked

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")

# What bash's own completion does: it splits the line and calls the function that is registered for the command.
ASK = """
source ~/.bashrc
COMP_LINE="$1"; COMP_POINT=${#COMP_LINE}
read -ra COMP_WORDS <<< "$1"
[[ "$1" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
function=$(complete -p glm4lite | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function glm4lite
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the command on its PATH and completion installed by the command itself."""
    home = tmp_path_factory.mktemp("home")
    command = home / "bin" / "glm4lite"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m glm4lite "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    (home / "nano").mkdir()
    (home / "my-model").mkdir()
    (home / "file.txt").touch()
    # typer looks for the shell that asks among the parents: bash must stay one and not become the command
    installed = in_bash(home, "glm4lite --install-completion; exit $?")
    assert "bash completion installed" in installed
    return home


def in_bash(home: Path, script: str, *arguments: str) -> str:
    environment = os.environ | {"HOME": str(home), "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [str(BASH), "-c", script, "bash", *arguments]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("glm4lite qu", ["quantize"]),
        ("glm4lite u", ["ui"]),
        ("glm4lite chat --no-h", ["--no-history"]),
        ("glm4lite chat --quant in", ["int4", "int8"]),
        ("glm4lite serve --kv ", ["auto", "float", "int8"]),
        ("glm4lite chat --approve e", ["every"]),
        ("glm4lite plan n", ["nano"]),
        ("glm4lite plan m", ["my-model"]),
        ("glm4lite chat --mcp f", [""]),  # bash itself completes file names then
    ],
)
def test_bash_completes(line: str, completions: list[str], home: Path) -> None:
    assert in_bash(home, ASK, line).splitlines() == completions


@pytest.mark.parametrize("command", ["", "chat", "plan", "quantize", "ui"])
def test_h_is_help(command: str) -> None:
    arguments = [*command.split(), "-h"]
    done = subprocess.run([*forked(), *arguments], capture_output=True, text=True, timeout=60, check=True)
    assert f"Usage: glm4lite {command}".rstrip() in done.stdout
