import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Optional

import pytest
from pydantic import BaseModel, Field

from glm4lite.base.errors import ToolError
from glm4lite.base.events import Done, Progress, TextDelta, ThinkingDelta, ToolCallFinished, ToolCallStarted
from glm4lite.text.messages import ToolCall
from glm4lite.tools.builtin import clock
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS, calculator, unit_convert
from glm4lite.tools.running import MAX_RESULT_CHARACTERS, run_tool
from glm4lite.tools.tool import Tool, tool


def call(declared: Tool, **arguments: Any) -> ToolCall:
    return ToolCall("call_1", declared.name, json.dumps(arguments))


# The schemas the embedded model is trained on: a change here asks for new training.
TRAINED_SCHEMAS = [
    '{"name": "calculator", "description": "Evaluate an arithmetic expression exactly.",'
    ' "parameters": {"type": "object", "properties": {'
    '"expression": {"type": "string", "description": "Arithmetic, for example 2 * (3 + 4)."}},'
    ' "required": ["expression"]}}',
    '{"name": "current_time", "description": "Current date and time in a city.", "parameters": {"type": "object",'
    ' "properties": {"city": {"type": "string", "description": "City name or IANA time zone, for example Paris."}},'
    ' "required": ["city"]}}',
    '{"name": "unit_convert", "description": "Convert a value from one unit to another.",'
    ' "parameters": {"type": "object", "properties": {"value": {"type": "number", "description": "Value to convert."},'
    ' "from_unit": {"type": "string", "description": "Unit of the value, for example km."},'
    ' "to_unit": {"type": "string", "description": "Unit wanted, for example mile."}},'
    ' "required": ["value", "from_unit", "to_unit"]}}',
]


def test_the_builtin_schemas_are_the_ones_the_embedded_model_knows() -> None:
    assert [json.dumps(t.schema()["function"]) for t in BUILTIN_TOOLS] == TRAINED_SCHEMAS


class Place(BaseModel):
    title: str = Field(description="Its name.")


@tool
def forecast(
    city: str,
    days: Annotated[int, Field(description="How many days.", ge=1)] = 1,
    unit: Literal["C", "F"] = "C",
    title: Optional[str] = None,  # noqa: UP045  # both spellings of a union are supported
    place: Place | None = None,
    wind: bool = Field(default=False, description="With wind."),
    _private: list[int] | None = None,
) -> dict[str, Any]:
    """Forecast for
    a city.

    More words that the model does not need.

    Args:
        city (str): Name of the city,
            with continuation.
        days: Not used: the annotation wins.
        unit: Unit: C or F.

    Returns:
        A forecast.
    """
    return {"city": city, "days": days, "unit": unit, "place": place.title if place else "北", "private": _private}


def test_a_typed_function_becomes_a_schema() -> None:
    schema = forecast.schema()
    assert list(schema["function"]) == ["name", "description", "parameters"]
    assert schema["function"]["description"] == "Forecast for a city."
    parameters = schema["function"]["parameters"]
    assert parameters["required"] == ["city"]
    properties = parameters["properties"]
    assert properties["city"] == {"type": "string", "description": "Name of the city, with continuation."}
    assert properties["days"] == {"type": "integer", "description": "How many days.", "default": 1, "minimum": 1}
    assert properties["unit"] == {"type": "string", "description": "Unit: C or F.", "default": "C", "enum": ["C", "F"]}
    assert properties["title"] == {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    assert properties["wind"] == {"type": "boolean", "description": "With wind.", "default": False}
    place = parameters["$defs"]["Place"]
    assert place["properties"] == {"title": {"type": "string", "description": "Its name."}}


def test_a_tool_is_still_its_function() -> None:
    assert forecast("X", days=2)["days"] == 2


def test_name_and_description_can_be_given() -> None:
    @tool(name="other", description="Else.")
    def function() -> int:
        return 1

    assert (function.name, function.description) == ("other", "Else.")
    assert function.parameters == {"type": "object", "properties": {}}
    assert run_tool(function, ToolCall("1", "other", "")).content == "1"


def test_a_result_that_is_not_text_is_json() -> None:
    result = run_tool(forecast, call(forecast, city="Köln", place={"title": "P"}, _private=[1]))
    assert not result.error
    assert result.content == '{"city": "Köln", "days": 1, "unit": "C", "place": "P", "private": [1]}'


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        ("{}", "needs the argument 'city'"),
        ('{"city": "X", "rain": 1}', "no argument 'rain' (its arguments: city, days"),
        ('{"city": 5}', "city: Input should be a valid string"),
        ('{"city": "X", "days": "many"}', "days: Input should be a valid integer"),
        ('{"city": "X", "days": 0}', "greater than or equal to 1"),
        ('{"city": "X", "place": {"title": 1}}', "place"),
        ("[" * 9000, "not JSON"),
    ],
)
def test_wrong_arguments_are_one_line_of_error(arguments: str, reason: str) -> None:
    result = run_tool(forecast, ToolCall("1", "forecast", arguments))
    assert result.error
    assert result.content.startswith("Error: ")
    assert reason in result.content
    assert "\n" not in result.content


def test_a_number_in_quotes_is_still_a_number() -> None:
    assert (
        run_tool(unit_convert, ToolCall("1", "", '{"value": "5", "from_unit": "km", "to_unit": "m"}')).content
        == "5000 m"
    )


def raising(error: BaseException) -> Callable[[], None]:
    def broken() -> None:
        raise error

    return broken


@pytest.mark.parametrize(
    ("error", "content"),
    [
        (ToolError("no such city"), "Error: no such city"),
        (ZeroDivisionError("division\nby zero"), "Error: ZeroDivisionError: division by zero"),
        (SystemExit(3), "Error: SystemExit: 3"),
        (KeyboardInterrupt(), "Error: KeyboardInterrupt:"),
        (RuntimeError("\ud800"), "Error: RuntimeError: ?"),
    ],
)
def test_a_tool_that_raises_is_an_observation(error: BaseException, content: str) -> None:
    broken = tool(raising(error))
    result = run_tool(broken, call(broken))
    assert result.error
    assert result.content == content


@pytest.mark.parametrize(
    "result", [{1, 2}, object(), b"bytes", {"a": object()}], ids=["set", "object", "bytes", "inside"]
)
def test_a_result_that_is_not_json_is_an_error(result: object) -> None:
    declared = Tool("f", "", {}, lambda: result)
    observed = run_tool(declared, call(declared))
    assert observed.error
    assert "is not JSON" in observed.content


def test_a_circular_result_is_an_error() -> None:
    circle: list[Any] = []
    circle.append(circle)
    declared = Tool("f", "", {}, lambda: circle)
    assert run_tool(declared, call(declared)).error


def test_a_tool_that_takes_too_long_is_an_error() -> None:
    release, ended = threading.Event(), threading.Event()

    def slow() -> None:
        release.wait(60)
        ended.set()

    declared = Tool("slow", "", {}, slow)
    result = run_tool(declared, call(declared), timeout_s=0.1)
    assert not ended.is_set()
    release.set()
    assert (result.content, result.error) == ("Error: slow did not finish within 0.1 s", True)


def test_an_async_tool_is_awaited() -> None:
    @tool
    async def later(x: int) -> int:
        """Later."""
        return x + 1

    assert run_tool(later, call(later, x=1)).content == "2"


def test_a_very_long_result_is_cut_and_says_so() -> None:
    declared = Tool("long", "", {}, lambda: "x" * 1_000_000)
    content = run_tool(declared, call(declared)).content
    assert len(content) < MAX_RESULT_CHARACTERS + 100
    assert content.endswith("x\n[cut: 984000 more characters]")


def test_a_very_long_result_that_is_not_text_is_not_even_written_in_full() -> None:
    declared = Tool("long", "", {}, lambda: [["x"] * 1000] * 100_000)
    started = time.process_time()
    content = run_tool(declared, call(declared)).content
    assert time.process_time() - started < 2
    assert content.startswith('[["x", "x"')
    assert content.endswith("\n[cut: the rest]")


def test_a_result_is_cut_to_the_room_there_is() -> None:
    declared = Tool("long", "", {}, lambda: "x" * 100)
    assert run_tool(declared, call(declared), fits=lambda text: 30).content == "x" * 30 + "\n[cut: 70 more characters]"


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Shouting(str):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __len__(self) -> int:
        raise RuntimeError("no length")


@dataclass
class Point:
    x: int


@pytest.mark.parametrize(
    ("error", "content"),
    [
        (Silent(), "Error: Silent: (Silent without text)"),
        (ToolError(Silent()), "Error: (ToolError without text)"),
        (GeneratorExit(), "Error: GeneratorExit:"),
        (RuntimeError("\x1b[2J\0"), "Error: RuntimeError: \ufffd[2J\ufffd"),
    ],
)
def test_whatever_is_raised_is_one_printable_line(error: BaseException, content: str) -> None:
    declared = Tool("f", "", {}, raising(error))
    assert run_tool(declared, call(declared)).content == content


def test_an_error_of_many_megabytes_is_cut() -> None:
    declared = Tool("f", "", {}, raising(RuntimeError("word\n" * 10_000_000)))
    assert len(run_tool(declared, call(declared)).content) <= MAX_RESULT_CHARACTERS + 100


@pytest.mark.parametrize(
    ("result", "content"),
    [
        (Shouting("said"), "said"),
        (Point(1), "Error: the tool's result (Point) is not JSON"),
        ((letter for letter in "ab"), "Error: the tool's result (generator) is not JSON"),
        (float("nan"), "Error: the tool's result (float) is not JSON"),
        (10**5000, "Error: the tool's result (int) is not JSON"),
        ("\ud800", "?"),
        (None, "null"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_odd_result_is_text_or_one_line_of_error(result: object, content: str) -> None:
    declared = Tool("f", "", {}, lambda: result)
    observed = run_tool(declared, call(declared))
    assert observed.content.startswith(content)
    assert "\n" not in observed.content
    assert observed.error == content.startswith("Error")


def test_a_rule_about_approval_that_ends_the_program_asks() -> None:
    def rule(_: object) -> bool:
        raise SystemExit(0)

    assert Tool("f", "", {}, print, needs_approval=rule).asks({})


def test_an_undeclared_tool_is_an_error() -> None:
    assert run_tool(None, ToolCall("1", "nope", "{}")).content == "Error: there is no tool named nope"


def test_extra_keywords_go_where_the_schema_allows_them() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    declared = Tool("f", "", schema, lambda **values: values)
    assert run_tool(declared, call(declared, a=1)).content == '{"a": 1}'
    assert run_tool(declared, call(declared, b=1)).error


def untyped(x) -> None:  # type: ignore[no-untyped-def]
    """No type."""


def positional(x: int, /) -> None:
    """Positional."""


def variadic(*x: int) -> None:
    """Variadic."""


def unserializable(x: threading.Lock) -> None:
    """No JSON form."""


def unknown(x: "Nowhere") -> None:  # type: ignore[name-defined]  # noqa: F821
    """No such type."""


@pytest.mark.parametrize("function", [untyped, positional, variadic, unserializable, unknown])
def test_a_function_that_cannot_be_a_tool_is_named(function: Callable[..., Any]) -> None:
    with pytest.raises(ToolError, match=f"tool '{function.__name__}'"):
        tool(function)


class Node(BaseModel):
    value: int
    children: "list[Node]" = []


def nested(depth: int) -> Any:
    hint: Any = int
    for _ in range(depth):
        hint = list[hint]
    return hint


def function_of(hint: object) -> Callable[..., Any]:
    def function(x: Any) -> None: ...

    function.__annotations__["x"] = hint
    return function


def test_a_type_that_holds_itself_makes_a_schema() -> None:
    assert "Node" in tool(function_of(Node)).parameters["$defs"]


@pytest.mark.parametrize(
    ("hint", "reason"),
    [
        (Literal[tuple(f"choice {number}" for number in range(20_000))], "more than 16000"),
        (nested(100), "nested more than 64 levels"),
        (nested(3000), ""),
        ("1 +", "must be an expression"),
        ("1 / 0", "division by zero"),
    ],
    ids=["huge", "deep", "deeper", "no Python", "raises"],
)
def test_a_type_that_no_prompt_has_room_for_is_one_line(hint: object, reason: str) -> None:
    with pytest.raises(ToolError) as caught:
        tool(function_of(hint))
    assert str(caught.value).startswith("tool 'function': ")
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "a`", "x" * 65])
def test_a_name_the_model_cannot_write_is_refused(name: str) -> None:
    with pytest.raises(ToolError, match="name"):
        Tool(name, "", {}, print)


ARITHMETIC = {
    "37 * 24": "888",
    "2 * (3 + 4)": "14",
    "0.1 + 0.2": "0.3",
    "1/3*3": "1",
    "2^10": "1024",
    "2**100": "1267650600228229401496703205376",
    "6 ÷ 4": "1.5",
    "3 × 4 − 1": "11",
    "37 x 24 =": "888",
    "１２＋３": "15",
    "5² + √16": "29",
    "100/7": "14.28571429",
    "7 // 2 + 7 % 4": "6",
    "-7 // 2": "-4",
    "1,234,567.5 + 1": "1234568.5",
    "(1,234) * 2": "2468",
    "max(1,234)": "234",
    "max(1, 2.5, sqrt(4))": "2.5",
    "round(2.567, 2)": "2.57",
    "abs(-3) + floor(1.9) + ceil(1.1)": "6",
    "2 * pi": "6.283185307",
    "e ** 2": "7.389056099",
    "sqrt(2)": "1.414213562",
    "4 ** 0.5": "2",
    "2 ** -2": "0.25",
    "1e-7 / 3": "3.333333333e-8",
    "12345678901.25 * 2": "24691357802.5",
    "1.05 ** 10": "1.628894627",
    "-0.0": "0",
    "+".join(["1"] * 400): "400",
    "0.1 + 0.7 * 3": "2.2",
}


@pytest.mark.parametrize("expression", ARITHMETIC)
def test_arithmetic_is_exact(expression: str) -> None:
    assert calculator(expression) == ARITHMETIC[expression]


def test_whole_number_arithmetic_agrees_with_python() -> None:
    source = random.Random(3)
    for _ in range(300):
        text = str(source.randint(-99, 99))
        for _ in range(source.randint(1, 5)):
            text = f"({text}) {source.choice('+-*')} {source.randint(-999, 999)}"
        assert calculator(text) == str(eval(text))  # noqa: S307  # a text made two lines above


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "",
            " ",
            "1 +",
            "a",
            "2 * x",
            "True",
            "None",
            "'a' * 3",
            "3j",
            "lambda: 1",
            "[1][0]",
            "1 if 1 else 2",
            "1 < 2",
        ),
        *(
            "__import__('os').system('true')",
            "(1).__class__",
            "open('x')",
            "f'{1}'",
            "x := 1",
            "print(1)",
            "2(3)",
            "5!",
        ),
        *("1/0", "0 ** -1", "5 % 0", "sqrt(-1)", "(-8) ** (1/3)", "abs(1, 2)", "max()", "round(1, 1.5)", "sqrt(x=1)"),
        *("9 ** 9 ** 9", "1.5 ** 100000", "2 ** -9999999", "1e400", "10 ** 5000", "0.5 ** 9999", "round(1, 10**9)"),
        *("(" * 60 + "1" + ")" * 60, "-" * 2000 + "1", "1" * 2000, "~1", "1 << 99", "1 | 2", "a.b", "\0"),
        *("(" * 400 + "1", "sqrt(" * 45 + "1", "min(*[1,2])"),
    ],
)
def test_what_is_not_bearable_arithmetic_is_one_line_of_error(expression: str) -> None:
    started = time.thread_time()
    with pytest.raises(ToolError) as caught:
        calculator(expression)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert time.thread_time() - started < 0.5


CONVERSIONS = {
    (5, "km", "mile"): "3.106856 mile",
    (20, "°C", "Fahrenheit"): "68 Fahrenheit",
    (100, "F", "C"): "37.77778 C",
    (0, "K", "celsius"): "-273.15 celsius",
    (1, "GiB", "MB"): "1073.742 MB",
    (8, "Mb", "MB"): "1 MB",
    (12, "inches", "cm"): "30.48 cm",
    (1, "square miles", "km²"): "2.589988 km²",
    (60, "miles per hour", "km/h"): "96.56064 km/h",
    (1, "c", "km/s"): "299792.5 km/s",
    (2.5, "Hours", "minutes"): "150 minutes",
    (1, "US gallon", "liters"): "3.785412 liters",
    (20, "km", "mm"): "20000000 mm",
    (3, "公斤", "斤"): "6 斤",
    (1, "fl_oz", "ml"): "29.57353 ml",
    (0.1, "m", "cm"): "10 cm",
}


@pytest.mark.parametrize("conversion", CONVERSIONS, ids=str)
def test_units_are_converted(conversion: tuple[float, str, str]) -> None:
    assert unit_convert(*conversion) == CONVERSIONS[conversion]


@pytest.mark.parametrize(
    ("conversion", "reason"),
    [
        ((1, "km", "kg"), "km is a unit of length and kg of mass"),
        ((1, "C", "m"), "C is a unit of temperature"),
        ((1, "foo", "m"), "'foo' is not known"),
        ((-300, "C", "K"), "below absolute zero"),
        ((float("nan"), "km", "m"), "nan"),
        ((1e308, "km", "nm"), "too large"),
    ],
)
def test_what_cannot_be_converted_is_said(conversion: tuple[float, str, str], reason: str) -> None:
    with pytest.raises(ToolError, match=reason):
        unit_convert(*conversion)


MOMENT = datetime(2026, 11, 22, 12, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("city", "text"),
    [
        ("Tokyo", "2026-11-22 21:30 Sunday, Asia/Tokyo"),
        ("são paulo", "2026-11-22 09:30 Sunday, America/Sao_Paulo"),
        ("Europe/Paris", "2026-11-22 13:30 Sunday, Europe/Paris"),
        ("Paris, France", "2026-11-22 13:30 Sunday, Europe/Paris"),
        ("New York City", "2026-11-22 07:30 Sunday, America/New_York"),
        ("San Francisco", "2026-11-22 04:30 Sunday, America/Los_Angeles"),
        ("Beijing", "2026-11-22 20:30 Sunday, Asia/Shanghai"),
        ("北京", "2026-11-22 20:30 Sunday, Asia/Shanghai"),
        ("mumbai", "2026-11-22 18:00 Sunday, Asia/Kolkata"),
        ("Washington, D.C.", "2026-11-22 07:30 Sunday, America/New_York"),
        ("UTC", "2026-11-22 12:30 Sunday, UTC"),
        ("Auckland", "2026-11-23 01:30 Monday, Pacific/Auckland"),
    ],
)
def test_the_time_in_a_city(city: str, text: str) -> None:
    assert clock.local_time(city, MOMENT) == text


def test_every_city_of_the_table_has_a_zone() -> None:
    for zone, cities in clock._CITIES_OF_ZONES.items():
        for city in cities.split():
            assert clock.find_zone(city.replace("_", " ")) == zone


@pytest.mark.parametrize("city", ["Nowhere", "", "../../etc/passwd", "x" * 9000, "\0"])
def test_an_unknown_city_is_one_line_of_error(city: str) -> None:
    with pytest.raises(ToolError) as caught:
        clock.local_time(city)
    assert len(str(caught.value)) < 300


def test_events_are_json_lines_that_name_their_type() -> None:
    events = {
        TextDelta("a"): {"type": "text", "text": "a"},
        ThinkingDelta("b"): {"type": "thinking", "text": "b"},
        ToolCallFinished("1", "f", "x", False): {
            **{"type": "tool_result", "id": "1", "name": "f"},
            **{"content": "x", "error": False},
        },
        Progress("load", 1, 2, "bytes"): {"type": "progress", "stage": "load", "done": 1, "total": 2, "unit": "bytes"},
        Done(1, 2, "stop", 3.5, 4): {
            **{"type": "done", "prompt_tokens": 1, "new_tokens": 2, "finish_reason": "stop"},
            **{"tokens_per_s": 3.5, "prefilled_tokens": 4},
        },
    }
    for event, expected in events.items():
        assert event.to_json() == expected
        assert next(iter(event.to_json())) == "type"
    started = ToolCallStarted("1", "f", {"a": 1}).to_json()
    assert started == {"type": "tool_call", "id": "1", "name": "f", "arguments": {"a": 1}, "needs_approval": False}
