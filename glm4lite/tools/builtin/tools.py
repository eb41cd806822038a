"""The tools that every chat has."""

from glm4lite.tools.builtin import arithmetic, clock, units
from glm4lite.tools.tool import Tool, tool


@tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression exactly.

    Args:
        expression: Arithmetic, for example 2 * (3 + 4).
    """
    return arithmetic.evaluate(expression)


@tool
def current_time(city: str) -> str:
    """Current date and time in a city.

    Args:
        city: City name or IANA time zone, for example Paris.
    """
    return clock.local_time(city)


@tool
def unit_convert(value: float, from_unit: str, to_unit: str) -> str:
    """Convert a value from one unit to another.

    Args:
        value: Value to convert.
        from_unit: Unit of the value, for example km.
        to_unit: Unit wanted, for example mile.
    """
    return units.convert(value, from_unit, to_unit)


BUILTIN_TOOLS: tuple[Tool, ...] = (calculator, current_time, unit_convert)
