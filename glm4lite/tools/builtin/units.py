"""Units, for the `unit_convert` tool: one table of exact factors.

>>> convert(5, "km", "mile"), convert(20, "°C", "fahrenheit"), convert(1, "GiB", "MB")
('3.106856 mile', '68 fahrenheit', '1073.742 MB')
"""

import math
import re
from fractions import Fraction

from glm4lite.base.errors import ToolError
from glm4lite.tools.builtin.arithmetic import format_number

_SIGNIFICANT = 7

# dimension -> (factor to the base unit, names separated by "|"); singular, a final s is taken off before the look-up.
_TABLE: dict[str, tuple[tuple[str, str], ...]] = {
    "length": (
        ("1", "m|meter|metre|米|公尺"),
        ("1000", "km|kilometer|kilometre|kilo|公里|千米"),
        ("1/10", "dm|decimeter|decimetre|分米"),
        ("1/100", "cm|centimeter|centimetre|厘米|公分"),
        ("1/1000", "mm|millimeter|millimetre|毫米"),
        ("1/1000000", "um|µm|μm|micrometer|micrometre|micron|微米"),
        ("1/1000000000", "nm|nanometer|nanometre|纳米"),
        ("1609.344", "mi|mile|英里"),
        ("0.9144", "yd|yard|码"),
        ("0.3048", "ft|foot|feet|'|英尺"),
        ("0.0254", 'in|inch|inche|"|英寸'),
        ("1852", "nmi|nautical mile|海里"),
        ("9460730472580800", "ly|light year|light-year|光年"),
        ("149597870700", "au|astronomical unit"),
        ("500", "li|里"),
    ),
    "mass": (
        ("1", "kg|kilogram|kilogramme|公斤|千克"),
        ("1/1000", "g|gram|gramme|克"),
        ("1/1000000", "mg|milligram|毫克"),
        ("1/1000000000", "ug|µg|μg|mcg|microgram|微克"),
        ("1000", "t|tonne|metric ton|吨"),
        ("907.18474", "ton|short ton|us ton"),
        ("1016.0469088", "long ton|imperial ton"),
        ("0.45359237", "lb|pound|磅"),
        ("0.028349523125", "oz|ounce|盎司"),
        ("6.35029318", "st|stone"),
        ("1/5000", "ct|carat|克拉"),
        ("1/2", "jin|斤"),
    ),
    "volume": (
        ("1", "l|liter|litre|dm3|cubic decimeter|升"),
        ("1/1000", "ml|milliliter|millilitre|cm3|cc|cubic centimeter|cubic centimetre|毫升"),
        ("1/100", "cl|centiliter|centilitre"),
        ("1/10", "dl|deciliter|decilitre"),
        ("1000", "m3|cubic meter|cubic metre|立方米"),
        ("3.785411784", "gal|gallon|us gallon|加仑"),
        ("4.54609", "imperial gallon|uk gallon"),
        ("0.946352946", "qt|quart"),
        ("0.473176473", "pt|pint|us pint"),
        ("0.56826125", "imperial pint|uk pint"),
        ("0.2365882365", "cup|杯"),
        ("0.0295735295625", "fl oz|floz|fluid ounce"),
        ("0.01478676478125", "tbsp|tablespoon|汤匙"),
        ("0.00492892159375", "tsp|teaspoon|茶匙"),
        ("28.316846592", "ft3|cubic foot|cubic feet|cu ft"),
        ("0.016387064", "in3|cubic inch|cubic inche|cu in"),
        ("158.987294928", "barrel|bbl|桶"),
    ),
    "time": (
        ("1", "s|sec|second|秒"),
        ("1/1000", "ms|millisecond|毫秒"),
        ("1/1000000", "us|µs|μs|microsecond|微秒"),
        ("1/1000000000", "ns|nanosecond|纳秒"),
        ("60", "min|minute|分钟"),
        ("3600", "h|hr|hour|小时"),
        ("86400", "d|day|天|日"),
        ("604800", "wk|week|周|星期"),
        ("1209600", "fortnight"),
        ("2629746", "mo|month|月"),  # a twelfth of the Gregorian year
        ("31556952", "y|yr|year|年"),  # 365.2425 days
        ("315569520", "decade"),
        ("3155695200", "century|centurie|世纪"),
    ),
    "speed": (
        ("1", "m/s|mps|meter per second|metre per second|米每秒"),
        ("5/18", "km/h|kmh|kph|kmph|kilometer per hour|kilometre per hour|公里每小时"),
        ("0.44704", "mph|mi/h|mile per hour"),
        ("1852/3600", "kn|kt|knot|节"),
        ("0.3048", "ft/s|fps|foot per second|feet per second"),
        ("1000", "km/s|kilometer per second"),
        ("299792458", "c|speed of light"),
    ),
    "area": (
        ("1", "m2|sqm|sq m|square meter|square metre|平方米"),
        ("1000000", "km2|sq km|square kilometer|square kilometre|平方公里|平方千米"),
        ("1/10000", "cm2|sq cm|square centimeter|square centimetre|平方厘米"),
        ("1/1000000", "mm2|sq mm|square millimeter|square millimetre"),
        ("10000", "ha|hectare|公顷"),
        ("4046.8564224", "ac|acre|英亩"),
        ("2589988.110336", "mi2|sq mi|square mile|平方英里"),
        ("0.83612736", "yd2|sq yd|square yard"),
        ("0.09290304", "ft2|sqft|sq ft|square foot|square feet|平方英尺"),
        ("0.00064516", "in2|sq in|square inch|square inche"),
        ("2000/3", "mu|亩"),
    ),
    "data": (
        ("1", "byte|字节"),
        ("1/8", "bit|比特"),
        *((f"{1000**i}", f"{p[0]}b|{p}byte") for i, p in enumerate(("kilo", "mega", "giga", "tera", "peta"), 1)),
        *((f"{1024**i}", f"{p[0]}ib|{p}byte") for i, p in enumerate(("kibi", "mebi", "gibi", "tebi", "pebi"), 1)),
        *((f"{1000**i}/8", f"{p[0]}bit|{p}bit") for i, p in enumerate(("kilo", "mega", "giga", "tera", "peta"), 1)),
    ),
}
# kelvin = (value + offset) * factor
_TEMPERATURES: dict[str, tuple[str, str]] = {
    "k|kelvin|开尔文": ("0", "1"),
    "c|celsius|centigrade|degree celsius|degrees celsius|deg c|摄氏度|摄氏": ("273.15", "1"),
    "f|fahrenheit|degree fahrenheit|degrees fahrenheit|deg f|华氏度|华氏": ("459.67", "5/9"),
    "r|rankine": ("0", "5/9"),
}
# Where case decides: the table is looked up in lower case otherwise.
_CASED = {
    "B": "byte", "b": "bit", "kb": "kilobyte", "Kb": "kilobit", "Mb": "megabit", "Gb": "gigabit", "Tb": "terabit",
    "T": "t",
}  # fmt: skip


def convert(value: float, from_unit: str, to_unit: str) -> str:
    """`value` in `to_unit`, as "3.106856 mile" (7 significant digits, whole numbers in full); raises ToolError."""
    if not math.isfinite(value):
        raise ToolError(f"{value} is not a number that can be converted")
    source, target = _find(from_unit), _find(to_unit)
    # "c" is celsius and the speed of light: the reading that both units share is meant.
    shared = sorted(source.keys() & target.keys())
    if not shared:
        raise ToolError(f"{from_unit} is a unit of {_dimension(source)} and {to_unit} of {_dimension(target)}")
    (offset, factor), (to_offset, to_factor) = source[shared[0]], target[shared[0]]
    base = (Fraction(repr(float(value))) + offset) * factor
    if shared[0] == "temperature" and base < 0:
        raise ToolError(f"{value:g} {from_unit} is below absolute zero")
    result = base / to_factor - to_offset
    try:
        number: Fraction | float = result if abs(result) < 10**15 else float(result)
    except OverflowError as error:
        raise ToolError(f"{value:g} {from_unit} is too large to be given in {to_unit}") from error
    return f"{format_number(number, _SIGNIFICANT)} {to_unit}"


def _dimension(readings: dict[str, tuple[Fraction, Fraction]]) -> str:
    return min(readings, key=lambda name: name != "temperature")


def _find(unit: str) -> dict[str, tuple[Fraction, Fraction]]:
    """Dimension -> (offset, factor) of every reading of `unit`."""
    plain = re.sub(r"[\s_]+", " ", unit.replace("°", "").replace("^", "").replace("²", "2").replace("³", "3"))
    plain = plain.strip().rstrip(".")
    lower = _CASED.get(plain, plain.lower())
    spelled = re.sub(r"^(square|cubic) (.*)s$", r"\1 \2", lower)
    for name in (lower, spelled, lower.removesuffix("s"), re.sub("s per ", " per ", lower)):
        if name in _UNITS:
            return _UNITS[name]
    raise ToolError(f"the unit {unit[:40]!r} is not known")


def _all_units() -> dict[str, dict[str, tuple[Fraction, Fraction]]]:
    units: dict[str, dict[str, tuple[Fraction, Fraction]]] = {}
    for dimension, rows in _TABLE.items():
        for factor, names in rows:
            for name in names.split("|"):
                units.setdefault(name, {})[dimension] = (Fraction(0), _fraction(factor))
    for names, (offset, factor) in _TEMPERATURES.items():
        for name in names.split("|"):
            units.setdefault(name, {})["temperature"] = (_fraction(offset), _fraction(factor))
    return units


def _fraction(text: str) -> Fraction:
    above, _, below = text.partition("/")
    return Fraction(above) / Fraction(below or "1")


_UNITS = _all_units()
