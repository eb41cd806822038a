"""One answer: a session's events, read in a thread of their own, grow the chat's last turn.

Any number of windows may watch it; it goes on while a window looks at another chat, and stops when none is left.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from glm4lite.base.errors import ContextLengthError, Glm4liteError, said_by
from glm4lite.base.events import (
    Done,
    Event,
    Progress,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    ToolCallFinished,
    ToolCallStarted,
)
from glm4lite.chat.session import ChatSession
from glm4lite.text.messages import Message, ToolCall
from glm4lite.text.template import Begun
from glm4lite.tools.tool import Tool
from glm4lite_ui.chats import Chat, Counts, Part, Turn
from glm4lite_ui.history import cut_answer, messages, question

logger = logging.getLogger("glm4lite")

LEFT_S = 2.0  # without any window before an answer stops: a page that is loaded again comes back sooner
Decision = Literal["approve", "deny", "always"]


@dataclass
class Asking:
    """A call that waits for the user's word."""

    call: ToolCall
    tool: Tool
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    decided: threading.Event = field(default_factory=threading.Event)
    decision: Decision = "deny"


class TurnWriter:
    """Writes events into a turn. `history` is the session's, where a call stands as the model wrote it.

    Of a turn that is gone on with, the events tell the last round anew: it stays until the first of them, and the time
    that its thought and text took counts on.
    """

    def __init__(self, turn: Turn, history: list[Message]) -> None:
        self.turn, self.history = turn, history
        self._round = turn.parts[-1].round if turn.parts else 0
        self._told_anew = [part for part in turn.parts if part.round == self._round]
        self._spent = {part.kind: part.seconds or 0.0 for part in self._told_anew}
        self.pieces, self.first_piece = 0, 0.0  # of text, for the speed while it goes on
        self.progress: Progress | None = None
        self.written: dict[str, Part] = {}  # calls that are being written, or were and wait to run, by their ids
        self._running: Part | None = None
        self._batch: int | None = None  # place in the history of the message that made the last call
        self._since = time.monotonic()

    def write(self, event: Event) -> None:
        """Adds one event at this moment."""
        self.progress = event if isinstance(event, Progress) else None
        match event:
            case ThinkingDelta():
                self._say("thinking", event.text)
            case TextDelta():
                self._drop_written()
                self._say("text", event.text)
            case ToolCallDelta():
                self._write_call(event)
            case ToolCallStarted():
                self._start_call(event)
            case ToolCallFinished() if (part := self._running) is not None:
                part.text, part.error, part.seconds = event.content, event.error, self._seconds()
            case Done():
                self._close()
                self.turn.counts = Counts(**vars(event))

    def finish(self) -> None:
        """The answer ended, maybe in the middle: nothing stays open."""
        self._drop_written()
        self._close()

    def _say(self, kind: Literal["thinking", "text"], text: str) -> None:
        self.first_piece = self.first_piece or time.monotonic()
        self.pieces += 1
        self._tell_anew()
        last = self.turn.parts[-1] if self.turn.parts else None
        if last is not None and last.kind == "call" and last.round == self._round:
            self._next_round()
        if last is None or last.kind != kind or last.round != self._round:
            self._open(Part(kind, self._round))
        self.turn.parts[-1].text += text

    def _write_call(self, event: ToolCallDelta) -> None:
        """A call grows from its name on; it stays where it is made, and goes where it becomes text."""
        self.first_piece = self.first_piece or time.monotonic()
        self.pieces += 1
        self._tell_anew()
        if event.id not in self.written:
            last = self.turn.parts[-1] if self.turn.parts else None
            if last is not None and last.kind == "call" and last.seconds is not None and last.round == self._round:
                self._next_round()
            part = self.written[event.id] = Part("call", self._round, name=event.name)
            self._open(part)
        self.written[event.id].arguments += event.arguments

    def _start_call(self, event: ToolCallStarted) -> None:
        self._tell_anew()
        place, call = _find_call(self.history, event.id)
        written = self.written.pop(event.id, None)
        if written is None and self._batch is not None and place != self._batch:
            self._next_round()
        self._batch = place
        if written is None:
            written = Part("call", self._round, name=call.name)
            self._open(written)
        written.arguments, self._running, self._since = call.arguments, written, time.monotonic()

    def _drop_written(self) -> None:
        """What was written as calls and is none."""
        dropped = [id(part) for part in self.written.values()]
        self.turn.parts = [part for part in self.turn.parts if id(part) not in dropped]
        self.written.clear()

    def _tell_anew(self) -> None:
        if self._told_anew:
            self.turn.parts = self.turn.parts[: -len(self._told_anew)]
            self._told_anew = []

    def _next_round(self) -> None:
        self._round, self._batch = self._round + 1, None

    def _open(self, part: Part) -> None:
        self._close()
        self._since = time.monotonic()
        self.turn.parts.append(part)

    def _close(self) -> None:
        last = self.turn.parts[-1] if self.turn.parts else None
        if last is not None and last.seconds is None and last.kind != "call":
            last.seconds = round(self._seconds() + self._spent.pop(last.kind, 0.0), 3)

    def _seconds(self) -> float:
        return round(time.monotonic() - self._since, 3)


def _find_call(history: list[Message], call_id: str) -> tuple[int, ToolCall]:
    for place in range(len(history) - 1, -1, -1):
        for call in history[place].tool_calls:
            if call.id == call_id:
                return place, call
    raise LookupError(call_id)


class Answer:
    """The answer to a chat's last turn, once `start` was called; `stop` and `decide` may come from any thread.

    With `resume` it goes on where the turn's answer was cut; what is there stays where that fails.
    `ended` is called with it when all was said, before `over` is set. `permission` says what the chat keeps of a tool
    that is allowed for good.
    """

    def __init__(
        self,
        chat: Chat,
        session: ChatSession,
        ended: Callable[[Answer], None],
        resume: bool = False,
        permission: Callable[[Tool], str] = lambda tool: tool.full_name,
    ) -> None:
        self.chat, self.session, self._permission = chat, session, permission
        self.turn = chat.turns[-1]
        self.asking: Asking | None = None
        self.context_full = False
        self.started = time.monotonic()
        self.over = threading.Event()
        self._ended, self._cancel = ended, threading.Event()
        self._windows, self._lock = set[str](), threading.Lock()
        self._begun: Begun | None = None
        if resume:
            session.messages[:], self._begun = cut_answer(chat)
        else:
            session.messages[:] = messages(chat, len(chat.turns) - 1)
        self.turn.error = None
        session.approve = self.approve
        self.writer = TurnWriter(self.turn, session.messages)
        self._thread = threading.Thread(target=self._read, name=f"chat-{chat.id}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @contextmanager
    def watched_by(self, window: str) -> Iterator[None]:
        """For as long as a window is open. Some seconds after the last one was closed, the answer stops."""
        with self._lock:
            self._windows.add(window)
        try:
            yield
        finally:
            with self._lock:
                self._windows.discard(window)
            if not self._windows and not self.over.is_set():
                leaving = threading.Timer(LEFT_S, self._stop_unwatched)
                leaving.daemon = True
                leaving.start()

    def stop(self) -> None:
        """Ends the answer; a call that waits for the user's word is denied."""
        self._cancel.set()
        if (asking := self.asking) is not None:
            asking.decided.set()

    def decide(self, asked: str, decision: Decision) -> None:
        """The user's word on the call that was shown; nothing where that waits no longer."""
        if (asking := self.asking) is not None and asking.id == asked:
            asking.decision = decision
            asking.decided.set()

    def approve(self, call: ToolCall, tool: Tool) -> bool:
        """Asks the user and waits; called in the thread that runs the tool."""
        self.asking = asking = Asking(call, tool)
        if self._cancel.is_set():
            asking.decided.set()
        asking.decided.wait()
        self.asking = None
        if asking.decision == "always":
            self.chat.settings.always.append(self._permission(tool))
            self.session.allowed.add(tool.name)
        return asking.decision != "deny"

    def _stop_unwatched(self) -> None:
        if not self._windows:
            self.stop()

    def _read(self) -> None:
        try:
            for event in self._events():
                self.writer.write(event)
        except BaseException as error:  # is shown on the page; this thread has nobody to tell
            self._fail(error)
        finally:
            self.writer.finish()
            try:
                self._ended(self)
            finally:
                self.over.set()

    def _events(self) -> Iterator[Event]:
        if self._begun is not None:
            return self.session.resume(self._begun.text, self._begun.thinking, self._cancel)
        return self.session.send(question(self.turn), self._cancel)

    def _fail(self, error: BaseException) -> None:
        self.context_full = isinstance(error, ContextLengthError)
        if not isinstance(error, Glm4liteError):
            logger.error("the answer failed", exc_info=error)
        self.turn.error = said_by(error)
