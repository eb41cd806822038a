"""The model's text, as it arrives, split into answer, thought and tool calls.

GLM-4-0414 calls a tool by writing `name\\n{json arguments}` as a whole part of its output; parts are separated by the
token `<|assistant|>`. Ordinary answers can start with a line and a brace too, so a part is a call only when its first
line is the name of a declared tool and all the rest is one object; everything else is text, shown in full. Rumination's
form, one object `{"name": …, "arguments": {…}}`, is accepted on the same terms.

    >>> parser = OutputParser({"add"})
    >>> parser.feed("add\\n{"), parser.feed('"a": 1}'), parser.separator(), parser.feed("\\nDone")
    ([], [], [Call(name='add', arguments='{"a": 1}')], [Text(text='Done')])

Source: the parser of GLM-4's model card (split on `<|assistant|>`, a name, an object in JSON or Python syntax) and
`process_response` of its older glm_server.py, which also asks that the name be a declared tool.
"""

import ast
import json
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeAlias

from glm4lite.stopping import partial_end

_OPEN, _CLOSE = "<think>", "</think>"
_MAX_CALL = 100_000  # characters held back for one call; a longer part is text
_MAX_LITERAL = 20_000  # characters of Python syntax given to ast.literal_eval
_MAX_DEPTH = 64  # of nested objects and lists in arguments


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Thinking:
    """A piece of the thought."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call of a declared tool; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


Segment: TypeAlias = Text | Thinking | Call


class _State(Enum):
    START = auto()  # nothing but white space and perhaps a part of "<think>" so far
    THINKING = auto()
    AFTER = auto()  # behind "</think>", before the answer's first character
    HEAD = auto()  # the first line may still become the name of a tool
    ARGUMENTS = auto()  # a name was read, an object follows
    TEXT = auto()  # no call is possible any more


class OutputParser:
    """Splits one generation; the segments are the same however the text is cut into `feed`s.

    tool_names: the declared tools. thinking: the prompt ended in `<think>`, so the output starts inside the thought.
    """

    def __init__(self, tool_names: Collection[str], thinking: bool = False) -> None:
        self._names = frozenset(tool_names)
        self._json_heads = tuple(f'{{"name":{json.dumps(name, ensure_ascii=False)}' for name in sorted(self._names))
        self._reset(_State.THINKING if thinking else _State.START)
        self._may_reopen = thinking  # some models write the "<think>" that the prompt already has

    def feed(self, text: str) -> list[Segment]:
        """Segments that `text` makes certain. Calls come from separator() and finish() only."""
        self._held += text
        segments: list[Segment] = []
        while self._held and self._advance(segments):
            pass
        return segments

    def separator(self) -> list[Segment]:
        """The model emitted `<|assistant|>`: the part is over, another one starts."""
        segments = self._end_part()
        self._reset(_State.START)
        return segments

    def finish(self) -> list[Segment]:
        """The generation is over; nothing is held back any more."""
        return self.separator()

    def _reset(self, state: _State) -> None:
        self._state = state
        self._held = ""  # text not given out yet; in ARGUMENTS the part after the first line
        self._first_line = ""  # in ARGUMENTS: the line with the name, as it was written
        self._scanner = _ObjectScanner()
        self._trim = True  # newlines before the thought's first character are dropped
        self._may_reopen = False

    def _advance(self, segments: list[Segment]) -> bool:
        """One step on the held text; True when another may follow, False when more text is needed."""
        match self._state:
            case _State.START:
                return self._start()
            case _State.THINKING:
                return self._think(segments)
            case _State.AFTER:
                self._held = self._held.lstrip("\n")
                self._state = _State.HEAD if self._held else _State.AFTER
                return bool(self._held)
            case _State.HEAD:
                return self._head()
            case _State.ARGUMENTS:
                if self._scanner.read(self._held) and len(self._held) <= _MAX_CALL:
                    return False
                self._held, self._first_line = self._first_line + self._held, ""
                self._state = _State.TEXT
                return True
            case _State.TEXT:
                segments.append(Text(self._held))
                self._held = ""
                return False

    def _start(self) -> bool:
        body = self._held.lstrip()
        if body.startswith(_OPEN):
            self._held = body.removeprefix(_OPEN)
            self._state = _State.THINKING
            return True
        if _OPEN.startswith(body):
            return False
        self._held = self._held.removeprefix("\n")  # GLM starts every answer with one
        self._state = _State.HEAD
        return True

    def _think(self, segments: list[Segment]) -> bool:
        if self._may_reopen:
            body = self._held.lstrip()
            if _OPEN.startswith(body) and body != _OPEN:
                return False
            self._held = body.removeprefix(_OPEN) if body.startswith(_OPEN) else self._held
            self._may_reopen = False
        if self._trim:
            self._held = self._held.lstrip("\n")
            self._trim = not self._held
        thought, closed, rest = self._held.partition(_CLOSE)
        kept = "" if closed else partial_end(thought, _CLOSE)
        if thought := thought.removesuffix(kept):
            segments.append(Thinking(thought))
        self._held = rest if closed else kept
        self._state = _State.AFTER if closed else _State.THINKING
        return bool(closed)

    def _head(self) -> bool:
        """Decide whether the part can still be a call."""
        if self._held.startswith("{"):
            compact = "".join(self._held.split())
            if any(compact.startswith(head) for head in self._json_heads):
                self._state = _State.ARGUMENTS
                return True
            possible = any(head.startswith(compact) for head in self._json_heads)
        else:
            line, newline, rest = self._held.partition("\n")
            name = line.rstrip(" \r")
            if newline and name in self._names:
                self._first_line, self._held = line + newline, rest
                self._state = _State.ARGUMENTS
                return True
            possible = not newline and (name in self._names or any(known.startswith(line) for known in self._names))
        if not possible or len(self._held) > _MAX_CALL:
            self._state = _State.TEXT
        return self._state is _State.TEXT

    def _end_part(self) -> list[Segment]:
        text = self._first_line + self._held
        match self._state:
            case _State.THINKING:
                segments: list[Segment] = [Thinking(text)]
            case _State.ARGUMENTS:
                segments = [self._call() or Text(text)]
            case _State.START:
                segments = [Text(text.removeprefix("\n"))]
            case _:
                segments = [Text(text)]
        return [segment for segment in segments if isinstance(segment, Call) or segment.text]

    def _call(self) -> Call | None:
        if self._first_line:
            arguments = parse_arguments(self._held)
            return None if arguments is None else Call(self._first_line.rstrip(" \r\n"), arguments)
        text = parse_arguments(self._held)
        whole = {} if text is None else json.loads(text)
        if set(whole) != {"name", "arguments"} or whole["name"] not in self._names:
            return None
        if not isinstance(whole["arguments"], dict):
            return None
        return Call(whole["name"], json.dumps(whole["arguments"], ensure_ascii=False))


def parse_arguments(text: str) -> str | None:
    """The arguments of a call as the text of a JSON object, or None when `text` is not one object.

    JSON is kept as the model wrote it; Python's dict syntax, which GLM-4 writes at times, becomes JSON.
    """
    text = text.strip()
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # half a surrogate pair, or 1e999
        return text if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        pass  # not JSON; perhaps Python
    if len(text) > _MAX_LITERAL:
        return None
    try:
        literal = ast.literal_eval(text)
        if not isinstance(literal, dict) or not all(isinstance(key, str) for key in literal):
            return None
        written = json.dumps(literal, ensure_ascii=False, allow_nan=False)
        return written.encode().decode()  # refuses what JSON's branch refuses
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


class _ObjectScanner:
    """Follows the brackets and quotes of one object, in JSON or Python syntax, to see early that text is not one."""

    def __init__(self) -> None:
        self._position = 0
        self._depth = 0
        self._quote = ""
        self._escaped = False
        self._before_key = False  # just behind the first "{"
        self._closed = False

    def read(self, text: str) -> bool:
        """Look at what was added to `text` since the last call; False when it cannot be one object any more."""
        while self._position < len(text):
            character = text[self._position]
            self._position += 1
            if not self._accept(character):
                return False
        return True

    def _accept(self, character: str) -> bool:
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == self._quote:
                self._quote = ""
            return True
        if character.isspace():
            return True
        if self._closed or (self._depth == 0 and character != "{"):
            return False
        if self._before_key and character not in "\"'}":
            return False
        self._before_key = self._depth == 0
        if character in "\"'":
            self._quote = character
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self._closed = self._depth == 0
        return self._depth <= _MAX_DEPTH


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
