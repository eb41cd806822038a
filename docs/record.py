"""Draws docs/chat.svg: a real run of the README's command in a terminal. `python docs/record.py`"""

from __future__ import annotations

import io
import os
import pty
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = ('glm4lite chat -p "What is 37 * 24?"', 'glm4lite chat -p "东京现在几点？"')


def terminal_output(command: str) -> str:
    """What the command writes to a terminal of 100 columns, escape sequences included."""
    output = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 65536)
        output.extend(data)
        return data

    os.environ.update(COLUMNS="100", TERM="xterm-256color")
    pty.spawn([sys.executable, "-m", *shlex.split(command)], read)
    return output.decode("utf-8", "replace")


def last_frame(output: str) -> Text:
    """The lines that stay: a progress bar goes one line up and clears it when it is done."""
    shown: list[Text] = []
    for line in output.split("\n"):
        if "\x1b[1A" in line and shown:
            shown.pop()
        shown.append(Text.from_ansi(line.rsplit("\x1b[2K", 1)[-1].rstrip("\r")))
    return Text("\n").join(line for line in shown if line.plain.strip())


def main() -> None:
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    for command in COMMANDS:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        console.print(last_frame(terminal_output(command)), soft_wrap=True)
        console.print()
    console.save_svg(str(Path(__file__).with_name("chat.svg")), title="glm4lite")


if __name__ == "__main__":
    main()
