"""The tools that dialogues declare and use: the built-in ones, the pool of tools.toml, and made ones.

A `Skill` is one declared tool together with the knowledge of how people ask for it: `request` draws a `Step`, which is
what a user says, the calls that answer it with their observations, and the final answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nano.values import Values, table

Schema = dict[str, Any]
REASONS = (
    "service unavailable",
    "timeout",
    "permission denied",
    "not found",
    "quota exceeded",
    "no connection",
    "bad request",
)


@dataclass(frozen=True)
class Call:
    """One tool call: the arguments in the declared order, and what the tool gives back."""

    name: str
    arguments: dict[str, Any]
    observation: str

    def arguments_json(self) -> str:
        return json.dumps(self.arguments, ensure_ascii=False)


@dataclass(frozen=True)
class Step:
    """What is said between two user messages. `facts`: texts that a right answer contains."""

    user: str
    calls: tuple[Call, ...]
    answer: str
    facts: tuple[str, ...]
    category: str


@dataclass(frozen=True)
class Skill:
    """A declared tool (`schema`: name, description, parameters) and how it is asked for."""

    key: str
    schema: Schema
    request: Callable[[Values, bool], Step]
    more: Callable[[Values, bool], Step] | None = None
    variants: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.schema["name"])


def schema(name: str, description: str, properties: dict[str, tuple[str, str]]) -> Schema:
    """A declaration in the key order of the chat format; properties: name -> (JSON type, description)."""
    return {
        "name": name,
        "description": description,
        "parameters": {
            "type": "object",
            "properties": {key: {"type": kind, "description": text} for key, (kind, text) in properties.items()},
            "required": list(properties),
        },
    }


_OPTIONAL = (
    ("verbose", {"type": "boolean", "description": "Say more.", "default": False}),
    ("limit", {"type": "integer", "description": "Most results.", "default": 5}),
    ("format", {"type": "string", "description": "Form of the result.", "default": "text"}),
    ("lang", {"type": "string", "default": "en"}),
    ("days", {"type": "integer", "default": 1}),
)


def _varied(rng: random.Random, declared: Schema) -> Schema:
    """Some declarations have an optional parameter, which requests leave out, or no descriptions of parameters."""
    properties: dict[str, Schema] = declared["parameters"]["properties"]
    if rng.random() < 0.08:
        for parameter in properties.values():
            parameter.pop("description")
    if rng.random() < 0.1:
        name, optional = rng.choice(_OPTIONAL)
        properties.setdefault(name, dict(optional))
    return declared


def typed(text: str, kind: str) -> Any:
    """The JSON value of an argument for the declared type."""
    if kind == "string":
        return text
    return int(text) if kind == "integer" else (float(text) if "." in text else int(text))


def failure(reason: str, chinese: bool) -> str:
    """What nano answers when a tool failed."""
    return f"没有成功：{reason}" if chinese else f"That did not work: {reason}"


_BEFORE_QUESTION = (
    "",
    "",
    "",
    "",
    "Hey, ",
    "Hi! ",
    "Quick question: ",
    "Hello, ",
    "So ",
    "Ok, ",
    "Tell me, ",
    "Please tell me, ",
)
_BEFORE_ORDER = (
    "",
    "",
    "",
    "",
    "Please ",
    "Can you ",
    "Could you ",
    "I want you to ",
    "Hey, ",
    "Would you ",
    "Hi, please ",
    "Now ",
)
_BEFORE_ZH = ("", "", "", "", "请", "帮我", "请问", "麻烦", "你好，", "请帮我", "现在")
_AFTER = ("", "", "", "", " please", " now", " for me", ", thanks")


def phrased(rng: random.Random, text: str, question: bool, chinese: bool) -> str:
    """A core request with one of many openings, capitals and endings."""
    if chinese:
        return rng.choice(_BEFORE_ZH) + text + rng.choice(("？", "", "?") if question else ("", "。", "", "！"))
    before = rng.choice(_BEFORE_QUESTION if question else _BEFORE_ORDER)
    asks = question or before in ("Can you ", "Could you ", "Would you ")
    text = before + text + (rng.choice(_AFTER) if not question and rng.random() < 0.4 else "")
    if not before and rng.random() < 0.7:
        text = text[0].upper() + text[1:]
    elif rng.random() < 0.2:
        text = text[0].lower() + text[1:]
    return text + (rng.choice(("?", "?", "?", "")) if asks else rng.choice(("", ".", "", "!")))


def _observation(rng: random.Random, values: dict[str, str]) -> str:
    if rng.random() < 0.6:

        def value(text: str) -> Any:
            try:
                return typed(text, "number")
            except ValueError:
                return text

        return json.dumps({key: value(text) for key, text in values.items()}, ensure_ascii=False)
    return ", ".join(f"{key}: {text}" for key, text in values.items())


def _settle(text: str) -> str:
    """A number as JSON writes it back: 7.50 is 7.5, 007 is 7."""
    try:
        return json.dumps(typed(text, "number")) if text.replace(".", "", 1).lstrip("-").isdigit() else text
    except ValueError:
        return text


def pool_skill(rng: random.Random, entry: dict[str, Any]) -> Skill:
    """One tool of tools.toml, with drawn names and descriptions."""
    params = [(rng.choice(p["n"]), str(p["t"]), str(p["k"]), rng.choice(p["d"])) for p in entry["params"]]
    name = rng.choice(entry["names"])
    declared = _varied(rng, schema(name, rng.choice(entry["descs"]), {n: (t, d) for n, t, _, d in params}))

    def build(values: Values, chinese: bool, templates: list[tuple[str, bool]], raw: bool) -> Step:
        rng = values.rng
        arguments = [values.draw(kind, chinese) for _, _, kind, _ in params]
        template, question = rng.choice(templates)
        said = template.format(*arguments)
        user = said if raw else phrased(rng, said, question, chinese)
        call = {n: typed(a, t) for (n, t, _, _), a in zip(params, arguments, strict=True)}
        if rng.random() < 0.06:
            reason = rng.choice((rng.choice(REASONS), f"{rng.choice(REASONS)}: {arguments[0]}"))
            answer = failure(reason, chinese)
            return Step(user, (Call(name, call, f"Error: {reason}"),), answer, (reason,), "tool error")
        fields = {key: _settle(values.draw(kind, chinese)) for key, kind in entry["fields"].items()}
        say = str(entry["say_zh" if chinese else "say_en"])
        answer = say.format(*arguments, **fields)
        facts = tuple(text for key, text in fields.items() if "{" + key + "}" in say)
        return Step(user, (Call(name, call, _observation(rng, fields)),), answer, facts or (arguments[0],), "pool tool")

    def request(values: Values, chinese: bool) -> Step:
        language = "zh" if chinese else "en"
        ask = [(text, True) for text in entry["ask_" + language]]
        do = [(text, False) for text in entry["do_" + language]]
        return build(values, chinese, ask + do, raw=False)

    def more(values: Values, chinese: bool) -> Step:
        return build(values, chinese, [(text, True) for text in entry["more_zh" if chinese else "more_en"]], raw=True)

    return Skill(entry["names"][0], declared, request, more if "more_en" in entry and "more_zh" in entry else None)


def made_skill(rng: random.Random, verb: int, thing: int) -> Skill:
    """A tool made of a verb and a thing, such as "archive_invoice"."""
    words = {key: str(text).split() for key, text in table("smalltalk.toml")["made"].items()}  # type: ignore[attr-defined]
    do, what = words["verbs"][verb], words["things"][thing]
    do_zh, what_zh = words["verbs_zh"][verb], words["things_zh"][thing]
    name = rng.choice((f"{do}_{what}", f"{do}_{what}", f"{what}_{do}", f"{do}{what.capitalize()}"))
    param = rng.choice(("id", f"{what}_id", "name", "number", "key", what))
    kind, json_type = rng.choice(
        (("int", "integer"), ("int", "string"), ("code", "string"), ("word", "string"), ("person", "string"))
    )
    description = rng.choice(
        (f"{do.capitalize()} a {what}.", f"{do.capitalize()} the {what} with this {param}.", f"{do_zh}{what_zh}。")
    )
    about = rng.choice((f"Which {what}.", f"The {what} to {do}.", f"{param} of the {what}.", f"要{do_zh}的{what_zh}。"))
    declared = _varied(rng, schema(name, description, {param: (json_type, about)}))

    def build(values: Values, chinese: bool, raw: bool) -> Step:
        rng = values.rng
        value = values.draw(kind, False)
        if chinese:
            said = rng.choice(
                (f"{do_zh}{what_zh} {value}", f"{do_zh}{what_zh}{value}", f"把{what_zh} {value} {do_zh}一下")
            )
            more = rng.choice((f"还有 {value}", f"{value} 也要"))
        else:
            said = rng.choice((f"{do} {what} {value}", f"{do} the {what} {value}", f"{do} my {what} {value}"))
            more = rng.choice((f"and {value}", f"now {what} {value}", f"also {value}"))
        user = more if raw else phrased(rng, said, False, chinese)
        if rng.random() < 0.08:
            reason = rng.choice((rng.choice(REASONS), f"no {what} {value}"))
            call = Call(name, {param: typed(value, json_type)}, f"Error: {reason}")
            return Step(user, (call,), failure(reason, chinese), (reason,), "tool error")
        status = values.draw(rng.choice(("state", "state", "int")), False)
        observation = (
            status if rng.random() < 0.4 else _observation(rng, {rng.choice(("status", "result", "state")): status})
        )
        answer = f"{what_zh} {value}：{status}。" if chinese else f"{what.capitalize()} {value}: {status}."
        call = Call(name, {param: typed(value, json_type)}, observation)
        return Step(user, (call,), answer, (status,), "made tool")

    return Skill(f"made {do} {what}", declared, lambda v, zh: build(v, zh, False), lambda v, zh: build(v, zh, True))
