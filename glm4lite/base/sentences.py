"""Sentences for people, in English, that another language can say too.

    said = Sentence("{name} is larger than {size} MiB", name="a.txt", size=64)
    said               # "a.txt is larger than 64 MiB", a str like any other: for a terminal, a log, a file
    said.to_json()     # {"said": "{name} is larger than {size} MiB", "values": {"name": "a.txt", "size": 64}}

A front end in another language looks the pattern up in its table of words and puts the values in. A pattern it does not
know (an error from deep within a checkpoint, another library's words) is said in English.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Self

_PLACE = re.compile(r"\{(\w+)\}")


class Sentence(str):
    """A text that remembers its pattern and its values.

    A value is a text, a whole number (shown with commas), another Sentence, or a list of these. What stands in braces
    in the pattern and is no value's name stays as it is.
    """

    pattern: str
    values: Mapping[str, object]

    def __new__(cls, pattern: str, /, **values: object) -> Self:
        made = super().__new__(cls, _PLACE.sub(lambda place: _shown(values.get(place[1], place[0])), pattern))
        made.pattern, made.values = pattern, values
        return made

    def to_json(self) -> dict[str, Any]:
        """{"said": pattern, "values": …}; a value that is a Sentence is such an object, too."""
        values = {name: _json(value) for name, value in self.values.items()}
        return {"said": self.pattern, **({"values": values} if values else {})}

    @classmethod
    def from_json(cls, data: object) -> Sentence:
        """The inverse, also of a plain text; ValueError where it is neither."""
        if isinstance(data, str):
            return data if isinstance(data, Sentence) else Sentence(data)
        if not isinstance(data, Mapping) or not isinstance(pattern := data.get("said"), str):
            raise ValueError("it is no sentence")
        values = data.get("values", {})
        if not isinstance(values, Mapping) or not all(re.fullmatch(r"\w+", str(name)) for name in values):
            raise ValueError("a sentence's values are no object")
        return Sentence(pattern, **{str(name): _value(value) for name, value in values.items()})


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _json(value: object) -> Any:
    if isinstance(value, list | tuple):
        return [_json(one) for one in value]
    if isinstance(value, Sentence):
        return value.to_json()
    return value if isinstance(value, int) else str(value)


def _value(value: object) -> object:
    if isinstance(value, list):
        return [_value(one) for one in value]
    return value if isinstance(value, str | int) else Sentence.from_json(value)
