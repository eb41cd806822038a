"""Requests for the three built-in tools; their observations come from the tools themselves."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from glm4lite.base.errors import ToolError
from glm4lite.text.messages import ToolCall
from glm4lite.tools.builtin import clock
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite.tools.running import run_tool
from nano.toolbox import Call, Skill, Step, failure, phrased, typed
from nano.values import Values, table, words

_TOOLS = {tool.name: tool for tool in BUILTIN_TOOLS}
_LONGEST_RESULT = 20  # characters; longer sums are not asked for
_EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
_MINUTES = 6 * 365 * 24 * 60


def _phrases(tool: str, kind: str, chinese: bool) -> list[Any]:
    texts: dict[str, list[Any]] = table("builtin.toml")[tool]  # type: ignore[assignment]
    return texts[f"{kind}_{'zh' if chinese else 'en'}"]


def _expression(values: Values) -> str:
    rng = values.rng
    a, b, c, d = (values.number() for _ in range(4))
    ops = [rng.choice("+-*/") for _ in range(3)]
    shapes = [
        (46, f"{a} {ops[0]} {b}"),
        (12, f"{a} {ops[0]} {b} {ops[1]} {c}"),
        (9, f"({a} {ops[0]} {b}) {ops[1]} {c}"),
        (9, f"{a} {ops[0]} ({b} {ops[1]} {c})"),
        (4, f"({a} {ops[0]} {b}) {ops[1]} ({c} {ops[2]} {d})"),
        (4, f"{values.digits(1, 3)} ** {rng.randint(2, 6)}"),
        (3, f"{values.digits(1, 3)}^{rng.randint(2, 6)}"),
        (4, f"{a} × {b}"),
        (3, f"{a} ÷ {b}"),
        (3, f"sqrt({values.digits(1, 5)})"),
        (3, f"-{a} {ops[0]} {b}"),
        (2, f"{a} % {b}"),
    ]
    text = rng.choices([shape for _, shape in shapes], [weight for weight, _ in shapes])[0]
    return text.replace(" ", "") if rng.random() < 0.25 else text


def _observe(name: str, arguments: dict[str, Any]) -> str:
    call = Call(name, arguments, "")
    return run_tool(_TOOLS[name], ToolCall("1", name, call.arguments_json())).content


def _answered(user: str, call: Call, chinese: bool, answer: str, facts: tuple[str, ...]) -> Step:
    """The step; a tool's error is answered by its reason instead."""
    if call.observation.startswith("Error: "):
        reason = call.observation.removeprefix("Error: ")
        return Step(user, (call,), failure(reason, chinese), (reason,), "tool error")
    return Step(user, (call,), answer, facts, call.name)


def _calculated(user: str, expression: str, chinese: bool) -> Step:
    chinese = chinese and any(ord(character) > 0x3000 for character in user)  # "7 * 8 =" is answered in English
    seen = _observe("calculator", {"expression": expression})
    call = Call("calculator", {"expression": expression}, seen)
    return _answered(user, call, chinese, f"{expression} = {seen}{'。' if chinese else '.'}", (seen,))


def _sum_in_words(values: Values, chinese: bool, orders: bool) -> tuple[str, str]:
    """("9 times 4", "9 * 4"); orders are whole requests, like "divide 9 by 4"."""
    parts = {"a": values.number(), "b": values.number(), "d": str(values.rng.randint(2, 5))}
    said, meant = values.rng.choice(_phrases("calculator", "orders" if orders else "spoken", chinese))
    return said.format(**parts), meant.format(**parts)


def _calculator_once(values: Values, chinese: bool) -> Step:
    rng = values.rng
    if rng.random() < 0.6:
        said = meant = _expression(values)
    else:
        orders = not chinese and rng.random() < 0.3
        said, meant = _sum_in_words(values, chinese, orders)
        if orders:
            return _calculated(phrased(rng, said, False, chinese), meant, chinese)
    question = rng.random() < 0.6
    said = rng.choice(_phrases("calculator", "ask" if question else "do", chinese)).format(e=said)
    user = said + "?" if said.endswith("= ") else phrased(rng, said, question, chinese)
    return _calculated(user, meant, chinese)


def _short(draw: Callable[[Values, bool], Step]) -> Callable[[Values, bool], Step]:
    """Draws again while the result is too long to be worth reading."""

    def drawn(values: Values, chinese: bool) -> Step:
        while True:
            step = draw(values, chinese)
            if len(step.calls[0].observation) <= _LONGEST_RESULT or step.category == "tool error":
                return step

    return drawn


def _more_calculator(values: Values, chinese: bool) -> Step:
    expression = _expression(values)
    frame = values.rng.choice(_phrases("calculator", "more", chinese))
    return _calculated(frame.format(e=expression), expression, chinese)


def _local(city: str, rng: random.Random) -> str | None:
    """What current_time says at some moment, or None for a city it does not know."""
    try:
        return clock.local_time(city, at=_EPOCH + timedelta(minutes=rng.randint(0, _MINUTES)))
    except ToolError:
        return None


def _asked_city(values: Values, chinese: bool) -> str:
    """Mostly a city the tool knows."""
    rng = values.rng
    if rng.random() < 0.04:
        zones: list[str] = table("builtin.toml")["current_time"]["zones"]  # type: ignore[index]
        return values.open(lambda: rng.choice(zones))
    city = values.city(chinese)
    for _ in range(8 if rng.random() < 0.8 else 0):
        if _local(city, rng) is not None:
            break
        city = values.city(chinese)
    return city


def _time(values: Values, chinese: bool, kind: str) -> Step:
    rng = values.rng
    city = _asked_city(values, chinese)
    said = rng.choice(_phrases("current_time", kind, chinese)).format(c=city)
    seen = _local(city, rng) or _observe("current_time", {"city": city})
    user = phrased(rng, said, True, chinese) if kind == "ask" else said
    call = Call("current_time", {"city": city}, seen)
    if seen.startswith("Error: "):
        return _answered(user, call, chinese, "", ())
    date, hour, day = seen.split(",")[0].split()
    answer = f"{city}现在是 {hour}，{date} {day}。" if chinese else f"It is {hour} in {city} on {day}, {date}."
    return _answered(user, call, chinese, answer, (date, hour))


def _units(values: Values, chinese: bool) -> tuple[str, str]:
    rng = values.rng
    groups = _phrases("unit_convert", "units", chinese and rng.random() < 0.6)
    names = rng.choices([names.split() for _, names in groups], [weight for weight, _ in groups])[0]
    if rng.random() < 0.04:
        return rng.choice(names), rng.choice(words("odd_unit"))
    source, _, target = values.open(lambda: " ".join(rng.sample(names, 2))).partition(" ")
    return source, target


def _unit(values: Values, chinese: bool, kind: str) -> Step:
    rng = values.rng
    number, (source, target) = values.number(), _units(values, chinese)
    if rng.random() < 0.04:
        number = "-" + number
    if kind == "ask" and rng.random() < 0.5:
        kind = "do"
    said = rng.choice(_phrases("unit_convert", kind, chinese)).format(v=number, f=source, t=target)
    user = said if kind == "more" else phrased(rng, said, kind == "ask", chinese)
    arguments = {"value": typed(number, "number"), "from_unit": source, "to_unit": target}
    seen = _observe("unit_convert", arguments)
    answer = f"{number} {source} 等于 {seen}。" if chinese else f"{number} {source} is {seen}."
    return _answered(user, Call("unit_convert", arguments, seen), chinese, answer, (seen.split()[0],))


def builtin_skills() -> list[Skill]:
    """The built-in tools with their own schemas, in their own order."""
    ways: dict[str, tuple[Callable[[Values, bool], Step], Callable[[Values, bool], Step]]] = {
        "calculator": (_short(_calculator_once), _short(_more_calculator)),
        "current_time": (lambda v, zh: _time(v, zh, "ask"), lambda v, zh: _time(v, zh, "more")),
        "unit_convert": (lambda v, zh: _unit(v, zh, "ask"), lambda v, zh: _unit(v, zh, "more")),
    }
    return [Skill(name, _TOOLS[name].schema()["function"], *ways[name]) for name in ways]
