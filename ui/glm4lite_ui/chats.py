"""What a saved chat is: a tree of turns, of which one path is shown.

A turn is what the user said and the parts of the answer in their order. Everything else is derived from the path: what
the model reads (history.py), what the page shows (thread.py), what is exported (export.py).

    chat = Chat()
    asked = chat.ask("Hi")                 # a turn at the end of the path, to be answered (Runtime.answer)
    again = chat.another(asked)            # regenerated: the same question beside it, without an answer
    other = chat.another(again, "Hello")   # edited: another question beside both
    chat.versions(other)                   # [asked, again, other]: "3/3"
    chat.show(asked)                       # that version, and behind it what was shown there last
    chat.turns                             # the path shown, a tuple
    asked.cut                              # whether its answer can be gone on with: Runtime.answer(chat, resume=True)
    chat.branch(asked)                     # a new chat with the path up to it
    chat.remove(asked)                     # what followed it moves up to the turn before it

Turns are named by their `id`, which stays theirs for good; `chat.find(id)` raises ChatError where one is gone. Nothing
here is saved by itself (Runtime.open and change read, ChatStore.save writes), and a chat that is being answered must
not be changed (`Runtime.change` refuses that).
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, TypeAdapter, ValidationError

from glm4lite.base.errors import Glm4liteError
from glm4lite.base.sentences import Sentence

TITLE_CHARACTERS = 60
NEW_TITLE = "New chat"
# Of the file: 1 had a list of turns, and 1024 for "as many tokens as there is room for"; 2 had errors in English alone.
FORMAT = 3
_OLD_MAX_NEW_TOKENS = 1024
# What the page can show: a number JSON has (no NaN), a time that a calendar has, an integer that JavaScript has.
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Time = Annotated[float, Field(ge=0, le=32503680000, allow_inf_nan=False)]
_Integer = Annotated[int, Field(ge=-(2**53), le=2**53)]
_Said = Annotated[Sentence, PlainValidator(Sentence.from_json)]
_UTF8 = Sentence("")
_TurnId = Annotated[str, Field(pattern=r"^[0-9a-f]{1,32}$")]


class ChatError(Glm4liteError):
    """A saved chat, or a turn of it, cannot be read, found or written."""


@dataclass
class Part:
    """A piece of an answer. `text` is the thought, the text, or the call's result; `seconds` None: still under way.

    `round` counts the generations of the turn: calls of one round were made at once.
    """

    kind: Literal["thinking", "text", "call"]
    round: _Integer = 0
    text: str = ""
    name: str = ""
    arguments: str = ""  # JSON as the model wrote it
    error: bool = False
    seconds: _Number | None = None


@dataclass
class Attachment:
    """A file sent with a message, as text. `form`, `encoding` and `pages` say how it was read (attachments.py)."""

    name: str
    text: str
    tokens: _Integer
    form: str = "text"
    encoding: _Said = _UTF8
    pages: _Integer | None = None


@dataclass
class Counts:
    """A turn's Done event."""

    prompt_tokens: _Integer
    new_tokens: _Integer
    finish_reason: str
    tokens_per_s: _Number
    prefilled_tokens: _Integer


@dataclass
class Turn:
    """A question and its answer, or in `error` what went wrong instead.

    A `dropped` turn is shown, but the model no longer reads it. `after` is the id of the turn before it, "" where it is
    the first: turns after the same one are its versions. `unfinished`: another program cut the answer, and kept no
    `counts`.
    """

    user: str
    files: list[Attachment] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    counts: Counts | None = None
    error: _Said | None = None
    dropped: bool = False
    id: _TurnId = field(default_factory=lambda: secrets.token_hex(8))
    after: str = ""
    unfinished: bool = False

    @property
    def cut(self) -> bool:
        """Whether the answer ended, or was stopped, in the middle of what the model said."""
        ended = self.unfinished if self.counts is None else self.counts.finish_reason in ("length", "cancelled")
        last = self.parts[-1] if self.parts else None
        return ended and last is not None and last.kind != "call" and bool(last.text.strip())


@dataclass
class Settings:
    """Of one chat; None is the checkpoint's own value, of `max_new_tokens` what the context leaves, of
    `thinking_budget` no limit.

    `tools` None: all that are on by default. `schema`: a JSON schema that every answer follows; None: it is text.
    """

    system: str = ""
    temperature: _Number | None = None
    top_k: _Integer | None = None
    top_p: _Number | None = None
    min_p: _Number | None = None
    repetition_penalty: _Number | None = None
    frequency_penalty: _Number | None = None
    presence_penalty: _Number | None = None
    max_new_tokens: _Integer | None = None
    thinking_budget: _Integer | None = None
    seed: _Integer | None = None
    stop: list[str] | None = None
    tools: list[str] | None = None
    schema: dict[str, Any] | None = None
    always: list[str] = field(default_factory=list)  # tools that need no more asking in this chat (Toolset.permission)

    def sampling(self) -> dict[str, Any]:
        """The fields of SamplingParams that are set."""
        named = {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}
        return named | ({} if self.stop is None else {"stop": tuple(self.stop)})


SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("max_new_tokens", "thinking_budget", "seed"),
)


@dataclass
class Chat:
    """A conversation as it is saved. Times are seconds since 1970.

    `tree` holds every turn, each behind the one that it follows; `shown` says for a turn ("" for the beginning) which
    of those that follow it is shown, where that is not the newest. `folder` is a name that the list shows it under.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    title: str = NEW_TITLE
    created: _Time = field(default_factory=time.time)
    updated: _Time = field(default_factory=time.time)
    settings: Settings = field(default_factory=Settings)
    tree: list[Turn] = field(default_factory=list)
    shown: dict[str, str] = field(default_factory=dict)
    pinned: bool = False
    folder: str = ""

    @classmethod
    def of(cls, *turns: Turn, **fields: Any) -> Chat:
        """A chat with these turns one behind the other."""
        chat = cls(**fields)
        for turn in turns:
            chat._put(turn, chat._end())
        return chat

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The path shown, from the first turn on."""
        following = defaultdict[str, list[Turn]](list)
        for turn in self.tree:
            following[turn.after].append(turn)
        path, last = list[Turn](), ""
        while versions := following.get(last):
            chosen = self.shown.get(last)
            path.append(next((turn for turn in versions if turn.id == chosen), versions[-1]))
            last = path[-1].id
        return tuple(path)

    def find(self, turn_id: str) -> Turn:
        """The turn of this id, on whatever path; ChatError where it is gone."""
        for turn in self.tree:
            if turn.id == turn_id:
                return turn
        raise ChatError("this turn is not there any more")

    def versions(self, turn: Turn) -> list[Turn]:
        """The turn and those that stand in its place on other paths, in the order in which they were made."""
        return [other for other in self.tree if other.after == turn.after]

    def ask(self, user: str, files: Sequence[Attachment] = ()) -> Turn:
        """A new turn behind the last one shown."""
        return self._put(Turn(user, list(files)), self._end())

    def another(self, turn: Turn, user: str | None = None, files: Sequence[Attachment] | None = None) -> Turn:
        """A new version of the turn, shown from now on: with the same question, or what is given instead of it.

        A turn that nothing answered or followed is not worth keeping: it becomes the new one.
        """
        if not turn.parts and all(other.after != turn.id for other in self.tree):
            self.remove(turn)
        new = Turn(turn.user if user is None else user, list(turn.files if files is None else files))
        return self._put(new, turn.after)

    def show(self, turn: Turn) -> None:
        """Makes the path lead through this turn."""
        for one in self._way_to(turn):
            self.shown[one.after] = one.id

    def remove(self, turn: Turn) -> None:
        """Takes the turn out. What follows it stays, behind the turn before it; else the version before it is shown."""
        versions, shown, next_shown = self.versions(turn), self._shown_after(turn.after), self._shown_after(turn.id)
        for following in self.tree:
            if following.after == turn.id:
                following.after = turn.after
        self.tree = [other for other in self.tree if other is not turn]
        self.shown.pop(turn.id, None)
        if shown is turn:
            place = versions.index(turn)
            left = versions[:place][::-1] + versions[place + 1 :]
            shown = next_shown or (left[0] if left else None)
        if shown is None:
            self.shown.pop(turn.after, None)
        else:
            self.shown[turn.after] = shown.id

    def branch(self, turn: Turn) -> Chat:
        """A new chat with the path that leads to this turn."""
        copied = _CHAT.validate_python(asdict(replace(self, tree=self._way_to(turn)[::-1], shown={})))
        now = time.time()
        return replace(copied, id=secrets.token_hex(8), created=now, updated=now, pinned=False)

    def name_after_first_turn(self) -> None:
        """A chat nobody named is called what was asked first."""
        if self.title == NEW_TITLE and self.tree:
            words = " ".join(self.turns[0].user.split()) or NEW_TITLE
            self.title = words if len(words) <= TITLE_CHARACTERS else words[: TITLE_CHARACTERS - 1] + "…"

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **to_json(self)}

    def _put(self, turn: Turn, after: str) -> Turn:
        turn.after = after
        self.tree.append(turn)
        if after in self.shown:
            self.shown[after] = turn.id
        return turn

    def _way_to(self, turn: Turn) -> list[Turn]:
        """The turn and those before it, from the last on."""
        by_id, way = {one.id: one for one in self.tree}, [turn]
        while way[-1].after:
            way.append(by_id[way[-1].after])
        return way

    def _shown_after(self, turn_id: str) -> Turn | None:
        versions = [turn for turn in self.tree if turn.after == turn_id]
        chosen = self.shown.get(turn_id)
        return next((turn for turn in versions if turn.id == chosen), versions[-1] if versions else None)

    def _end(self) -> str:
        path = self.turns
        return path[-1].id if path else ""


def to_json(one: Any) -> dict[str, Any]:
    """A dataclass of this file as values of JSON; a Sentence that has values keeps them, for another language."""

    def kept(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        return {
            name: value.to_json() if isinstance(value, Sentence) and value.values else value for name, value in fields
        }

    return asdict(one, dict_factory=kept)


_CHAT = TypeAdapter(Chat)


def read_chat(data: object, chat_id: str | None = None) -> Chat:
    """A chat from `to_json()`'s form, also of older versions; ValueError names what cannot be read."""
    if not isinstance(data, Mapping) or not isinstance(found := data.get("format"), int) or found < 1:
        raise ValueError(Sentence("this is no chat of glm4lite: it has no format"))
    if found > FORMAT:
        raise ValueError(
            Sentence(
                "a newer glm4lite saved it (format {found}, this one reads up to {known}); update glm4lite",
                found=found,
                known=FORMAT,
            )
        )
    fields = dict(data) | ({"id": chat_id} if chat_id else {})
    try:
        chat: Chat = _CHAT.validate_python(_from_list(fields) if found == 1 else fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    _check_tree(chat)
    return chat


def _from_list(fields: dict[str, Any]) -> dict[str, Any]:
    """Format 1: the turns of the only path. Their ids are their places, so that they are the same at each reading."""
    turns, settings = fields.pop("turns", []), fields.get("settings")
    if isinstance(turns, list) and all(isinstance(turn, Mapping) for turn in turns):
        ids = ["", *(f"{place:016x}" for place in range(1, len(turns) + 1))]
        turns = [{**turn, "id": ids[place + 1], "after": ids[place]} for place, turn in enumerate(turns)]
    if isinstance(settings, Mapping) and settings.get("max_new_tokens") == _OLD_MAX_NEW_TOKENS:
        fields["settings"] = {**settings, "max_new_tokens": None}
    return fields | {"tree": turns}


def _check_tree(chat: Chat) -> None:
    """Each turn follows one that stands before it: then there is no circle, and each is reached from the first."""
    known = {""}
    for place, turn in enumerate(chat.tree):
        if turn.id in known or turn.after not in known:
            raise ValueError(f"tree.{place}: it follows no turn before it, or has the id of one")
        known.add(turn.id)
