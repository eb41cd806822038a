"""What the page works with: the model's worker, the tools, the saved chats, the answers under way."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glm4lite.base.errors import Glm4liteError, NoModel, SchemaError, said_by
from glm4lite.base.sentences import Sentence
from glm4lite.base.sizes import readable
from glm4lite.chat.session import ChatSession
from glm4lite.engine.engine import Engine
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.worker import EngineWorker
from glm4lite.measure.inventory import devices
from glm4lite.server.launch import name_of
from glm4lite.text.grammar import AnswerForm, checked_schema
from glm4lite.tools.mcp_config import ServerConfig
from glm4lite.tools.tool import Tool
from glm4lite_ui.answering import Answer
from glm4lite_ui.attachments import read
from glm4lite_ui.chats import Attachment, Chat, ChatError, Settings
from glm4lite_ui.history import messages
from glm4lite_ui.saved.preferences import Draft, Drafts, Preferences
from glm4lite_ui.saved.servers import ServerFile
from glm4lite_ui.saved.store import ChatStore
from glm4lite_ui.saved.trust import Trust
from glm4lite_ui.servers import Servers
from glm4lite_ui.toolset import Toolset

LAST_WORDS_S = 2.0  # for an answer that is stopped with the program to be saved


class BusyError(Glm4liteError):
    """The chat is being answered already, in another window."""


@dataclass
class Runtime:
    """Shared by all windows of the page.

    `tools` are those of the command line, `servers` the MCP servers that some of them are of, `approval` what
    `--approve` said. `folder` is where servers that are added on the page, and what is said about asking, are kept:
    beside the chats where it is None.
    """

    worker: EngineWorker
    store: ChatStore
    tools: Sequence[Tool] = ()
    source: str = "nano"
    load_options: dict[str, Any] = field(default_factory=dict)  # of Engine.load, for the next model too
    quant: str = "auto"
    lora: tuple[str, ...] = ()  # adapters that are on, as `Engine.load` takes them
    servers: Sequence[ServerConfig] = ()
    approval: str = "ask"
    folder: Path | None = None
    servers_from_elsewhere: bool = False  # whether also who is not on this machine may add servers (here.py)
    answers: dict[str, Answer] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.preferences, self.drafts = Preferences(self.store.folder), Drafts(self.store.folder)
        folder, names = self.folder or self.store.folder / "kept", [config.name for config in self.servers]
        file = ServerFile(folder / "mcp.json")
        added = Servers(file, names, lambda: {tool.name for tool in self.tools}, self.approval)
        self.toolset = Toolset(lambda: self.tools, self.servers, added, Trust(folder / "trust.json"), self.approval)

    @property
    def engine(self) -> Engine:
        return self.worker.engine

    @property
    def name(self) -> str:
        """Of the model, also in the API beside the page."""
        return name_of(self.source)

    def open(self, chat_id: str) -> Chat:
        """The chat as it is now: being answered, saved, or a new one under this id.

        A new one has the settings that were made for it (`set`), else those of new chats.
        """
        answer = self.answers.get(chat_id)
        if answer is not None:
            return answer.chat
        if self.store.holds(chat_id):
            return self.store.load(chat_id)
        return Chat(id=chat_id, settings=self.drafts.of(chat_id).settings or self.preferences.new_chat)

    def change(self, chat_id: str) -> Chat:
        """As `open`, for changing the turns; raises BusyError while they grow."""
        if chat_id in self.answers:
            raise BusyError("this chat is being answered; stop that first")
        return self.open(chat_id)

    def set(self, chat_id: str, settings: Settings) -> None:
        """Keeps a chat's settings: with the chat, or beside its draft while it has no message and is not saved.

        Raises:
            SamplingError, SchemaError: a value cannot be used; nothing was kept.
        """
        self.params(settings)
        self._check_schema(settings)
        chat = self.open(chat_id)
        if chat.tree or self.store.holds(chat_id):
            chat.settings = settings
            self.store.save(chat, said=False)
        elif settings != chat.settings:
            self.drafts.keep(chat_id, replace(self.drafts.of(chat_id), settings=settings))

    def type(self, chat_id: str, text: str) -> None:
        """Keeps what is typed in a chat and not sent, over a restart; "" once it was sent."""
        draft = self.drafts.of(chat_id)
        if draft.text != text:
            self.drafts.keep(chat_id, replace(draft, text=text))

    def session(self, chat: Chat) -> ChatSession:
        """A session under the chat's settings. What was computed before is found by the engine."""
        session = ChatSession(
            self.engine,
            self.chosen(chat.settings),
            params=self.params(chat.settings),
            compute=self.worker.run,
            schema=chat.settings.schema,
        )
        if always := chat.settings.always:
            kept = self.toolset.permission
            session.allowed.update(tool.name for tool in session.tools.values() if kept(tool) in always)
        return session

    def params(self, settings: Settings) -> SamplingParams:
        """The chat's sampling settings over the checkpoint's; raises SamplingError.

        A thinking budget waits for a model that thinks; the settings say so.
        """
        engine = self.engine
        params = engine.params(**settings.sampling())
        thinks = engine.loaded and engine.chat_template().can_think
        return params if thinks else replace(params, thinking_budget=None)

    def _check_schema(self, settings: Settings) -> None:
        """SchemaError, about the field, where no answer can be held to it."""
        if settings.schema is None:
            return
        try:
            form = AnswerForm(checked_schema(settings.schema))
            if self.engine.loaded:
                self.engine.constraint(form)
        except SchemaError as error:
            raise SchemaError("{name} cannot be used: {problem}", name="schema", problem=said_by(error)) from None

    def chosen(self, settings: Settings) -> list[Tool]:
        """The tools that are on in a chat; none where the model's template has no place for them."""
        if not self.engine.chat_template().takes_tools:
            return []
        return [tool for tool in self.toolset.tools() if settings.tools is None or tool.name in settings.tools]

    def answer(self, chat: Chat, resume: bool = False) -> Answer:
        """Begins the answer to the chat's last turn, known to all windows; the chat is saved before and after it.

        With `resume` it goes on with the answer that is there, which must be `cut`.

        Raises:
            BusyError: the chat is being answered already.
            ChatError: there is nothing to go on with.
            NoModel: none is loaded; nothing was saved.
        """
        with self._lock:
            if chat.id in self.answers:
                raise BusyError("this chat is being answered; stop that first")
            if not self.engine.loaded:
                raise NoModel
            if resume and not (chat.turns and chat.turns[-1].cut):
                raise ChatError("this answer is whole; ask again for another one")
            chat.name_after_first_turn()
            answer = Answer(chat, self.session(chat), self._keep, resume, self.toolset.permission)
            self.answers[chat.id] = answer  # before the windows hear of the turn: it is under way
            try:
                self.store.save(chat)
                self.drafts.keep(chat.id, replace(self.drafts.of(chat.id), settings=None))
            except Glm4liteError:
                del self.answers[chat.id]
                raise
        answer.start()
        return answer

    def delete(self, chat_id: str) -> None:
        """Deletes a chat, whatever is being said in it."""
        with self._lock:
            answer = self.answers.pop(chat_id, None)
            self.store.delete(chat_id)
            self.drafts.keep(chat_id, Draft())
        if answer is not None:
            answer.stop()

    def _keep(self, answer: Answer) -> None:
        """An answer is over: it is saved, unless its chat was deleted meanwhile."""
        with self._lock:
            if self.answers.get(answer.chat.id) is not answer:
                return
            self.store.take_in(answer.chat)  # what was said in the terminal meanwhile
            try:
                self.store.save(answer.chat)
            except ChatError as error:  # nobody waits for this thread: it is said in the chat
                answer.turn.error = said_by(error)
            del self.answers[answer.chat.id]

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.engine.tokenizer.ids(text))

    def attachment(self, name: str, source: Path | bytes) -> Attachment:
        """A file as it goes into the prompt; UnreadableError, which names it, for what holds no text."""
        file = read(source, name)
        return Attachment(file.name, file.text, self.count(file.text), file.form, file.encoding, file.pages)

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

    def memory(self) -> Sentence:
        """What weights take, wherever they lie, and the conversations that are kept; "" without a model."""
        if not self.engine.loaded:
            return Sentence("")
        weights = sum(place["weights"] for place in devices(self.engine.model).values())
        kept = self.engine.prefixes.nbytes
        held = {"weights": readable(weights)} | ({"kept": readable(kept)} if kept else {})
        return Sentence("weights {weights} · KV {kept}" if kept else "weights {weights}", **held)

    def unload(self) -> None:
        """Gives the model's memory back, on the engine's thread, behind what it computes for others.

        Raises:
            BusyError: a chat is being answered.
        """

        def job(engine: Engine) -> Iterator[None]:
            with self._lock:
                if self.answers:
                    raise BusyError("a chat is being answered; stop that first")
                engine.unload()
            yield

        if self.answers:  # their tools may wait for the user: nothing is gained by waiting for those
            raise BusyError("a chat is being answered; stop that first")
        for _ in self.worker.run(job, alone=True):
            pass

    def close(self) -> None:
        """Stops every answer, the servers and the engine's thread; what was said is saved."""
        answers = list(self.answers.values())
        for answer in answers:
            answer.stop()
        self.toolset.servers.close()
        self.worker.close()
        for answer in answers:
            answer.over.wait(LAST_WORDS_S)
