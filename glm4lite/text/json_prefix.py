"""JsonObject: says of each next byte whether the text so far can still become one JSON object.

    >>> start = JsonObject()
    >>> start.then(b'{"a": [1,').then(b"2]}").complete, start.then(b'{"a" 1')
    (True, None)

For forcing a model to write JSON; what it writes is parsed like anything else. So that parsing always succeeds,
numbers have at most 30 digits and two in the exponent, nesting at most 32 levels, and surrogates are not escaped.
"""

from __future__ import annotations

from dataclasses import dataclass

_SPACE = b" \t\n\r"
_DIGITS = b"0123456789"
_HEX = b"0123456789abcdefABCDEF"
_LITERALS = {ord("t"): "rue", ord("f"): "alse", ord("n"): "ull"}
_MAX_DEPTH, _MAX_DIGITS, _MAX_EXPONENT = 32, 30, 2
# What a number may go on with: state -> {byte: next state}; "int", "frac", "exp" and "zero" are whole numbers already.
_NUMBER = {
    "minus": {b"0": "zero", b"123456789": "int"},
    "zero": {b".": "point", b"eE": "e"},
    "int": {_DIGITS: "int", b".": "point", b"eE": "e"},
    "point": {_DIGITS: "frac"},
    "frac": {_DIGITS: "frac", b"eE": "e"},
    "e": {b"+-": "sign", _DIGITS: "exp"},
    "sign": {_DIGITS: "exp"},
    "exp": {_DIGITS: "exp"},
}
_WHOLE = ("zero", "int", "frac", "exp")
# The shortest way on from where only few bytes are possible.
_WAY_ON = {"start": "{", "key": '"', "first key": "}", "colon": ":", "value": '"', "first item": "]", "escape": "n"}


@dataclass(frozen=True, slots=True)
class JsonObject:
    """A place in a JSON object. `stack`: open brackets; `is_key`: the string that is open is a key."""

    state: str = "start"
    stack: str = ""
    is_key: bool = False
    count: int = 0  # digits of the number, hexadecimal digits of \\u
    rest: str = ""  # of a literal

    @property
    def complete(self) -> bool:
        """The object is closed; nothing may follow."""
        return self.state == "end"

    def then(self, text: bytes) -> JsonObject | None:
        """The place after `text`, or None when no object goes on like this."""
        place: JsonObject | None = self
        for byte in text:
            if place is None:
                return None
            place = place._step(byte)
        return place

    def way_on(self) -> str:
        """One character that may come next and leads towards the end."""
        if self.state == "literal":
            return self.rest[0]
        if self.state == "unicode":
            return "0"
        if self.state in _NUMBER and self.state not in _WHOLE:
            return "0"
        if self.state == "after" or self.state in _WHOLE:
            return "}" if self.stack[-1] == "{" else "]"
        return _WAY_ON.get(self.state, '"')  # in a string: its end

    def _step(self, byte: int) -> JsonObject | None:
        match self.state:
            case "string" | "escape" | "unicode":
                return self._in_string(byte)
            case "literal":
                return self._in_literal(byte)
            case "end":
                return None
        if self.state in _NUMBER:
            return self._in_number(byte)
        if byte in _SPACE:
            return self
        match self.state:
            case "start":
                return self._open("{") if byte == ord("{") else None
            case "key" | "first key":
                if byte == ord('"'):
                    return JsonObject("string", self.stack, is_key=True)
                return self._close("{") if byte == ord("}") and self.state == "first key" else None
            case "colon":
                return JsonObject("value", self.stack) if byte == ord(":") else None
            case "after":
                return self._after(byte)
        return self._value(byte)

    def _value(self, byte: int) -> JsonObject | None:
        if byte == ord("]") and self.state == "first item":
            return self._close("[")
        if byte in b"{[":
            return self._open(chr(byte))
        if byte == ord('"'):
            return JsonObject("string", self.stack)
        if byte in _LITERALS:
            return JsonObject("literal", self.stack, rest=_LITERALS[byte])
        if byte == ord("-"):
            return JsonObject("minus", self.stack)
        if byte in _DIGITS:
            return JsonObject("zero" if byte == ord("0") else "int", self.stack, count=1)
        return None

    def _open(self, bracket: str) -> JsonObject | None:
        if len(self.stack) >= _MAX_DEPTH:
            return None
        return JsonObject("first key" if bracket == "{" else "first item", self.stack + bracket)

    def _close(self, bracket: str) -> JsonObject | None:
        if self.stack[-1] != bracket:
            return None
        stack = self.stack[:-1]
        return JsonObject("after" if stack else "end", stack)

    def _after(self, byte: int) -> JsonObject | None:
        if byte == ord(","):
            return JsonObject("key" if self.stack[-1] == "{" else "value", self.stack)
        return self._close({ord("}"): "{", ord("]"): "["}.get(byte, ""))

    def _in_literal(self, byte: int) -> JsonObject | None:
        if byte != ord(self.rest[0]):
            return None
        rest = self.rest[1:]
        return JsonObject("literal" if rest else "after", self.stack, rest=rest)

    def _in_number(self, byte: int) -> JsonObject | None:
        following = next((state for group, state in _NUMBER[self.state].items() if byte in group), None)
        if following is None:
            if self.state not in _WHOLE:
                return None
            return JsonObject("after", self.stack)._step(byte)
        digits = 0 if following == "e" else self.count + (byte in _DIGITS)
        most = _MAX_EXPONENT if following in ("exp", "sign", "e") else _MAX_DIGITS
        return JsonObject(following, self.stack, count=digits) if digits <= most else None

    def _in_string(self, byte: int) -> JsonObject | None:
        inside = JsonObject("string", self.stack, self.is_key)
        if self.state == "escape":
            if byte == ord("u"):
                return JsonObject("unicode", self.stack, self.is_key)
            return inside if byte in b'"\\/bfnrt' else None
        if self.state == "unicode":
            surrogate = self.count == 1 and self.rest in ("d", "D") and byte in b"89abcdefABCDEF"
            if byte not in _HEX or surrogate:
                return None
            return (
                inside if self.count == 3 else JsonObject("unicode", self.stack, self.is_key, self.count + 1, chr(byte))
            )
        if byte == ord('"'):
            return JsonObject("colon" if self.is_key else "after", self.stack)
        if byte == ord("\\"):
            return JsonObject("escape", self.stack, self.is_key)
        return inside if byte >= 0x20 else None
