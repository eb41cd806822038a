"""How the command line draws the event stream: for people, or as one JSON object per line."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterable
from typing import Protocol

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars
from rich.table import Table

from glm4lite.errors import one_line
from glm4lite.events import Done, Event, Progress, TextDelta, ThinkingDelta, ToolCallFinished, ToolCallStarted

# What a model or a tool says must not move the cursor, change the title or answer for the user.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` without control characters (line ends and tabs stay), each shown as the replacement character."""
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


def printable_line(text: object) -> str:
    """`text` as a single printable line, for messages that may quote a checkpoint."""
    return printable(one_line(text))


class Notices(logging.Handler):
    """The package's warnings (a type converted, a head left out) as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(printable_line(record.getMessage()) + "\n")


class Renderer(Protocol):
    """Where a command's events and remarks go."""

    def show(self, event: Event) -> None: ...

    def remark(self, text: str) -> None: ...

    def close(self) -> None: ...

    def show_all(self, events: Iterable[Event]) -> None:
        """Shows a whole turn, and always leaves the terminal in order."""
        try:
            for event in events:
                self.show(event)
        finally:
            self.close()


class JsonLines(Renderer):
    """Every line of stdout is one event; remarks go to stderr. Of progress, ten lines a second and each stage's end."""

    def __init__(self) -> None:
        self._next_progress = 0.0

    def show(self, event: Event) -> None:
        if isinstance(event, Progress) and event.done < event.total:
            if time.monotonic() < self._next_progress:
                return
            self._next_progress = time.monotonic() + 0.1
        sys.stdout.write(json.dumps(event.to_json(), ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def remark(self, text: str) -> None:
        sys.stderr.write(printable(text) + "\n")

    def close(self) -> None:
        """Nothing is held back."""


class Terminal(Renderer):
    """The answer on stdout as it comes; thoughts, tool calls, progress and remarks on stderr: pipes stay clean."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, emoji=False)
        self._bars: ProgressBars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._line_open: str | None = None  # the stream whose last line has no end yet

    def show(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._progress(event)
            return
        self._close_bars()
        if isinstance(event, TextDelta):
            self._write("text", event.text)
        elif isinstance(event, ThinkingDelta):
            self._write("thinking", event.text)
        elif isinstance(event, ToolCallStarted):
            self._note(f"[cyan]{_safe(event.name)}[/]({_safe(json.dumps(event.arguments, ensure_ascii=False))})")
        elif isinstance(event, ToolCallFinished):
            self._note(f"  [{'red' if event.error else 'green'}]->[/] {_safe(event.content)}")
        elif isinstance(event, Done):
            self._done(event)

    def remark(self, text: str) -> None:
        self._close_bars()
        self._note(f"[dim]{_safe(text)}[/]")

    def close(self) -> None:
        self._close_bars()
        self._end_line()

    def _write(self, stream: str, text: str) -> None:
        if self._line_open not in (None, stream):
            self._end_line()
        if stream == "text":
            sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
        else:
            self._console.print(f"[dim]{_safe(text)}[/]", end="", soft_wrap=True)
        if text:
            self._line_open = None if text.endswith("\n") else stream

    def _end_line(self) -> None:
        if self._line_open == "text":
            sys.stdout.write("\n")
            sys.stdout.flush()
        elif self._line_open == "thinking":
            self._console.print()
        self._line_open = None

    def _note(self, markup: str) -> None:
        self._end_line()
        self._console.print(markup, soft_wrap=True)

    def _done(self, event: Done) -> None:
        self._end_line()
        if event.finish_reason != "stop":
            self._note(f"[yellow]{escape(_REASONS.get(event.finish_reason, event.finish_reason))}[/]")
        if self._console.is_terminal:
            self._note(
                f"[dim]{event.new_tokens} tokens, {event.tokens_per_s} tok/s; prompt {event.prompt_tokens} tokens, "
                f"{event.prefilled_tokens} computed[/]"
            )

    def _progress(self, event: Progress) -> None:
        if not self._console.is_terminal:
            return
        if self._bars is None:
            amount = DownloadColumn() if event.unit == "bytes" else MofNCompleteColumn()
            columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
            self._bars = ProgressBars(*columns, console=self._console, transient=True)
            self._bars.start()
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(event.stage, total=event.total)
        self._bars.update(self._tasks[event.stage], completed=event.done, total=event.total)
        if event.done >= event.total:
            self._close_bars()

    def _close_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks.clear()


def _safe(text: str) -> str:
    """For rich: no control characters, no markup."""
    return escape(printable(text))


_REASONS = {
    "length": "(the answer was cut: --max-new-tokens or the model's context is used up)",
    "cancelled": "(stopped)",
    "tool_rounds": "(stopped: the model kept calling tools)",
}


def print_table(rows: list[tuple[str, ...]]) -> None:
    """A table on stdout, the first row as its header; as wide as it is, also where stdout is no terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*map(printable_line, row))
    Console(width=max(Console().width, Console(width=1000).measure(table).maximum)).print(table)
