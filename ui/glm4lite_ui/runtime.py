"""What the page works with: the model's worker, the tools, the saved chats, the answers under way."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from glm4lite.engine import Engine
from glm4lite.errors import Glm4liteError
from glm4lite.inventory import devices
from glm4lite.sampling import SamplingParams
from glm4lite.session import ChatSession
from glm4lite.tools import Tool
from glm4lite.worker import EngineWorker
from glm4lite_ui.answering import Answer
from glm4lite_ui.chats import Attachment, Chat, ChatStore, Settings
from glm4lite_ui.history import messages


class BusyError(Glm4liteError):
    """The chat is being answered already, in another window."""


@dataclass
class Runtime:
    """Shared by all windows of the page."""

    worker: EngineWorker
    store: ChatStore
    tools: Sequence[Tool] = ()
    source: str = "nano"
    load_options: dict[str, Any] = field(default_factory=dict)  # of Engine.load, for the next model too
    answers: dict[str, Answer] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def engine(self) -> Engine:
        return self.worker.engine

    def open(self, chat_id: str) -> Chat:
        """The chat as it is now: being answered, saved, or a new one under this id."""
        answer = self.answers.get(chat_id)
        if answer is not None:
            return answer.chat
        return self.store.load(chat_id) if self.store.holds(chat_id) else Chat(id=chat_id)

    def change(self, chat_id: str) -> Chat:
        """As `open`, for changing the turns; raises BusyError while they grow."""
        if chat_id in self.answers:
            raise BusyError("this chat is being answered; stop that first")
        return self.open(chat_id)

    def session(self, chat: Chat) -> ChatSession:
        """A session under the chat's settings. What was computed before is found by the engine."""
        session = ChatSession(
            self.engine, self.chosen(chat.settings), params=self.params(chat.settings), compute=self.worker.run
        )
        session.allowed.update(chat.settings.always)
        return session

    def params(self, settings: Settings) -> SamplingParams:
        """The chat's sampling settings over the checkpoint's; raises SamplingError."""
        return self.engine.params(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
        )

    def chosen(self, settings: Settings) -> list[Tool]:
        """The tools that are on in a chat; none where the model's template has no place for them."""
        if not self.engine.chat_template().takes_tools:
            return []
        return [tool for tool in self.tools if settings.tools is None or tool.name in settings.tools]

    @contextmanager
    def answering(self, chat: Chat) -> Iterator[Answer]:
        """An Answer to the chat's last turn, known to the other windows; the chat is saved before and after it.

        Raises:
            BusyError: the chat is being answered already.
        """
        with self._lock:
            if chat.id in self.answers:
                raise BusyError("this chat is being answered; stop that first")
            answer = self.answers[chat.id] = Answer(chat, self.session(chat))
        try:
            chat.name_after_first_turn()
            self.store.save(chat)
            yield answer
        finally:
            answer.stop()
            try:
                self.store.save(chat)
            finally:
                self.answers.pop(chat.id, None)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.engine.tokenizer.encode(text))

    def attachment(self, name: str, data: bytes) -> Attachment:
        """A text file as it goes into the prompt; Glm4liteError for what is no text."""
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Glm4liteError(f"{name} is not a UTF-8 text file: {error.reason} at byte {error.start}") from None
        if "\0" in text:
            raise Glm4liteError(f"{name} is not a text file")
        return Attachment(name, text, self.count(text))

    def drop_oldest(self, chat: Chat) -> int:
        """Drops turns, oldest first, until the rest leaves a quarter of the context free; how many were dropped.

        The last turn stays: where it alone is too long, nothing more can be dropped.
        """
        session, dropped = self.session(chat), 0
        limit = self.engine.model.context * 3 // 4
        for turn in chat.turns[:-1]:
            if session.prompt_tokens(messages(chat)) <= limit:
                break
            dropped += not turn.dropped
            turn.dropped = True
        return dropped

    def weight_bytes(self) -> int:
        """Of all weights, wherever they lie."""
        return sum(place["weights"] for place in devices(self.engine.model).values())

    def close(self) -> None:
        """Stops every answer and the engine's thread; what was said is saved."""
        for answer in list(self.answers.values()):
            answer.stop()
        self.worker.close()
