"""The arguments of a tool call: where the object that a model writes ends, and what it says, as JSON.

Models write JSON with raw line ends in its strings, and at times Python's syntax; both are read and written anew.
"""

import ast
import json
import re
import warnings
from typing import Any

_MAX_LITERAL = 20_000  # characters of Python syntax given to ast.literal_eval
_MAX_DEPTH = 64  # of nested objects and lists
_STRINGS = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_CONTROLS = re.compile(r"(\\.)|[\x00-\x1f]", re.DOTALL)


class ObjectScanner:
    """Follows the brackets and quotes of one object, in JSON or Python syntax, as its text arrives."""

    def __init__(self) -> None:
        self.closed = False
        self.failed = False  # the text cannot be one object any more
        self._depth = 0
        self._quote = ""
        self._escaped = False
        self._before_key = False  # just behind the first "{"

    def read(self, text: str) -> int:
        """How many characters of `text` belong to the object: all, unless it is `closed` or has `failed`."""
        for place, character in enumerate(text):
            if self._quote:
                self._in_string(character)
            elif not character.isspace():
                self.failed = not self._accept(character)
                if self.failed or self.closed:
                    return place + self.closed
        return len(text)

    def _in_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == self._quote:
            self._quote = ""

    def _accept(self, character: str) -> bool:
        if self._depth == 0 and character != "{":
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
            self.closed = self._depth == 0
        return self._depth <= _MAX_DEPTH


def parse_arguments(text: str) -> str | None:
    """The text of a JSON object that any reader takes alike, or None when `text` is not one object.

    JSON stays as the model wrote it. Written anew are JSON with raw control characters in its strings, or with a key
    that is said twice (the last counts), and Python's dict syntax, which GLM-4 writes at times.
    """
    text = text.strip()
    for read in (_strict_json, _json, _python):
        try:
            value = read(text)
            written = json.dumps(value, ensure_ascii=False, allow_nan=False)
            written.encode()  # half a surrogate pair is no text
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict):
            return text if read is _strict_json else written
    return None


def _strict_json(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_said_once)


def _json(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant, strict=False)


def _python(text: str) -> Any:
    if len(text) > _MAX_LITERAL:
        raise ValueError("too long")
    escaped = _STRINGS.sub(lambda found: _CONTROLS.sub(_escape, found.group()), text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an escape that Python does not know, as in 'C:\dir'
        value = ast.literal_eval(escaped)
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise ValueError("a key is not text")
    return value


def _escape(found: re.Match[str]) -> str:
    return found.group(1) or f"\\x{ord(found.group()):02x}"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _said_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is said twice")
    return found
