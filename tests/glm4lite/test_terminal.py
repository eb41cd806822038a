"""The terminal shows what a model says and obeys none of it."""

import json
import sys

import pytest

from glm4lite.base.events import Done, Event, Progress, TextDelta, ThinkingDelta, ToolCallFinished, ToolCallStarted
from glm4lite.cli.printable import printable
from glm4lite.cli.terminal import JsonLines, Terminal

TURN: list[Event] = [
    Progress("prefill", 512, 1024, "tokens"),
    Progress("prefill", 1024, 1024, "tokens"),
    ThinkingDelta("Let me see"),
    ToolCallStarted("1", "look", {"what": "[bold]x[/] \x1b[2J"}),
    ToolCallFinished("1", "look", "Error: [red] 1:100:2\x1b]0;owned\x07", error=True),
    TextDelta("An an"),
    TextDelta("swer"),
    Done(1024, 9, "length", 3.0, 1024),
]


def test_answers_go_to_stdout_and_the_rest_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().show_all(TURN)
    found = capsys.readouterr()
    assert found.out == "An answer\n"
    for text in ("Let me see", '"what": "[bold]x[/]', "Error: [red] 1:100:2", "the answer was cut"):
        assert text in found.err


def test_control_characters_never_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    Terminal(markdown=False).show_all(iter([*TURN, TextDelta("\x1b[31mred \x9b1A up\x07"), ThinkingDelta("\x1b[1A")]))
    found = capsys.readouterr()
    assert not set("\x1b\x9b\x07") & set(found.out + found.err)


@pytest.mark.parametrize("text", ["C:\\\\", "\\\\\\", "[/]", "[bold]\\[/]", "[link=http://x]y", ":smile:"])
def test_no_text_is_markup(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    call: list[Event] = [ToolCallStarted("1", text, {"what": text}), ToolCallFinished("1", text, text, error=False)]
    Terminal().show_all(iter([*call, ThinkingDelta(text + "\n")]))
    started, finished, thought = capsys.readouterr().err.splitlines()
    assert started == text + "(" + json.dumps({"what": text}) + ")"
    assert finished == "  -> " + text
    assert thought == text


def test_a_line_of_json_has_one_end_and_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a\x85b\u2028c\x9b2Jd\u202ee\x7f 你好"
    JsonLines().show(TextDelta(text))
    _, line = capsys.readouterr().out.splitlines()
    assert json.loads(line)["text"] == text
    assert line.isprintable()
    assert "你好" in line


def test_line_ends_tabs_and_letters_stay() -> None:
    assert printable("a\r\n\tb 中文 é🙂") == "a\n\tb 中文 é🙂"
    assert printable("a\rb\u202e") == "a\ufffdb\ufffd"


def test_progress_in_json_is_thinned_and_its_end_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    JsonLines().show_all(Progress("load", done, 5000, "bytes") for done in range(1, 5001))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"type": "start", "version": 1}
    assert 3 <= len(lines) < 50
    assert lines[-1] == {"type": "progress", "stage": "load", "done": 5000, "total": 5000, "unit": "bytes"}
