"""Asking in a terminal whether a tool may run."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

from glm4lite.cli.streams import echo
from glm4lite.text.messages import ToolCall
from glm4lite.tools.running import abandoned
from glm4lite.tools.tool import Tool

if TYPE_CHECKING:
    from glm4lite.chat.session import ChatSession
    from glm4lite.cli.terminal import Renderer

QUESTION = "run {name}? [y]es, [n]o, [a]lways in this chat: "


class TerminalApproval:
    """The `approve` of a session in a terminal: shows what would run and reads y, n or a from the keyboard."""

    def __init__(self, session: ChatSession, renderer: Renderer) -> None:
        self._session, self._renderer = session, renderer

    def __call__(self, call: ToolCall, tool: Tool) -> bool:
        for name, value in json.loads(call.arguments).items():
            if isinstance(value, str) and "\n" in value:  # code is read in lines, not in JSON
                self._renderer.remark(f"{name}:\n" + _marked(value))
        if tool.caution:
            self._renderer.remark(tool.caution)
        _forget_typed_ahead()
        while True:
            sys.stderr.write(QUESTION.format(name=tool.full_name))
            sys.stderr.flush()
            with echo(True):
                answer = _line()
            if answer is None:
                return False
            if answer in ("a", "always"):
                self._session.allowed.add(tool.name)
            if answer in ("y", "yes", "n", "no", "a", "always"):
                return answer[0] != "n"


def _marked(text: str) -> str:
    """`text` with a bar before each line on the screen, so that none of it can pass for the question below it."""
    from rich.cells import chop_cells

    width = max(shutil.get_terminal_size().columns - 5, 20)
    lines = (line.expandtabs(4) for line in text.split("\n"))
    return "\n".join(f"  | {piece}" for line in lines for piece in chop_cells(line, width) or [""])


def _line() -> str | None:
    """What is typed next; None at the end of input or when the call was stopped meanwhile."""
    if sys.platform != "win32":  # input() would read on after Ctrl-C stopped the answer, and take the next question
        import select

        while not select.select([sys.stdin], [], [], 0.1)[0]:
            if abandoned().is_set():
                return None
    line = sys.stdin.readline()
    return line.strip().lower() if line else None


def _forget_typed_ahead() -> None:
    """A key pressed before the question was seen answers nothing."""
    if not sys.stdin.isatty():
        return
    if sys.platform == "win32":
        import msvcrt

        while msvcrt.kbhit():
            msvcrt.getwch()
    else:
        import termios

        termios.tcflush(sys.stdin, termios.TCIFLUSH)
