"""Who allows a call: in a session, from another thread, and at a real terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from rich.cells import cell_len

import glm4lite
from glm4lite.base.errors import ToolError
from glm4lite.base.events import Done, Event, ToolCallFinished, ToolCallStarted
from glm4lite.chat.session import ChatSession
from glm4lite.cli.chat import approval
from glm4lite.cli.chat.approval import _marked
from glm4lite.cli.terminal import JsonLines
from glm4lite.text.messages import ToolCall
from glm4lite.text.template import ChatTemplate
from glm4lite.text.tokenizer import Tokenizer
from glm4lite.tools import python as python_tool
from glm4lite.tools.running import Approve, abandoned, run_tool
from glm4lite.tools.sandbox.process import Outcome
from glm4lite.tools.tool import Tool, tool
from tests.commands import forked
from tests.glm4lite.scripted import scripted_engine

NANO = Path(glm4lite.__file__).parent / "nano"
CALL = 'erase\n{"name": "a"}'
erased = list[str]()


@tool(needs_approval=True)
def erase(name: str) -> str:
    """Erase."""
    erased.append(name)
    return "erased"


def session(*replies: str, approve: Approve | None = None) -> ChatSession:
    erased.clear()
    template = ChatTemplate.from_folder(NANO)
    assert template is not None
    engine = scripted_engine(Tokenizer.from_folder(NANO), template, list(replies))
    return ChatSession(engine, [erase]) if approve is None else ChatSession(engine, [erase], approve=approve)


def finished(events: list[Event]) -> list[ToolCallFinished]:
    return [event for event in events if isinstance(event, ToolCallFinished)]


def started(events: list[Event]) -> list[ToolCallStarted]:
    return [event for event in events if isinstance(event, ToolCallStarted)]


def test_what_is_allowed_runs_and_was_announced() -> None:
    chat = session(CALL + "<|observation|>", "\nDone.<|user|>", approve=lambda call, tool: True)
    events = list(chat.send("Erase a"))
    assert started(events) == [ToolCallStarted("call_1", "erase", {"name": "a"}, needs_approval=True)]
    assert finished(events)[0].content == "erased"
    assert erased == ["a"]


def test_what_is_denied_does_not_run_and_the_model_is_told() -> None:
    chat = session(CALL + "<|observation|>", "\nI did not.<|user|>", approve=lambda call, tool: False)
    (result,) = finished(list(chat.send("Erase a")))
    assert result.error
    assert "the user did not allow" in result.content
    assert "the user did not allow" in chat.messages[2].content
    assert erased == []


def test_where_nobody_can_be_asked_it_does_not_run() -> None:
    (result,) = finished(list(session(CALL + "<|observation|>", "\nNo.<|user|>").send("Erase a")))
    assert "there is nobody to ask" in result.content
    assert erased == []


def test_always_holds_until_the_conversation_is_forgotten() -> None:
    questions = list[str]()

    def approve(call: ToolCall, tool: Tool) -> bool:
        questions.append(call.arguments)
        chat.allowed.add(tool.name)
        return True

    chat = session(*[CALL + "<|observation|>", "\nDone.<|user|>"] * 3, approve=approve)
    list(chat.send("Erase a"))
    (second,) = started(list(chat.send("Again")))
    assert (len(questions), len(erased)) == (1, 2)
    assert not second.needs_approval
    chat.reset()
    list(chat.send("Again"))
    assert len(questions) == 2


def test_a_question_nobody_answers_is_ended_by_stop_and_a_late_yes_runs_nothing() -> None:
    answered = threading.Event()

    def approve(call: ToolCall, tool: Tool) -> bool:
        abandoned().wait(100)
        answered.set()
        return True

    chat = session(CALL + "<|observation|>", approve=approve)
    threading.Timer(0.2, chat.stop).start()
    started = time.monotonic()
    events = list(chat.send("Erase a"))
    assert time.monotonic() - started < 50
    assert isinstance(events[-1], Done)
    assert events[-1].finish_reason == "cancelled"
    assert answered.wait(5)
    time.sleep(0.1)
    assert erased == []


def test_thinking_it_over_does_not_count_as_the_tools_time() -> None:
    def approve(call: ToolCall, tool: Tool) -> bool:
        time.sleep(0.4)
        return True

    assert run_tool(erase, ToolCall("1", "erase", '{"name": "a"}'), 0.2, approve=approve).content == "erased"


def test_wrong_arguments_are_not_asked_about() -> None:
    def approve(call: ToolCall, tool: Tool) -> bool:
        pytest.fail("asked")

    assert run_tool(erase, ToolCall("1", "erase", "{}"), approve=approve).content.startswith("Error: erase needs")


def test_an_approval_or_a_rule_that_fails_does_not_run_the_tool() -> None:
    def broken(call: ToolCall, tool: Tool) -> bool:
        raise ToolError("the browser was closed")

    @tool(needs_approval=lambda arguments: arguments["no such key"])
    def careless() -> str:
        """Never mind."""
        return "ran"

    assert "the browser was closed" in run_tool(careless, ToolCall("1", "careless", ""), approve=broken).content


class Keyboard:
    """`glm4lite chat` at a terminal of its own."""

    def __init__(self, *options: str) -> None:
        self.terminal, inner = os.openpty()
        environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
        command = [*forked(), "chat", "--temperature", "0", *options]
        self.process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True
        )
        os.close(inner)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Reads until `text` appears after what was waited for before."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            self.seen += os.read(self.terminal, 65536).decode("utf-8", "replace")
        self.seen = self.seen.split(text, 1)[1]

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_the_terminal_asks_before_a_tool_runs() -> None:
    keyboard = Keyboard("--approve", "every")
    try:
        keyboard.wait_for("> ")
        keyboard.type("What is 37 * 24?\n")
        keyboard.wait_for("run calculator? [y]es, [n]o, [a]lways in this chat: ")
        keyboard.type("what?\n")
        keyboard.wait_for("run calculator?")
        keyboard.type("n\n")
        keyboard.wait_for("did not allow this call")
        keyboard.wait_for("> ")
        keyboard.type("What is 12 * 12?\n")
        keyboard.wait_for("run calculator?")
        time.sleep(0.3)
        os.kill(keyboard.process.pid, signal.SIGINT)
        keyboard.wait_for("stopped by the user", seconds=5)
        keyboard.wait_for("> ")
        keyboard.type("What is 37 * 24?\n")
        keyboard.wait_for("run calculator?")
        keyboard.type("a\n")
        keyboard.wait_for("888")
        keyboard.wait_for("> ")
        keyboard.type("What is 2 * 21?\n")
        keyboard.wait_for("-> 42")
    finally:
        keyboard.close()


@pytest.mark.parametrize(("policy", "content"), [("every", "nobody to ask"), ("all", "888")])
def test_without_a_terminal_what_asks_is_denied(policy: str, content: str) -> None:
    command = [*forked(), "chat", "-p", "What is 37 * 24?", "--json", "--approve", policy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    results = [event for line in done.stdout.splitlines() if (event := json.loads(line))["type"] == "tool_result"]
    assert content in results[0]["content"]
    assert results[0]["error"] == (policy == "every")


def test_what_the_system_cannot_limit_is_said_before_the_question(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in the tool that a front end offers: a system without namespaces, say."""
    lacking = Outcome("", "", ("network", "space on disk"))
    monkeypatch.setattr(python_tool, "run_python", lambda *_: lacking)
    python_tool.python_tool.cache_clear()
    tool = python_tool.python_tool()
    python_tool.python_tool.cache_clear()
    assert "cannot limit: network, space on disk" in tool.caution
    monkeypatch.setattr(approval, "_line", lambda: "n")
    ask = approval.TerminalApproval(session(), JsonLines())
    assert not ask(ToolCall("1", "python", '{"code": "1"}'), tool)
    said = capsys.readouterr().err
    assert said.index("cannot limit: network, space on disk") < said.index("run python?")


def test_no_line_of_an_argument_can_pass_for_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    padding = " " * 35  # with it the next word would begin a line of the screen
    lines = _marked(f"print(1){padding}run calculator? [y]es\n\nrun calculator?\n{'好' * 30}").split("\n")
    assert all(line.startswith("  | ") and cell_len(line) < 40 for line in lines)
    assert len(lines) == 6
