"""--tools and --approve: the user's own files, each mistake in one line, and who is asked before a tool runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from glm4lite.base.errors import ToolError
from glm4lite.text.messages import ToolCall
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite.tools.running import run_tool
from glm4lite.tools.tool import Tool
from glm4lite.tools.tool_files import load_tools
from glm4lite.tools.toolbox import Toolbox
from tests.commands import forked

WEATHER = '''
from __future__ import annotations
from dataclasses import dataclass
from glm4lite import tool
from glm4lite.tools.builtin.tools import calculator

@dataclass
class Place:
    name: str

@tool
def weather(city: str, days: int = 1) -> str:
    """Forecast for a city.

    Args:
        city: Name of the city.
    """
    return f"{days} days of sun in {Place(city).name}"

same_tool = weather

@tool(needs_approval=lambda arguments: arguments["amount"] > 100)
def pay(amount: float) -> str:
    """Pay."""
    return "paid"
'''


@pytest.fixture
def weather(tmp_path: Path) -> Path:
    file = tmp_path / "weather.py"
    file.write_text(WEATHER)
    return file


def names(tools: tuple[Tool, ...] | list[Tool]) -> list[str]:
    return [tool.name for tool in tools]


def test_the_tools_of_a_file_are_those_it_declares(weather: Path) -> None:
    found = load_tools(weather)
    assert names(found) == ["weather", "pay"]
    assert run_tool(found[0], ToolCall("1", "weather", '{"city": "Oslo"}')).content == "1 days of sun in Oslo"


def test_a_folder_gives_the_tools_of_its_files_which_may_import_each_other(tmp_path: Path) -> None:
    (tmp_path / "_shared_words.py").write_text("WORD = 'hello'")
    for name in ("a", "b"):
        code = f"from glm4lite import tool\nfrom _shared_words import WORD\n@tool\ndef say_{name}() -> str:\n"
        (tmp_path / f"{name}.py").write_text(f"{code}    '''Say it.'''\n    return WORD\n")
    found = load_tools(tmp_path)
    assert names(found) == ["say_a", "say_b"]
    assert run_tool(found[1], ToolCall("1", "say_b", "")).content == "hello"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("def f(:\n", "line 1: "),
        ("\n\nimport no_such_module_here\n", "line 3: ModuleNotFoundError"),
        ("\n1 / 0\n", "line 2: ZeroDivisionError"),
        ("raise SystemExit(3)\n", "SystemExit"),
        ("x = 1\n", "has no @tool function"),
        ("from glm4lite import tool\n@tool\ndef f(a):\n    return a\n", "parameter 'a' has no type"),
        ("from glm4lite import tool\n@tool\ndef f(a: object.__class__):\n    return a\n", "line "),
        ("from glm4lite import tool\n@tool(name='a b')\ndef f() -> str:\n    return ''\n", "a tool's name is"),
        ("from glm4lite import Tool\nt = Tool('t', '', {'type': 'string'}, lambda: 1)\n", "type 'object'"),
        ("from glm4lite import Tool\nt = Tool('t', '', {'type': 'object', 'a': {1}}, lambda: 1)\n", "is not JSON"),
        ("from glm4lite import tool\n@tool\ndef calculator() -> str:\n    return ''\n", "two tools are called"),
        ("\0", "null bytes"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(content)
    with pytest.raises(ToolError) as caught:
        Toolbox([file])
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.py", "notes.txt", "empty"])
def test_what_is_no_file_of_tools_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ToolError, match=name):
        load_tools(tmp_path / name)


def test_builtins_can_be_left_out_and_names_are_unique(weather: Path) -> None:
    assert names(Toolbox().tools) == names(list(BUILTIN_TOOLS))
    assert names(Toolbox([weather], builtins=False).tools) == ["weather", "pay"]
    other = weather.with_name("other.py")
    other.write_text(WEATHER)
    with pytest.raises(ToolError, match="two tools are called 'weather'"):
        Toolbox([weather, other])


def asked(box: Toolbox, name: str, **arguments: object) -> bool:
    tool = next(tool for tool in box.tools if tool.name == name)
    seen = list[str]()

    def approve(call: ToolCall, tool: Tool) -> bool:
        seen.append(tool.name)
        return True

    assert not run_tool(tool, ToolCall("1", name, json.dumps(arguments)), approve=approve).error
    return bool(seen)


def test_a_tool_decides_by_its_arguments_whether_to_ask(weather: Path) -> None:
    box = Toolbox([weather])
    assert asked(box, "pay", amount=1000)
    assert not asked(box, "pay", amount=5)
    assert not asked(box, "weather", city="Oslo")


@pytest.mark.parametrize(("approval", "expected"), [("every", True), ("all", False)])
def test_the_policy_wins_over_the_tools_rule(weather: Path, approval: str, expected: bool) -> None:
    box = Toolbox([weather], approval=approval)
    assert asked(box, "pay", amount=1000) is expected
    assert asked(box, "weather", city="Oslo") is expected
    assert asked(box, "calculator", expression="1 + 1") is expected


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ToolError, match="--approve is 'sometimes'"):
        Toolbox(approval="sometimes")


def test_the_command_line_offers_a_file_of_tools(tmp_path: Path) -> None:
    code = "from glm4lite import tool\n@tool\ndef get_weather(city: str) -> str:\n"
    code += '    """Current weather in a city.\n\n    Args:\n        city: City name.\n    """\n'
    (tmp_path / "mine.py").write_text(code + "    return f'18 degrees and sunny in {city}'\n")
    command = [*forked(), "chat", "-p", "How is the weather in Lisbon?", "--temperature", "0"]
    command += ["--tools", str(tmp_path / "mine.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "18 degrees and sunny in Lisbon" in done.stderr
