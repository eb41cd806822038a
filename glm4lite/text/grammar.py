"""What an answer may be, as a grammar: JSON that follows a schema, calls whose arguments do, text in which they stand.

A grammar is text in llguidance's dialect of Lark. GLM-4 marks no calls: what begins with a declared tool's name on a
line of its own is one (`glm4lite.text.output_parser`), so that name opens the tool's schema; any other line is text.
Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md and …/json_schema.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from glm4lite.base.errors import SchemaError, shown

Schema: TypeAlias = Mapping[str, Any] | bool
ANY_OBJECT: Schema = {"type": "object", "additionalProperties": True}

MOST_CHARACTERS = 250_000  # of a schema as JSON
DEEPEST = 100  # lists and objects in each other
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|([{}\[\]])')
# One space at most: more of them, which a schema allows, would lead a model that goes on with spaces to its limit. And
# no \u: half a surrogate pair can be written with it, which is no text.
_WRITTEN = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": 'nrbtf\\"',
}
# Keywords beside which a schema's own properties are not all that an object may have.
_OPEN = ("additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf", "if", "unevaluatedProperties")


@dataclass(frozen=True)
class ToolForm:
    """A tool as a grammar knows it. `strict`: its arguments follow `schema` to the letter.

    Otherwise keywords and formats that llguidance does not know are passed over, and where nothing is said of
    arguments that are not declared, none are invented.
    """

    name: str
    schema: Schema
    strict: bool = False

    def arguments(self) -> Schema:
        """The schema of its arguments."""
        if self.strict or isinstance(self.schema, bool):
            return self.schema
        closed = {} if any(keyword in self.schema for keyword in _OPEN) else {"additionalProperties": False}
        return {"type": "object", **self.schema, **closed}


@dataclass(frozen=True)
class AnswerForm:
    """What one answer has to be.

    schema: of JSON that the whole answer is; None: it is text. tools: what may be called in it. must_call: it consists
    of calls of these. parallel: it may call several times. begun_thought: the prompt ends in `<think>`; may_think: the
    model may begin a thought itself.
    """

    schema: Schema | None = None
    tools: tuple[ToolForm, ...] = ()
    must_call: tuple[str, ...] = ()
    parallel: bool = True
    begun_thought: bool = False
    may_think: bool = False

    @property
    def bound(self) -> bool:
        """Whether it is anything but free text."""
        return self.schema is not None or bool(self.tools)

    @property
    def ends_itself(self) -> bool:
        """Whether all of it follows schemas, and ends where they say."""
        return self.schema is not None or bool(self.must_call)

    def grammar(self, separator: int | None) -> str:
        """`separator`: the id of the token between two parts of an answer, where the vocabulary has it."""
        return "\n".join(_Grammar(self, separator).lines())


def checked_schema(schema: object) -> Schema:
    """A schema that is JSON of bounded size; SchemaError."""
    if not isinstance(schema, Mapping | bool):
        raise SchemaError(f"a JSON schema is an object, found {shown(schema)}")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"the schema is not JSON ({error})") from None
    if len(text) > MOST_CHARACTERS:
        raise SchemaError(f"the schema has {len(text)} characters as JSON, more than {MOST_CHARACTERS}")
    depth = deepest = 0
    for bracket in _STRUCTURE.findall(text):
        depth += (bracket in ("{", "[")) - (bracket in ("}", "]"))
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise SchemaError(f"the schema is nested more than {DEEPEST} levels deep")
    return schema


class _Grammar:
    """The rules of one form. Terminals that begin a call are lazy: they end with their line, whatever else fits.

    Where one terminal ends, none that is legal there may go on with what can follow: the longest one is taken, and
    nothing is tried again.
    """

    def __init__(self, form: AnswerForm, separator: int | None) -> None:
        self._form, self._separator = form, separator
        self._tools = [tool for tool in form.tools if not form.must_call or tool.name in form.must_call]

    def lines(self) -> Iterator[str]:
        form = self._form
        yield f"start: {self._lead()} answer"
        yield r"BLANK: /[ \t\r]*\n/"
        yield r"LINE_END: /\n/"
        if form.begun_thought or form.may_think:
            # Space before it would make sure of a thought, where all else that may come is no text.
            yield "opening[lazy]: /<think>/" if form.ends_itself else r"opening[lazy]: /[ \t\r]{0,3}<think>/"
            yield r"thought[lazy]: /(?s:.*)<\/think>/"
        if form.schema is not None:
            yield f"json: {_json(form.schema)}"
        if self._tools:
            yield from self._calls()
        if form.must_call:
            yield f"answer: {self._parts('call')}"
        elif form.schema is not None:
            calls = f" | {self._parts('call')}" if self._tools else ""
            yield f"answer: json{calls}"
        else:
            alone = self._separator is not None and not form.parallel  # parts of text, until one has the call
            yield f"answer: {f'(text <[{self._separator}]>)* part' if alone else self._parts('part')}"
            yield from self._texts()

    def _lead(self) -> str:
        """A thought where the model thinks, and the line's end that GLM begins answers with, though no calls."""
        form = self._form
        thought = "thought BLANK{0,3}" if form.ends_itself else "thought"  # text begins as it likes
        if form.begun_thought:
            return thought
        if form.schema is not None:
            return f"LINE_END? (opening {thought})?" if form.may_think else "LINE_END?"
        return f"(BLANK{{0,3}} opening {thought})?" if form.may_think else ""

    def _parts(self, rule: str) -> str:
        if self._separator is None or not self._form.parallel:
            return rule
        return f"{rule} (<[{self._separator}]> {rule})*"

    def _calls(self) -> Iterator[str]:
        """`call`: one at the beginning of a line, and what may follow it there."""
        several = self._form.parallel
        for number, tool in enumerate(self._tools):
            # One terminal: a token may span a name, its space and its line end.
            yield f"name_{number}[lazy]: /[ \\t\\r]{{0,3}}{_escaped(tool.name)}[ \\t\\r]*\\n/"
            yield f"arguments_{number}: {_json(tool.arguments(), lenient=not tool.strict)}"
        yield f"call: {self._each('name_{0} arguments_{0}')} {'more* TRAIL?' if several else ''}"
        if several:
            for number, tool in enumerate(self._tools):
                yield f"next_{number}[lazy]: /[ \\t\\r]*\\n[ \\t\\r\\n]{{0,3}}{_escaped(tool.name)}[ \\t\\r]*\\n/"
            yield f"more: {self._each('next_{0} arguments_{0}')}"
            yield r"TRAIL: /[ \t\r\n]{1,4}/"

    def _texts(self) -> Iterator[str]:
        """`part`: calls, or lines of text behind which calls may come until a code block is opened.

        Behind a tool's name between lines of text also text that is no object may go on.
        """
        yield "part: text | BLANK* (line (line | BLANK)* (call | mentioned) | call)"
        yield "text: BLANK* (line (line | BLANK)*)? (FENCED | LAST)?"
        yield f"mentioned: {self._each('name_{0}')} NO_OBJECT?"
        yield "line: LINE"
        yield r"LINE: /[^\n]*[^ \t\r\n][^\n]*\n/ & ~/[ \t]*(```|~~~)[^\n]*\n/"
        yield r"FENCED: /[ \t]*(```|~~~)(?s:.*)/"
        yield r"LAST: /[^\n]+/"
        yield r"NO_OBJECT: /[ \t\r\n]*[^{ \t\r\n](?s:.*)|[ \t\r\n]+/"

    def _each(self, pattern: str) -> str:
        return f"({' | '.join(pattern.format(number) for number in range(len(self._tools)))})"


def _json(schema: Schema, lenient: bool = False) -> str:
    """JSON that follows a schema, for a rule's right side. What the schema says of llguidance itself is not heard."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return f"%json {json.dumps({**schema, 'x-guidance': {**_WRITTEN, 'lenient': lenient}})}"


def _escaped(name: str) -> str:
    """A tool's name in a regular expression; it consists of letters, digits, `_`, `-` and `.`."""
    return name.replace(".", r"\.")
