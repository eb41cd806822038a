"""Reading what a user types: one line, or several as one question.

Three ways make several lines: pasting them, `\"\"\"` before and behind them, a backslash before Enter. Where stdin and
stdout are a terminal that can move its cursor, prompt_toolkit edits the text; elsewhere lines are read one by one.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from glm4lite.base.extras import MissingPackageError, require
from glm4lite.cli.streams import is_interactive, lent_terminal, piped_line, piped_lines, streams

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

BLOCK = '"""'
PROMPT, CONTINUED = "> ", ". "

# For the text before the cursor: what may stand there, and at which place before the cursor it begins (<= 0).
Offers = Callable[[str], Iterable[tuple[str, int]]]


@dataclass(frozen=True)
class Typed:
    """What came at once. `by_hand`: at a terminal, so that commands and files in it count; `pasted` parts name none."""

    text: str
    pasted: tuple[str, ...] = ()
    by_hand: bool = True


class Keyboard(Protocol):
    """Where the questions of a conversation come from."""

    def read(self) -> Typed | None:
        """The next one; None at the end. KeyboardInterrupt where Ctrl-C gave it up."""


def opened(offers: Offers, history: Path | None, remark: Callable[[str], None]) -> Keyboard:
    """The keyboard that fits the streams; `history` None: what is typed is not kept."""
    if not is_interactive():
        return Pipe()
    if streams().out.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown"):
        try:
            require("editing, with completion and a history,", "prompt_toolkit")
            return EditedKeyboard(offers, history, remark)
        except MissingPackageError as missing:
            remark(f"({missing})")
    return LineKeyboard()


def unfinished(text: str) -> bool:
    """Whether a `\"\"\"` block was begun, at the start or behind a command's words, that has no end yet."""
    return re.match(rf"\s*(/\w+ \w+ )?{BLOCK}", text) is not None and text.count(BLOCK) == 1


def unquoted(text: str) -> str:
    """The inside of a text that is one `\"\"\"` block; any other as it is."""
    inner = text.strip()
    whole = len(inner) >= 2 * len(BLOCK) and inner.startswith(BLOCK) and inner.endswith(BLOCK)
    return inner[len(BLOCK) : -len(BLOCK)].strip("\n") if whole and inner.count(BLOCK) == 2 else text


class Pipe:
    """Each line of stdin is a turn."""

    def __init__(self) -> None:
        self._lines = piped_lines()

    def read(self) -> Typed | None:
        line = piped_line(self._lines)
        return Typed(line, by_hand=False) if line else None


class LineKeyboard:
    """Lines as the terminal gives them."""

    def __init__(self) -> None:
        with suppress(ImportError):  # Windows has its own line editing
            import readline  # noqa: F401  # gives input() editing and history

    def read(self) -> Typed | None:
        try:
            text = _line(PROMPT)
            while text.endswith("\\") or unfinished(text):
                text = text.removesuffix("\\") + "\n" + _line(CONTINUED)
        except EOFError:
            return None
        except KeyboardInterrupt:  # behind the line that was given up
            streams().out.write("\n")
            raise
        return Typed(text)


def _line(prompt: str) -> str:
    with lent_terminal():
        return input(prompt if streams().out.isatty() else "")


class EditedKeyboard:
    """Editing over several lines, history, completion with Tab and while a command or a file is typed."""

    def __init__(self, offers: Offers, history: Path | None, remark: Callable[[str], None]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.filters import Condition

        self._pasted: deque[str] = deque(maxlen=32)  # also for texts that are brought back from the history
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUED,
            history=_history(history, remark),
            completer=_completer(offers),
            complete_while_typing=Condition(self._names_something),
            complete_in_thread=True,
            key_bindings=self._keys(),
            enable_suspend=True,
            reserve_space_for_menu=6,
            **_streams(),
        )

    def read(self) -> Typed | None:
        try:
            text = self._session.prompt()
        except EOFError:
            return None
        # bytes that are no UTF-8 come as surrogates
        return Typed(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), tuple(self._pasted))

    def _names_something(self) -> bool:
        before = self._session.default_buffer.document.text_before_cursor
        return before.startswith("/") or "@" in before.rpartition(" ")[2]

    def _keys(self) -> KeyBindings:
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.keys import Keys

        keys = KeyBindings()
        keys.add("enter")(_enter)
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        keys.add(Keys.BracketedPaste)(self._paste)
        return keys

    def _paste(self, event: KeyPressEvent) -> None:
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        if "\n" in text.strip():
            self._pasted.append(text.strip())
        event.current_buffer.insert_text(text)


def _enter(event: KeyPressEvent) -> None:
    """Sends the text, unless it goes on."""
    buffer = event.current_buffer
    if buffer.document.text_before_cursor.endswith("\\"):
        buffer.delete_before_cursor()
        buffer.insert_text("\n")
    elif unfinished(buffer.text):
        buffer.insert_text("\n")
    else:
        buffer.validate_and_handle()


def _history(file: Path | None, remark: Callable[[str], None]) -> Any:
    from prompt_toolkit.history import InMemoryHistory

    if file is None:
        return InMemoryHistory()
    from glm4lite.cli.chat.history import PrivateHistory

    try:
        return PrivateHistory(file)
    except OSError as error:
        remark(f"(what you type is not kept: {file}: {error.strerror})")
        return InMemoryHistory()


def _streams() -> dict[str, Any]:
    """prompt_toolkit's ends of the terminal.

    It is not asked where its cursor is: a slow terminal's reply would be read as an answer to the next question.
    """
    from prompt_toolkit.output import create_output
    from prompt_toolkit.output.vt100 import Vt100_Output

    output = create_output(streams().out)
    if isinstance(output, Vt100_Output):
        output.enable_cpr = False
    return {"output": output}


def _completer(offers: Offers) -> Any:
    from prompt_toolkit.completion import Completer, Completion

    class Offered(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            for text, start in offers(document.text_before_cursor):
                yield Completion(text, start_position=start)

    return Offered()
