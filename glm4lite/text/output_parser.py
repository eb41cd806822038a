"""The model's text, as it arrives, split into answer, thought and tool calls.

GLM-4-0414 calls a tool by writing a line with its name and then a JSON object, as a whole part of its output (parts are
separated by the token `<|assistant|>`) or behind a sentence of its answer:

    >>> parser = OutputParser({"add"})
    >>> parser.feed("Let me add.\\nadd\\n{"), parser.feed('"a": 1}'), parser.feed("\\n"), parser.feed("Done")
    ([Text(text='Let me add.')], [], [Call(name='add', arguments='{"a": 1}')], [Text(text='Done')])

Answers hold lines and braces too, so a call is only what cannot be told from one: a whole line that is the name of a
declared tool, an object, and nothing else on the line where the object ends but the name of the next call. Rumination's
form, one object `{"name": …, "arguments": {…}}`, is accepted on the same terms. Everything else is text and shown in
full; so is all that stands in a fenced code block, where a model shows how its tool is called rather than calls it.
White space around a call belongs to the call.

Where a grammar holds calls to their form (`glm4lite.text.grammar`), a name and the brace behind it are certain to
become a call, and its arguments are given out as they are written:

    >>> parser = OutputParser({"add"}, certain=True)
    >>> parser.feed('add\\n{"a"'), parser.feed(": 1}"), parser.finish()[0].arguments
    ([CallBegun(name='add'), CallPiece(text='{"a"')], [CallPiece(text=': 1}')], '{"a": 1}')

Source: the parser of GLM-4's model card (split on `<|assistant|>`, a name, an object in JSON or Python syntax, the next
name maybe right behind it) and `process_response` of its older glm_server.py, which also asks that the name be a
declared tool.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from itertools import groupby
from typing import TypeAlias

from glm4lite.text.call_arguments import ObjectScanner, parse_arguments
from glm4lite.text.stop_strings import partial_end

_OPEN, _CLOSE = "<think>", "</think>"
_MAX_CALL = 100_000  # characters held back for one call; a longer one is text
_MAX_BLANK = 64  # characters of white space held back before and behind what may be a tag, a name or a call
_MAX_INDENT = 3  # of white space before a call; more makes a code block
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_SPACE = " \t\r\n"
_COMPACT = str.maketrans("'", '"', _SPACE)
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})")
_FENCE_LINE = 200  # characters of a line that are looked at for a fence


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Thinking:
    """A piece of the thought."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A call is being written: pieces of its arguments follow, then the `Call`, or a `CallCut`."""

    name: str


@dataclass(frozen=True)
class CallPiece:
    """What comes next of the arguments of the call that is being written."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call of a declared tool; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class CallCut:
    """The output ended within the call that was being written; `written` is all of it, with the name's line."""

    name: str
    arguments: str
    written: str


Segment: TypeAlias = Text | Thinking | CallBegun | CallPiece | Call | CallCut


class _State(Enum):
    START = auto()  # nothing but white space and perhaps a part of "<think>" so far
    THINKING = auto()
    AFTER = auto()  # behind "</think>", before the answer's first character
    ANSWER = auto()


class OutputParser:
    """Splits one generation; the segments are the same however the text is cut into `feed`s, the time is linear.

    tool_names: the declared tools. thinking: the prompt ended in `<think>`, so the output starts inside the thought.
    certain: a grammar holds calls to their form, so they are told of while they are written.
    """

    def __init__(self, tool_names: Collection[str], thinking: bool = False, certain: bool = False) -> None:
        self._names, self._certain = frozenset(tool_names), certain
        self._segments: list[Segment] = []  # that are certain and were not given out yet
        self._reset(_State.THINKING if thinking else _State.START)
        self._may_reopen = thinking  # some models write the "<think>" that the prompt already has

    def feed(self, text: str) -> list[Segment]:
        """Segments that `text` makes certain."""
        waiting = _LINE.findall(text)[::-1]
        while waiting:
            rest = self._read(waiting.pop())
            waiting += _LINE.findall(rest)[::-1]
        return self._given()

    def separator(self) -> list[Segment]:
        """The model emitted `<|assistant|>`: the part is over, another one starts."""
        match self._state:
            case _State.THINKING:
                self._segments.append(Thinking(self._held))
            case _State.START:
                self._segments.append(Text(self._held.removeprefix("\n")))
            case _State.ANSWER:
                self._answer.end()
        self._reset(_State.START)
        return self._given()

    def finish(self) -> list[Segment]:
        """The generation is over; nothing is held back any more."""
        return self.separator()

    def _given(self) -> list[Segment]:
        """The certain segments, with neighbours of one kind joined."""
        given: list[Segment] = []
        for kind, group in groupby(self._segments, type):
            if kind not in (Text, Thinking, CallPiece):
                given += group
            elif text := "".join(one.text for one in group if isinstance(one, Text | Thinking | CallPiece)):
                given.append(Thinking(text) if kind is Thinking else Text(text) if kind is Text else CallPiece(text))
        self._segments.clear()
        return given

    def _reset(self, state: _State) -> None:
        self._state = state
        self._held = ""  # text not given out yet, before and in the thought
        self._answer = _Answer(self._names, self._segments, self._certain)
        self._trim = True  # newlines before the thought's first character are dropped
        self._may_reopen = False

    def _read(self, piece: str) -> str:
        """One step with `piece`, at most one line; what is left of it for the next step."""
        match self._state:
            case _State.START:
                return self._start(piece)
            case _State.THINKING:
                return self._think(piece)
            case _State.AFTER:
                rest = piece.lstrip("\n")
                self._state = _State.ANSWER if rest else _State.AFTER
                return rest
            case _State.ANSWER:
                return self._answer.read(piece)

    def _start(self, piece: str) -> str:
        held, self._held = self._held + piece, ""
        body = held.lstrip()
        if len(held) - len(body) <= _MAX_BLANK:
            if body.startswith(_OPEN):
                self._state = _State.THINKING
                return body.removeprefix(_OPEN)
            if _OPEN.startswith(body):
                self._held = held
                return ""
        self._state = _State.ANSWER
        return held.removeprefix("\n")  # GLM starts every answer with one

    def _think(self, piece: str) -> str:
        held, self._held = self._held + piece, ""
        if self._may_reopen:
            body = held.lstrip()
            if len(held) - len(body) <= _MAX_BLANK:
                if _OPEN.startswith(body) and body != _OPEN:
                    self._held = held
                    return ""
                held = body.removeprefix(_OPEN) if body.startswith(_OPEN) else held
            self._may_reopen = False
        if self._trim:
            held = held.lstrip("\n")
            self._trim = not held
        thought, closed, rest = held.partition(_CLOSE)
        self._held = "" if closed else partial_end(thought, _CLOSE)
        self._segments.append(Thinking(thought.removesuffix(self._held)))
        self._state = _State.AFTER if closed else _State.THINKING
        return rest


class _Place(Enum):
    LINE = auto()  # at the beginning of a line, or in one that may still become a call's first
    TEXT = auto()  # in a line of text
    OBJECT = auto()  # a name was read, its object is awaited or goes on
    BEHIND = auto()  # in the line where a call's object ended


class _Answer:
    """One part of the answer, read a line or a piece of a line at a time; what is certain goes to `segments`."""

    def __init__(self, names: frozenset[str], segments: list[Segment], certain: bool = False) -> None:
        self._names, self._segments = names, segments
        self._certain = certain  # until a code block or a name without a call: from there on a grammar lets anything be
        self._begun = False  # the call that is being read was told of
        self._longest = max(map(len, names), default=0) + _MAX_BLANK  # of a line with a name
        self._heads = {f'{{"name":{json.dumps(name, ensure_ascii=False)}': name for name in sorted(names)}
        self._longest_head = max(map(len, self._heads), default=0) + _MAX_BLANK
        self._place = _Place.LINE
        self._blank = ""  # line ends and blank lines that a call behind them would take along
        self._held = ""  # of a line that may become a call's first, or behind a call's object
        self._fence = ""  # of the code block that is open
        self._line = ""  # the beginning of the line of text
        self._behind_call = False  # nothing but white space was read since the last call
        self._name = ""  # of the call that is being read
        self._written: list[str] = []  # the call as it was written
        self._object_from = 0  # where its object begins in _written: 1, or 0 where the object holds the name
        self._size = 0
        self._scanner = ObjectScanner()
        self._call: Call | None = None

    def read(self, piece: str) -> str:
        """One step with `piece`, at most one line; what is left of it for the next step."""
        match self._place:
            case _Place.LINE:
                return self._begin(piece)
            case _Place.TEXT:
                self._say(piece)
                return ""
            case _Place.OBJECT:
                return self._read_object(piece)
            case _Place.BEHIND:
                return self._read_behind(piece)

    def end(self) -> None:
        """Nothing more comes: what is held back is text, or a call that is whole."""
        if self._place is _Place.BEHIND and self._call and not self._held.strip(_SPACE):
            self._segments.append(self._call)
        elif self._begun:
            self._cut()
        elif self._written:
            self._segments.append(Text(self._blank + "".join(self._written) + self._held))
        elif not self._behind_call or self._held.strip(_SPACE):
            self._segments.append(Text(self._blank + self._held))

    def _begin(self, piece: str) -> str:
        line, self._held = self._held + piece, ""
        if self._fence:
            self._say(line)
        elif name := self._named(line):
            self._start_call(name, [line])
        elif name := self._named_in_object(line):
            self._start_call(name, [])
            return line
        elif line.endswith("\n") and not line.strip(_SPACE) and len(line) <= _MAX_BLANK:
            self._skip(line)
        elif self._may_become_call(line):
            self._held = line
        else:
            first, newline, rest = line.partition("\n")
            self._say(first + newline)
            return rest
        return ""

    def _named(self, line: str) -> str | None:
        """The tool whose name is this whole line."""
        name = line.strip(_SPACE)
        whole = line.endswith("\n") and len(line) <= self._longest + 1
        return name if whole and name in self._names and _indent(line) <= _MAX_INDENT else None

    def _named_in_object(self, line: str) -> str | None:
        """The tool of Rumination's form, once its name is there."""
        written = _compact(line[: self._longest_head])
        if not written.startswith("{") or _indent(line) > _MAX_INDENT:
            return None
        return next((name for head, name in self._heads.items() if written.startswith(head)), None)

    def _may_become_call(self, line: str) -> bool:
        word = line.strip(_SPACE)
        if not word:
            return len(line) <= _MAX_BLANK
        if _indent(line) > _MAX_INDENT:
            return False
        if word.startswith("{"):
            written = _compact(line)
            return len(line) < self._longest_head and any(head.startswith(written) for head in self._heads)
        return len(line) <= self._longest and "\n" not in line and any(name.startswith(word) for name in self._names)

    def _skip(self, blank: str) -> None:
        if not self._behind_call:
            self._blank += blank
        if len(self._blank) > _MAX_BLANK:
            self._segments.append(Text(self._blank))
            self._blank = ""

    def _say(self, text: str) -> None:
        """Text, at most to the end of a line; the line's end waits, as it belongs to a call that may follow."""
        self._line = (self._line + text)[:_FENCE_LINE]
        said = text.removesuffix("\n")
        self._segments.append(Text(self._blank + said))
        self._blank, self._behind_call, self._place = "", False, _Place.TEXT
        if said != text:
            self._end_line()
            self._blank, self._place = "\n", _Place.LINE

    def _end_line(self) -> None:
        line, self._line = self._line, ""
        found = _FENCE.match(line)
        if found is None:
            self._certain = self._certain and (len(line) < _FENCE_LINE or bool(line.strip()))
            return
        self._certain = False
        fence, rest = found.group(1), line[found.end() :]
        if not self._fence:
            self._fence = "" if fence[0] == "`" and "`" in rest else fence
        elif fence.startswith(self._fence) and not rest.strip():
            self._fence = ""

    def _start_call(self, name: str, written: list[str]) -> None:
        self._name, self._written, self._object_from = name, written, len(written)
        self._size, self._scanner, self._place = 0, ObjectScanner(), _Place.OBJECT
        self._begun = False

    def _read_object(self, piece: str) -> str:
        used = self._scanner.read(piece)
        if self._certain and self._object_from and not self._scanner.failed:
            self._tell(piece[:used])
        too_long = self._size + used > _MAX_CALL and not self._begun
        if too_long:
            used = _MAX_CALL - self._size
        self._size += used
        self._written.append(piece[:used])
        if self._scanner.failed or too_long:
            return self._give_up(again=bool(self._object_from)) + piece[used:]
        if self._scanner.closed:
            self._call = self._parsed()
            if self._call is None:
                self._give_up()
            else:
                self._place = _Place.BEHIND
        return piece[used:]

    def _tell(self, piece: str) -> None:
        """What comes of the arguments, once their first brace is there."""
        if not self._begun:
            piece = piece.lstrip(_SPACE)
            if not piece:
                return
            self._begun = True
            self._segments.append(CallBegun(self._name))
        self._segments.append(CallPiece(piece))

    def _cut(self) -> None:
        """The call that was told of is none, or not whole."""
        arguments = "".join(self._written[self._object_from :]).lstrip(_SPACE)
        self._segments.append(CallCut(self._name, arguments, self._blank + "".join(self._written) + self._held))
        self._written, self._blank, self._begun = [], "", False

    def _parsed(self) -> Call | None:
        arguments = parse_arguments("".join(self._written[self._object_from :]))
        if arguments is None:
            return None
        if self._object_from:
            return Call(self._name, arguments)
        whole = json.loads(arguments)
        if set(whole) != {"name", "arguments"} or whole["name"] != self._name:
            return None
        if not isinstance(whole["arguments"], dict):
            return None
        return Call(self._name, json.dumps(whole["arguments"], ensure_ascii=False))

    def _read_behind(self, piece: str) -> str:
        rest = self._held = self._held + piece
        word = rest.strip(_SPACE)
        next_name = not word or self._named(rest)
        if rest.endswith("\n") and next_name and self._call and len(rest) <= self._longest + 1:
            self._segments.append(self._call)
            self._written, self._held, self._blank, self._begun = [], "", "", False
            self._behind_call, self._place = True, _Place.LINE
            return rest if word else ""
        if not rest.endswith("\n") and len(rest) <= self._longest and any(one.startswith(word) for one in self._names):
            return ""
        self._held = ""
        self._give_up()
        return rest

    def _give_up(self, again: bool = False) -> str:
        """What was written is text; with `again` its last line is given back, as it may begin another call."""
        self._certain = False
        if self._begun:
            self._cut()
            self._place = _Place.TEXT
            return ""
        lines, self._written = _LINE.findall("".join(self._written)), []
        last = lines.pop() if again and not lines[-1].endswith("\n") else ""
        for line in lines:
            self._say(line)
        return last


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(_SPACE))


def _compact(text: str) -> str:
    """Without JSON's white space, and with its quotes."""
    return text.translate(_COMPACT)
