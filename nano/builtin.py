"""Requests for the three built-in tools; their observations come from the tools themselves."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

from glm4lite import clock
from glm4lite.errors import ToolError
from glm4lite.messages import ToolCall
from glm4lite.tools import BUILTIN_TOOLS, run_tool
from nano.toolbox import Call, Skill, Step, failure, phrased, typed
from nano.values import Values, words

_TOOLS = {tool.name: tool for tool in BUILTIN_TOOLS}

_ASK = ("what is {e}", "what's {e}", "how much is {e}", "{e} = ", "{e}", "what does {e} give", "what do I get for {e}", "what is the result of {e}")
_DO = ("calculate {e}", "compute {e}", "evaluate {e}", "work out {e}", "solve {e}", "calc {e}", "tell me {e}", "do the math: {e}")
_ASK_ZH = ("{e}等于多少", "{e} 等于多少", "{e}是多少", "{e} 是多少", "{e}等于几", "{e}", "{e} = ", "{e}的结果是什么")
_DO_ZH = ("计算{e}", "计算 {e}", "算一下{e}", "算一下 {e}", "算算 {e}", "求 {e}")
# What is said, what is calculated.
_SPOKEN = (
    ("{a} plus {b}", "{a} + {b}"), ("{a} minus {b}", "{a} - {b}"), ("{a} times {b}", "{a} * {b}"),
    ("{a} divided by {b}", "{a} / {b}"), ("{a} multiplied by {b}", "{a} * {b}"), ("the sum of {a} and {b}", "{a} + {b}"),
    ("the product of {a} and {b}", "{a} * {b}"), ("{a} squared", "{a} ** 2"), ("{a} cubed", "{a} ** 3"),
    ("the square root of {a}", "sqrt({a})"), ("{a} percent of {b}", "{a} / 100 * {b}"), ("{a}% of {b}", "{a} / 100 * {b}"),
    ("{a} to the power of {d}", "{a} ** {d}"),
)  # fmt: skip
_ORDERS = (
    ("add {a} and {b}", "{a} + {b}"), ("multiply {a} by {b}", "{a} * {b}"), ("divide {a} by {b}", "{a} / {b}"),
    ("subtract {b} from {a}", "{a} - {b}"), ("multiply {a} and {b}", "{a} * {b}"), ("add {b} to {a}", "{a} + {b}"),
)  # fmt: skip
_SPOKEN_ZH = (
    ("{a}加{b}", "{a} + {b}"), ("{a}减{b}", "{a} - {b}"), ("{a}乘以{b}", "{a} * {b}"), ("{a}除以{b}", "{a} / {b}"),
    ("{a}乘{b}", "{a} * {b}"), ("{a}的平方", "{a} ** 2"), ("{a}的平方根", "sqrt({a})"), ("{b}的百分之{a}", "{a} / 100 * {b}"),
    ("{a}加上{b}", "{a} + {b}"), ("{a}减去{b}", "{a} - {b}"),
)  # fmt: skip


def _expression(values: Values) -> str:
    rng = values.rng
    a, b, c, d = (values.number() for _ in range(4))
    ops = [rng.choice("+-*/") for _ in range(3)]
    tight = rng.random() < 0.25
    shapes = [
        (46, f"{a} {ops[0]} {b}"), (12, f"{a} {ops[0]} {b} {ops[1]} {c}"), (9, f"({a} {ops[0]} {b}) {ops[1]} {c}"),
        (9, f"{a} {ops[0]} ({b} {ops[1]} {c})"), (4, f"({a} {ops[0]} {b}) {ops[1]} ({c} {ops[2]} {d})"),
        (4, f"{values.digits(1, 3)} ** {rng.randint(2, 6)}"), (3, f"{values.digits(1, 3)}^{rng.randint(2, 6)}"),
        (4, f"{a} × {b}"), (3, f"{a} ÷ {b}"), (3, f"sqrt({values.digits(1, 5)})"), (3, f"-{a} {ops[0]} {b}"), (2, f"{a} % {b}"),
    ]  # fmt: skip
    text = rng.choices([shape for _, shape in shapes], [weight for weight, _ in shapes])[0]
    return text.replace(" ", "") if tight else text


def _spoken(values: Values, table: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    parts = {"a": values.number(), "b": values.number(), "d": str(values.rng.randint(2, 5))}
    said, meant = values.rng.choice(table)
    return said.format(**parts), meant.format(**parts)


def _observe(name: str, arguments: dict[str, Any]) -> str:
    call = Call(name, arguments, "")
    return run_tool(_TOOLS[name], ToolCall("1", name, call.arguments_json())).content


def _answered(user: str, call: Call, chinese: bool, answer: Callable[[str], str], facts: Callable[[str], tuple[str, ...]], category: str) -> Step:
    if call.observation.startswith("Error: "):
        reason = call.observation.removeprefix("Error: ")
        return Step(user, (call,), failure(reason, chinese), (reason,), "tool error")
    return Step(user, (call,), answer(call.observation), facts(call.observation), category)


def _calculated(user: str, expression: str, chinese: bool) -> Step:
    call = Call("calculator", {"expression": expression}, _observe("calculator", {"expression": expression}))
    stop = "。" if chinese else "."
    return _answered(user, call, chinese, lambda seen: f"{expression} = {seen}{stop}", lambda seen: (seen,), "calculator")


def _calculator(values: Values, chinese: bool) -> Step:
    rng = values.rng
    while True:
        if rng.random() < 0.6:
            said = meant = _expression(values)
            orders = False
        else:
            orders = not chinese and rng.random() < 0.3
            said, meant = _spoken(values, _ORDERS if orders else _SPOKEN_ZH if chinese else _SPOKEN)
        question = rng.random() < 0.6 and not orders
        if not orders:
            frames = (_ASK_ZH if question else _DO_ZH) if chinese else (_ASK if question else _DO)
            frame = rng.choice(frames)
            said = frame.format(e=said)
        user = said + "?" if said.endswith("= ") else phrased(rng, said, question, chinese)
        step = _calculated(user, meant, chinese)
        if len(step.calls[0].observation) <= 20 or step.category == "tool error":
            return step


def _more_calculator(values: Values, chinese: bool) -> Step:
    expression = _expression(values)
    frames = ("那{e}呢？", "{e}呢", "再算 {e}") if chinese else ("and {e}?", "what about {e}?", "And {e}", "now {e}")
    return _calculated(values.rng.choice(frames).format(e=expression), expression, chinese)


def _time(values: Values, chinese: bool, frames: tuple[str, ...], raw: bool) -> Step:
    rng = values.rng
    city = values.city(chinese)
    for _ in range(8 if rng.random() < 0.8 else 0):  # most cities asked for should be ones the tool knows
        if _local(city, rng) is not None:
            break
        city = values.city(chinese)
    if rng.random() < 0.04:
        city = values.open(lambda: rng.choice(_zones()))
    said = rng.choice(frames).format(c=city)
    seen = _local(city, rng) or _observe("current_time", {"city": city})
    call = Call("current_time", {"city": city}, seen)

    def answer(seen: str) -> str:
        date, hour, day = seen.split(",")[0].split()
        return f"{city}现在是 {hour}，{date} {day}。" if chinese else f"It is {hour} in {city} on {day}, {date}."

    user = said if raw else phrased(rng, said, True, chinese)
    return _answered(user, call, chinese, answer, lambda seen: tuple(seen.split(",")[0].split()[:2]), "current_time")


def _zones() -> list[str]:
    return "Asia/Tokyo Europe/Paris America/New_York Africa/Cairo Australia/Sydney Europe/Oslo Asia/Dubai America/Lima Asia/Seoul UTC Europe/Rome Asia/Kolkata America/Chicago Africa/Lagos Pacific/Auckland America/Denver".split()


def _local(city: str, rng: random.Random) -> str | None:
    moment = datetime(2024, 1, 1, tzinfo=timezone.utc) + timedelta(minutes=rng.randint(0, 6 * 365 * 24 * 60))
    try:
        return clock.local_time(city, at=moment)
    except ToolError:
        return None


_TIME = ("what time is it in {c}", "what is the time in {c}", "what's the time in {c}", "current time in {c}", "time in {c}", "what is the local time in {c}", "what day is it in {c}", "what is the date in {c}", "do you know what time it is in {c}", "how late is it in {c}", "tell me the time in {c}", "what's the current time in {c} right now")
_TIME_ZH = ("{c}现在几点", "{c}几点了", "现在{c}几点", "{c}的时间", "{c}现在是什么时间", "{c}今天几号", "{c}今天星期几", "{c}当地时间是几点", "查一下{c}的时间")
_MORE_TIME = ("and in {c}?", "what about {c}?", "And {c}?", "and {c}?", "in {c}?")
_MORE_TIME_ZH = ("那{c}呢？", "{c}呢？", "{c}呢")

_UNITS = (
    (20, "km kilometers m meters cm mm mile miles mi foot feet ft inch inches yard yards yd"), (14, "kg g mg lb lbs oz pounds ounces kilograms grams stone t"),
    (9, "l liters ml gallon gallons cup cups pint quart tbsp tsp"), (8, "s min h hours minutes seconds day days week weeks year"),
    (7, "km/h m/s mph knots kph"), (7, "KB MB GB TB MiB GiB kilobyte byte bit"), (6, "m2 km2 acre acres hectare ha sqft"), (9, "C F K celsius fahrenheit kelvin °C °F"),
)  # fmt: skip
_UNITS_ZH = ((10, "公里 米 厘米 毫米 英里 英尺 英寸 码 里"), (8, "公斤 千克 克 磅 盎司 斤 吨"), (5, "升 毫升 加仑 杯"), (4, "秒 分钟 小时 天 周"), (3, "平方米 公顷 英亩 亩"), (4, "摄氏度 华氏度"))


def _units(values: Values, chinese: bool) -> tuple[str, str]:
    rng = values.rng
    groups = _UNITS_ZH if chinese and rng.random() < 0.6 else _UNITS
    names = rng.choices([names.split() for _, names in groups], [weight for weight, _ in groups])[0]
    if rng.random() < 0.04:
        return rng.choice(names), rng.choice(words("odd_unit"))
    pair = values.open(lambda: " ".join(rng.sample(names, 2)))
    source, _, target = pair.partition(" ")
    return source, target


_UNIT = ("how many {t} is {v} {f}", "what is {v} {f} in {t}", "how much is {v} {f} in {t}", "how many {t} are {v} {f}", "{v} {f} in {t}", "{v} {f} to {t}", "what's {v}{f} in {t}", "how many {t} are there in {v} {f}")
_UNIT_DO = ("convert {v} {f} to {t}", "convert {v}{f} to {t}", "convert {v} {f} into {t}", "turn {v} {f} into {t}", "express {v} {f} in {t}", "change {v} {f} to {t}")
_UNIT_ZH = ("{v}{f}等于多少{t}", "{v} {f} 等于多少 {t}", "{v} {f}是多少{t}", "{v}{f}有多少{t}", "{v} {f} 合多少 {t}")
_UNIT_DO_ZH = ("把{v}{f}换算成{t}", "把 {v} {f} 换成 {t}", "将{v}{f}转换为{t}", "换算 {v} {f} 到 {t}")


def _converted(user: str, arguments: dict[str, Any], said: str, chinese: bool) -> Step:
    call = Call("unit_convert", arguments, _observe("unit_convert", arguments))
    source = arguments["from_unit"]
    form = "{v} {f} 等于 {seen}。" if chinese else "{v} {f} is {seen}."
    return _answered(
        user, call, chinese, lambda seen: form.format(v=said, f=source, seen=seen), lambda seen: (seen.split()[0],), "unit_convert"
    )


def _unit(values: Values, chinese: bool) -> Step:
    rng = values.rng
    number, (source, target) = values.number(), _units(values, chinese)
    if rng.random() < 0.04:
        number = "-" + number
    question = rng.random() < 0.5
    frames = (_UNIT_ZH if question else _UNIT_DO_ZH) if chinese else (_UNIT if question else _UNIT_DO)
    said = rng.choice(frames).format(v=number, f=source, t=target)
    arguments = {"value": typed(number, "number"), "from_unit": source, "to_unit": target}
    return _converted(phrased(rng, said, question, chinese), arguments, number, chinese)


def _more_unit(values: Values, chinese: bool) -> Step:
    number, (source, target) = values.number(), _units(values, chinese)
    frames = ("{v}{f}是多少{t}？", "那{v} {f}换成{t}呢？") if chinese else ("and {v} {f} in {t}?", "what about {v} {f} in {t}?", "now {v} {f} to {t}")
    arguments = {"value": typed(number, "number"), "from_unit": source, "to_unit": target}
    said = values.rng.choice(frames).format(v=number, f=source, t=target)
    return _converted(said, arguments, number, chinese)


def builtin_skills() -> list[Skill]:
    """The built-in tools with their own schemas, in their own order."""
    ways: dict[str, tuple[Callable[[Values, bool], Step], Callable[[Values, bool], Step]]] = {
        "calculator": (_calculator, _more_calculator),
        "current_time": (
            lambda v, zh: _time(v, zh, _TIME_ZH if zh else _TIME, raw=False),
            lambda v, zh: _time(v, zh, _MORE_TIME_ZH if zh else _MORE_TIME, raw=True),
        ),
        "unit_convert": (_unit, _more_unit),
    }
    return [Skill(name, _TOOLS[name].schema()["function"], *ways[name]) for name in ways]
