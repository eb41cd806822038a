"""The windows that are open, and what each is told: one stream of messages per window, for as long as it is open.

A message says of which chat it speaks, in which visit of it, and its number. A window that has gone on to another chat
drops what still comes for the old one. While an answer grows, the next difference is made when the window has drawn
the last one (`ack`), and not before a tenth of a second has passed: a slow window is told less often, not later.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from glm4lite.base.errors import Glm4liteError, said_by
from glm4lite_ui.answering import Answer
from glm4lite_ui.chats import Chat, Turn
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.thread import SHOWN, Json, TurnView, asking_json, difference, status_json, turn_json

PAUSE_S = 0.1  # between two drawings of an answer that grows
SHARE = 4  # a drawing takes at most a fifth of the time
BEAT_S = 0.3  # between two writes while an answer goes on: a window that left is noticed by what it does not take


class Windows:
    """All that are open. The methods may be called in any thread once one has been opened."""

    def __init__(self, runtime: Runtime, closing: asyncio.Event) -> None:
        self.runtime, self._closing = runtime, closing
        self._open: dict[str, Window] = {}

    async def stream(self, name: str) -> AsyncIterator[str]:
        """The messages of a window as server-sent events, until it goes or the server ends."""
        window = self._open[name] = Window(self.runtime, name, asyncio.get_running_loop())
        ending = asyncio.ensure_future(self._closing.wait())
        ending.add_done_callback(lambda _: window.close())
        try:
            async for message in window.messages():
                yield f"data: {json.dumps(message)}\n\n" if message else ":\n\n"  # a comment
        finally:
            ending.cancel()
            window.close()
            if self._open.get(name) is window:
                del self._open[name]

    def find(self, name: str) -> Window | None:
        return self._open.get(name)

    def changed(self, chat_id: str) -> None:
        """A chat is another than before, or gone."""
        for window in list(self._open.values()):
            window.changed(chat_id)

    def tell(self, message: Json) -> None:
        """Something that is no chat's: to every window."""
        for window in list(self._open.values()):
            window.tell(message)


@dataclass
class _Known:
    """What a window has of the turns it shows, in one visit of a chat."""

    views: dict[str, TurnView] = field(default_factory=dict)
    parts: dict[str, list[Json]] = field(default_factory=dict)
    meta: dict[str, Json] = field(default_factory=dict)

    def keep_only(self, shown: set[str]) -> None:
        """A turn that leaves the window is told whole when it comes back."""
        known: tuple[dict[str, Any], ...] = (self.views, self.parts, self.meta)
        for one in known:
            for turn_id in one.keys() - shown:
                del one[turn_id]


class Window:
    """What one window shows and has been told. `show`, `ack` and `messages` belong to the server's event loop."""

    def __init__(self, runtime: Runtime, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self.runtime, self.name = runtime, name
        self._loop, self._wake = loop, asyncio.Event()
        self._chat, self._visit, self._shown = "", 0, SHOWN
        self._number = self._acked = 0
        self._stale = self._list_stale = self._closed = False
        self._told: list[Json] = []
        self._following: Answer | None = None
        self._watched: dict[str, tuple[Answer, ExitStack]] = {}
        self._known = _Known()

    def show(self, chat_id: str, visit: int, turns: int) -> None:
        """The window has gone to a chat, or wants more of its turns."""
        if (chat_id, visit) != (self._chat, self._visit):
            self._known = _Known()
        self._chat, self._visit, self._shown = chat_id, visit, max(turns, SHOWN)
        self._stale = True
        self._wake.set()

    def ack(self, number: int) -> None:
        """The window has drawn the message of this number."""
        self._acked = max(self._acked, number)
        self._wake.set()

    def changed(self, chat_id: str) -> None:
        self._stale, self._list_stale = self._stale or chat_id == self._chat, True
        self._loop.call_soon_threadsafe(self._wake.set)

    def tell(self, message: Json) -> None:
        self._told.append(message)
        self._loop.call_soon_threadsafe(self._wake.set)

    def close(self) -> None:
        """The window is gone: the answers it watched are told."""
        self._closed = True
        self._wake.set()
        for _, watching in self._watched.values():
            watching.close()
        self._watched.clear()

    async def messages(self) -> AsyncIterator[Json | None]:
        """What is told; None is nothing, said while an answer goes on and the window has not drawn what came of it."""
        yield {"type": "hello"}
        due = beat = 0.0
        while not self._closed:
            self._wake.clear()
            while self._told:
                yield self._told.pop(0)
            if self._list_stale:
                self._list_stale = False
                yield {"type": "list"}
            answer = self.runtime.answers.get(self._chat) if self._chat else None
            if self._stale or (answer is not self._following and self._chat):
                self._stale = False
                yield await self._made(self._whole)
                self._watch(self._following)
            elif answer is not None and self._acked == self._number and time.monotonic() >= due:
                began = time.monotonic()
                yield await self._made(self._growth)
                due = time.monotonic() + max(PAUSE_S, SHARE * (time.monotonic() - began))
                beat = time.monotonic() + BEAT_S
            elif answer is not None and time.monotonic() >= beat:
                yield None
                beat = time.monotonic() + BEAT_S
            await self._wait(answer, due)

    async def _made(self, make: Callable[[str, _Known], Json]) -> Json:
        """A message made in a thread of its own, for the chat that is shown as it begins."""
        self._number += 1
        head = {"type": "chat", "chat": self._chat, "visit": self._visit, "number": self._number}
        try:
            return head | await asyncio.to_thread(make, self._chat, self._known)
        except Glm4liteError as error:  # a chat whose file was damaged, say
            return {"type": "problem", "chat": self._chat, "said": said_by(error).to_json()}

    async def _wait(self, answer: Answer | None, due: float) -> None:
        """Until something has changed; at most until the next drawing, or look at the answer, is due."""
        left = PAUSE_S if answer is not None else None
        if answer is not None and self._acked == self._number:
            left = max(due - time.monotonic(), 0.01)
        try:
            async with asyncio.timeout(left):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _watch(self, answer: Answer | None) -> None:
        """The answer goes on for as long as this window is open, whatever it shows meanwhile."""
        for chat_id, (watched, watching) in list(self._watched.items()):
            if watched.over.is_set() and watched is not self._following and chat_id != self._chat:
                watching.close()
                del self._watched[chat_id]
        if answer is None or (answer.chat.id in self._watched and self._watched[answer.chat.id][0] is answer):
            return
        if (old := self._watched.pop(answer.chat.id, None)) is not None:
            old[1].close()
        watching = ExitStack()
        watching.enter_context(answer.watched_by(self.name))
        self._watched[answer.chat.id] = (answer, watching)

    # What a message holds

    def _whole(self, chat_id: str, known: _Known) -> Json:
        """All that the window shows of a chat; of turns only what it has not got yet."""
        self._following = answer = self.runtime.answers.get(chat_id)
        chat = answer.chat if answer is not None else self.runtime.open(chat_id)
        turns = chat.turns
        first = max(0, len(turns) - self._shown)
        known.keep_only({turn.id for turn in turns[first:]})
        deltas = [self._turn(chat, turn, answer, known) for turn in turns[first:]]
        return {
            "title": chat.title,
            "saved": self.runtime.store.holds(chat_id),
            "settings": asdict(chat.settings),
            "earlier": first,
            "memory": self.runtime.memory().to_json(),
            "draft": self.runtime.drafts.of(chat_id).text,
            "order": [turn.id for turn in turns[first:]],
            "turns": [delta for delta in deltas if len(delta) > 1],
            **self._now(chat, answer),
        }

    def _growth(self, chat_id: str, known: _Known) -> Json:
        """What changed since the last message, while an answer grows."""
        answer = self._following
        if answer is None or answer.chat.id != chat_id:
            return self._whole(chat_id, known)
        delta = self._turn(answer.chat, answer.turn, answer, known)
        return {"turns": [delta] if len(delta) > 1 else [], **self._now(answer.chat, answer)}

    def _now(self, chat: Chat, answer: Answer | None) -> Json:
        counts = next((turn.counts for turn in reversed(chat.turns) if turn.counts), None)
        used, engine = counts.prompt_tokens + counts.new_tokens if counts else 0, self.runtime.engine
        return {
            "answering": answer is not None,
            "asking": asking_json(answer.asking) if answer is not None else None,
            "status": status_json(answer),
            "context": {"used": used, "total": engine.model.context if engine.loaded else 0},
        }

    def _turn(self, chat: Chat, turn: Turn, answer: Answer | None, known: _Known) -> Json:
        meta = turn_json(chat, turn, answer, known.views.setdefault(turn.id, TurnView()))
        meta["full"] = self._is_full(chat, turn.id)
        parts = meta.pop("parts")
        delta: Json = {"id": turn.id}
        if meta != known.meta.get(turn.id):
            delta["meta"] = meta
        if changes := difference(known.parts.get(turn.id, []), parts):
            delta["changes"] = changes
        known.meta[turn.id], known.parts[turn.id] = meta, parts
        return delta

    def _is_full(self, chat: Chat, turn_id: str) -> bool:
        """Whether the answer to the last turn failed because the context was full, as far as this window saw."""
        watched = self._watched.get(chat.id)
        return watched is not None and watched[0].context_full and watched[0].turn.id == turn_id
