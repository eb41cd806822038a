"""What is installed, and what is said where it is not: each import is declared, and what is missing is named."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

import glm4lite
from glm4lite.base.extras import MissingPackageError, require

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = {name: ROOT / folder / name for name, folder in (("glm4lite", ""), ("glm4lite_quant", "quant"))}
SOURCES["glm4lite_ui"] = ROOT / "ui" / "glm4lite_ui"
BY_TORCH = {"triton"}  # comes with torch where that is for CUDA
UNTESTED = {"ray"}  # an extra of its own, that is too large for each run of the tests
UNIMPORTED = {"tzdata", "safetensors"}  # data that zoneinfo reads; what a user's script writes checkpoints with

# What a user of the core alone does not have. `prompt_toolkit` is of the core, and only for a terminal.
ABSENT = (
    *("gradio", "nh3", "latex2mathml", "pypdf", "justhtml", "mcp"),
    *("bitsandbytes", "prompt_toolkit", "pdoc", "transformers"),
)
BLOCKER = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose Python, and each that it starts, finds none of the packages in ABSENT."""
    folder = tmp_path_factory.mktemp("core")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "XDG_DATA_HOME": str(folder)}


def run(core: dict[str, str], *arguments: str, says: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=core, input=says, capture_output=True, text=True, timeout=120, check=False)


def command(core: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(core, "-m", "glm4lite", *arguments)


def names(requirements: list[str]) -> set[str]:
    """The distributions that are named, as packages_distributions writes them, in small letters with hyphens."""
    return {re.split(r"[<>=;\[ ]", one)[0].lower().replace("_", "-") for one in requirements}


def declarations() -> list[str]:
    """What a user installs: the dependencies, and those of each extra; an extra may name another."""
    extras = PROJECT["optional-dependencies"]
    found = [*PROJECT["dependencies"], *(one for name in ("documents", "ui", "mcp", "bnb") for one in extras[name])]
    return [one for one in found if not one.startswith("glm4lite[")]


def imported(folder: Path) -> set[str]:
    found = set[str]()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - SOURCES.keys() - BY_TORCH - UNTESTED


def test_every_import_is_of_a_declared_package_and_every_declared_package_is_imported() -> None:
    declared = names(declarations())
    distributions = packages_distributions()
    used = {
        distributions[module][0].lower().replace("_", "-") for folder in SOURCES.values() for module in imported(folder)
    }
    assert used == declared - UNIMPORTED


def test_every_declared_package_has_a_tested_version() -> None:
    tested = names((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    wanted = names([one for extra in PROJECT["optional-dependencies"].values() for one in extra])
    assert names(PROJECT["dependencies"]) | wanted <= tested | {"glm4lite", "tzdata"}


def test_the_oldest_versions_are_those_that_are_declared() -> None:
    """A bound that nobody tries says nothing: each is at most the version that .ci/run --lowest installs."""
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    oldest = {
        name.lower().replace("_", "-"): tried for name, _, tried in (line.partition("==") for line in lines) if tried
    }
    for one in declarations():
        found = re.fullmatch(r"([\w-]+)(?:>=([\d.]+))?.*", one)
        assert found, one
        name = found[1].lower().replace("_", "-")
        if name in ("torch", "tzdata"):
            continue
        numbers = [[int(part) for part in text.split(".")] for text in (found[2], oldest[name])]
        assert numbers[0] <= numbers[1], one


def test_the_version_stands_in_one_place_and_the_licence_is_there() -> None:
    assert version("glm4lite") == glm4lite.__version__
    assert "version" not in PROJECT
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert all((folder / "py.typed").exists() for folder in SOURCES.values())


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    require("this", "json", "torch", extra="ui")
    with pytest.raises(MissingPackageError, match=r"^that needs no_such_one: pip install no_such_one$"):
        require("that", "torch", "no_such_one")
    with pytest.raises(ImportError, match=r"^it needs no_one, no_two: pip install 'glm4lite\[ui\]'$"):
        require("it", "no_one", "no_two", extra="ui")


def test_the_core_answers_with_a_tool_and_loads_a_model(core: dict[str, str]) -> None:
    done = command(core, "chat", "-p", "What is 37 * 24?", "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert "888" in "".join(event["text"] for event in events if event["type"] == "text")
    done = run(core, "-c", "import glm4lite, sys; print(len(glm4lite.load('nano', quant='int8').model.layers))")
    assert done.stdout == "5\n", done.stderr


EVERY_MODULE = """
import importlib, pkgutil, glm4lite, glm4lite_quant
from glm4lite.base.extras import MissingPackageError

for package in (glm4lite, glm4lite_quant):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if found.name.endswith(("__main__", "glm4lite_kernels")):  # the command; a library of C
            continue
        try:
            importlib.import_module(found.name)
        except MissingPackageError as error:
            print(error)
        except ImportError as error:
            print(error.name or error)
"""


def test_no_module_of_the_core_needs_an_extra_and_those_of_an_extra_name_it(core: dict[str, str]) -> None:
    done = run(core, "-c", EVERY_MODULE)
    assert done.returncode == 0, done.stderr
    of_mcp = "using MCP servers needs mcp: pip install 'glm4lite[mcp]'"
    of_windows = "these are calls of Windows"
    # prompt_toolkit has the file of what was typed before
    assert set(done.stdout.splitlines()) - {of_windows} == {of_mcp, "prompt_toolkit"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("ui",), "the web chat needs gradio, nh3, latex2mathml: pip install 'glm4lite[ui]'"),
        pytest.param(
            ("chat", "-p", "hi", "--mcp", "mcp.json"),
            "using MCP servers needs mcp: pip install 'glm4lite[mcp]'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("chat", "-p", "hi", "--quant", "nf4"),
            "nf4 and fp4 need bitsandbytes (No module named 'bitsandbytes'): pip install 'glm4lite[bnb]', or use int4",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ui", "mcp", "bnb"],
)
def test_what_is_used_and_missing_is_one_line_on_stderr(
    core: dict[str, str], arguments: tuple[str, ...], sentence: str
) -> None:
    done = command(core, *arguments)
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (2, "", f"error: {sentence}")


def test_a_pdf_that_cannot_be_read_says_what_reads_it(core: dict[str, str]) -> None:
    code = "from glm4lite_ui.attachments import read\nread(b'%PDF-1.4 of nothing', 'letter.pdf')"
    assert "letter.pdf" in (last := run(core, "-c", code).stderr.splitlines()[-1])
    assert last.endswith("reading a PDF needs pypdf: pip install 'glm4lite[documents]'")


def test_info_names_what_is_missing() -> None:
    from glm4lite.measure.info import _installed

    assert _installed("gradio", "the web chat", "'glm4lite[ui]'")[0].isdigit()
    said = _installed("no-such-one", "the web chat", "'glm4lite[ui]'")
    assert said == "not installed; the web chat: pip install 'glm4lite[ui]'"


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_terminal_without_line_editing_says_so_and_answers(core: dict[str, str], tmp_path: Path) -> None:
    from tests.glm4lite.screen import CTRL_D, ENTER, Screen

    with Screen(tmp_path, PYTHONPATH=core["PYTHONPATH"]) as chat:
        chat.wait_for("(editing, with completion and a history, needs prompt_toolkit: pip install prompt_toolkit)")
        chat.wait_for_prompt()
        chat.type("What is 37 * 24?" + ENTER)
        chat.wait_for("37 * 24 = 888.")
        chat.wait_for_prompt()
        chat.type(CTRL_D)
        assert chat.process.wait(30) == 0
