"""How the command line draws the event stream: for people, or as one JSON object per line."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol, TextIO

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as ProgressBars
from rich.table import Table
from rich.text import Text

from glm4lite.base.events import (
    Done,
    Event,
    Progress,
    Start,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    ToolCallFinished,
    ToolCallStarted,
)
from glm4lite.cli.printable import CONTROL, printable, printable_line

if TYPE_CHECKING:
    from glm4lite.cli.markdown import MarkdownStream


def json_line(value: object) -> str:
    """`value` as one line of JSON, whatever its reader or a terminal takes for a line's end or a command."""
    text = json.dumps(value, ensure_ascii=False)
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


class Notices(logging.Handler):
    """Warnings (a type converted, a head left out), other packages' too, as lines on stderr; never a traceback."""

    def __init__(self, err: TextIO, before: Callable[[], None] = lambda: None) -> None:
        """`before` is called before each line: what is being drawn on the same terminal has to be left alone then."""
        super().__init__(logging.WARNING)
        self._err, self._before = err, before

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # another package's arguments do not fit its format
            message = str(record.msg)
        self._before()
        self._err.write(printable_line(message)[:2000] + "\n")
        self._err.flush()


def ending(done: Done) -> str:
    """What people are told of an answer that did not end by itself; "" of one that did."""
    if done.finish_reason == "length":
        return f"(the answer was cut at {done.new_tokens} tokens: --max-new-tokens or the model's context is used up)"
    return _REASONS.get(done.finish_reason, f"({done.finish_reason})")


class Renderer(Protocol):
    """Where a command's events and remarks go.

    `markdown`: whether that of an answer is drawn, where it can be. `ending`: what is said of how an answer ended.
    """

    markdown: bool = False
    ending: Callable[[Done], str] = staticmethod(ending)

    def show(self, event: Event) -> None: ...

    def remark(self, text: str) -> None: ...

    def end_line(self) -> None: ...

    def close(self) -> None: ...

    def drawn_with(self, shown: str) -> str:
        """The end of a text that was shown which has to be shown again, so that what goes on from it is drawn right."""
        return ""

    def show_all(self, events: Iterable[Event]) -> None:
        """Shows a whole turn, and always leaves the terminal in order."""
        try:
            for event in events:
                self.show(event)
        finally:
            self.close()


class JsonLines(Renderer):
    """Every line of stdout is one event, behind one with the version; remarks go to stderr.

    Of progress there are ten lines a second and each stage's end.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._started = False
        self._next_progress = 0.0

    def show(self, event: Event) -> None:
        if isinstance(event, Progress) and event.done < event.total:
            if time.monotonic() < self._next_progress:
                return
            self._next_progress = time.monotonic() + 0.1
        if not self._started:
            self._started = True
            self._out.write(json_line(Start().to_json()))
        self._out.write(json_line(event.to_json()))
        self._out.flush()

    def remark(self, text: str) -> None:
        self._err.write(printable(text) + "\n")
        self._err.flush()

    def end_line(self) -> None:
        """Every line has its end."""

    def close(self) -> None:
        """Nothing is held back."""


class Terminal(Renderer):
    """The answer on stdout as it comes; thoughts, tool calls, progress and remarks on stderr: pipes stay clean.

    Where stdout is a terminal the answer's Markdown is drawn.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None, markdown: bool = True) -> None:
        self._out = out or sys.stdout
        self.markdown = markdown
        self._drawn: MarkdownStream | None = None  # the text that is being drawn
        self._console = Console(file=err or sys.stderr, highlight=False, emoji=False)
        self._bars: ProgressBars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._line_open: str | None = None  # the stream whose last line has no end yet
        self._written_call = ""  # the id of the call that is being drawn as it is written

    def show(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._progress(event)
            return
        self._close_bars()
        if isinstance(event, TextDelta):
            self._write("text", event.text)
        elif isinstance(event, ThinkingDelta):
            self._write("thinking", event.text)
        elif isinstance(event, ToolCallDelta):
            self._write_call(event)
        elif isinstance(event, ToolCallStarted):
            self._call(event)
        elif isinstance(event, ToolCallFinished):
            self._note("  ", ("->", "red" if event.error else "green"), f" {event.content}")
        elif isinstance(event, Done):
            self._done(event)

    def remark(self, text: str) -> None:
        self._close_bars()
        self._note((text, "dim"))

    def close(self) -> None:
        self._close_bars()
        self.end_line()

    def _write_call(self, event: ToolCallDelta) -> None:
        """A call as it grows, for people; a log gets it as a whole."""
        if not self._console.is_terminal:
            return
        if event.id != self._written_call:
            self.end_line()
            self._console.print(_text((event.name, "cyan"), "("), end="", soft_wrap=True)
            self._written_call, self._line_open = event.id, "call"
        self._console.print(_text(event.arguments), end="", soft_wrap=True)

    def _call(self, event: ToolCallStarted) -> None:
        if event.id == self._written_call:
            self._console.print(")", end="")
            self.end_line()
        else:
            self._note((event.name, "cyan"), f"({json.dumps(event.arguments, ensure_ascii=False)})")

    def _write(self, stream: str, text: str) -> None:
        if self._line_open not in (None, stream):
            self.end_line()
        if stream == "text" and (drawn := self._drawing()) is not None:
            drawn.feed(text)
        elif stream == "text":
            self._out.write(printable(text) if self._out.isatty() else text)
            self._out.flush()
        else:
            self._console.print(_text((text, "dim")), end="", soft_wrap=True)
        if text:
            self._line_open = None if text.endswith("\n") and self._drawn is None else stream

    def _drawing(self) -> MarkdownStream | None:
        """What draws the answer, until its last line is ended; None where it is written as it is."""
        if self._drawn is None and self._line_open is None and self._can_draw():
            from glm4lite.cli.markdown import MarkdownStream

            self._drawn = MarkdownStream(self._out)
        return self._drawn

    def _can_draw(self) -> bool:
        from glm4lite.cli.markdown import can_draw

        return self.markdown and can_draw(self._out)

    def drawn_with(self, shown: str) -> str:
        """The last block of Markdown: in the middle of a block of code, a line is code."""
        from glm4lite.cli.markdown import last_block

        return last_block(shown) if self._can_draw() else ""

    def end_line(self) -> None:
        """Ends a text or a thought whose last line is open; what comes then begins a line."""
        if self._drawn is not None:
            self._drawn.finish()
            self._drawn = None
        elif self._line_open == "text":
            self._out.write("\n")
            self._out.flush()
        elif self._line_open in ("thinking", "call"):
            self._console.print()
        self._line_open, self._written_call = None, ""

    def _note(self, *parts: str | tuple[str, str]) -> None:
        self.end_line()
        self._console.print(_text(*parts), soft_wrap=True)

    def _done(self, event: Done) -> None:
        self.end_line()
        if said := self.ending(event):
            self._note((said, "yellow"))
        if self._console.is_terminal:
            self._note(
                (
                    f"{event.new_tokens} tokens, {event.tokens_per_s} tok/s; prompt {event.prompt_tokens} tokens, "
                    f"{event.prefilled_tokens} computed",
                    "dim",
                )
            )

    def _progress(self, event: Progress) -> None:
        if not self._console.is_terminal:
            return
        if self._bars is None:
            amount = (DownloadColumn(), TransferSpeedColumn()) if event.unit == "bytes" else (MofNCompleteColumn(),)
            columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
            self._bars = ProgressBars(*columns, console=self._console, transient=True)
            self._bars.start()
        if event.stage not in self._tasks:
            begun = self._bars.add_task(event.stage, total=event.total, completed=event.done)
            self._tasks[event.stage] = begun  # what is there already was not fetched in this moment
        self._bars.update(self._tasks[event.stage], completed=event.done, total=event.total)
        if event.done >= event.total:
            self._close_bars()

    def _close_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks.clear()


def _text(*parts: str | tuple[str, str]) -> Text:
    """For rich: texts, some with a style. Not its markup, which no escaping keeps out after a backslash."""
    pairs = ((part, "") if isinstance(part, str) else part for part in parts)
    return Text.assemble(*((printable(text), style) for text, style in pairs))


_REASONS = {
    "stop": "",
    "cancelled": "(stopped)",
    "tool_rounds": "(stopped: the model kept calling tools)",
}


def print_table(rows: list[tuple[str, ...]], out: TextIO) -> None:
    """A table, the first row as its header; as wide as it is, also where `out` is no terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*(Text(printable_line(cell)) for cell in row))
    width = max(Console(file=out).width, Console(width=1000).measure(table).maximum)
    Console(file=out, width=width).print(table)
