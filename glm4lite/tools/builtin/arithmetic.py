"""Arithmetic in text, for the `calculator` tool: parsed by `ast`, evaluated by a table of allowed nodes, never `eval`.

Values are Python ints and Fractions as long as they can be, so 0.1 + 0.2 is 0.3 and 1/3*3 is 1.

    >>> evaluate("2 * (3 + 4)"), evaluate("0.1 + 0.2"), evaluate("6 ÷ 4"), evaluate("2^10"), evaluate("1,200 / 7")
    ('14', '0.3', '1.5', '1024', '171.4285714')
"""

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction
from typing import TypeAlias

from glm4lite.base.errors import ToolError

Number: TypeAlias = int | Fraction | float

_MAX_CHARACTERS = 1000
_MAX_NESTING = 50  # of parentheses; Python's parser itself gives up at 200
_MAX_BITS = 4000  # of an exact value: about 1200 digits
_SIGNIFICANT = 10

# What people type for operators; full-width forms (U+FF01..FF5E) are mapped by their offset from ASCII.
_SIGNS = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    | dict.fromkeys("×·∙⋅", "*")
    | dict.fromkeys("÷∕", "/")
    | dict.fromkeys("−–—", "-")
    | dict.fromkeys("\n\t\u3000", " ")
    | {"^": "**", "＾": "**", "π": "pi", "√": "sqrt"}
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


def evaluate(expression: str) -> str:
    """The value of `expression` as text: exact for whole numbers, else 10 significant digits.

    Knows + - * / // % ** ^ × ÷ parentheses, sqrt, abs, round, floor, ceil, min, max, pi, e, and 1,234 as one number.
    Raises ToolError, in one line, for anything else and for what would be too large.
    """
    if len(expression) > _MAX_CHARACTERS:
        raise ToolError(f"the expression is longer than {_MAX_CHARACTERS} characters")
    tree = _parse(_normalize(expression))
    try:
        return format_number(_value(tree), _SIGNIFICANT)
    except ZeroDivisionError as error:
        raise ToolError("division by zero") from error
    except OverflowError as error:
        raise ToolError("the result is too large") from error
    except RecursionError as error:
        raise ToolError("the expression is nested too deeply") from error


def format_number(value: Number, significant: int) -> str:
    """Decimal text with at most `significant` digits, whole numbers in full and no trailing zeros.

    Digits before the point are never dropped, however many there are: two after it are then kept.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ToolError("the result is not a finite number")
        value = int(value) if value.is_integer() and abs(value) < 2**53 else value
    elif value.denominator == 1:
        value = value.numerator
    if isinstance(value, int):
        return str(value)
    whole = len(str(abs(int(value))))
    known = 16 if isinstance(value, float) else 25  # digits worth printing; a binary float has no more
    context = Context(prec=whole + 2 if significant <= whole < known else significant)
    if isinstance(value, float):
        decimal = context.create_decimal(Decimal(repr(value)))
    else:
        decimal = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    decimal = decimal.normalize(context)
    if -7 <= decimal.adjusted() < known:
        return f"{decimal:f}"
    return f"{decimal:e}".replace("e+", "e")


def _normalize(expression: str) -> str:
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: f"**({found.group().translate(_SUPERSCRIPTS)})", expression)
    text = text.translate(_SIGNS).strip().rstrip("=? ")
    text = re.sub(r"(?<=[\d)])(?:\s+|(?<!\b0))[xX]\s*(?=[\d(.])", "*", text)  # 37 x 24, and 0x10 stays a number
    text = re.sub(r"sqrt\s*(\d+(?:\.\d+)?)", r"sqrt(\1)", text)  # √16
    return re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda found: _joined(found, text), text)


def _joined(found: "re.Match[str]", text: str) -> str:
    """1,234 without its comma, unless it stands among the arguments of a function: max(1,234) has two."""
    openers: list[bool] = []
    for position, character in enumerate(text[: found.start()]):
        if character == "(":
            openers.append(re.search(r"[A-Za-z_]\s*$", text[:position]) is not None)
        elif character == ")" and openers:
            openers.pop()
    return found.group() if any(openers) else found.group().replace(",", "")


def _parse(text: str) -> ast.expr:
    if not text:
        raise ToolError("the expression is empty")
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if deepest > _MAX_NESTING:
        raise ToolError("the expression is nested too deeply")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser warns about "1if" and the like
            return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ToolError(f"not an arithmetic expression: {_excerpt(text)}") from error
    except (ValueError, MemoryError, RecursionError) as error:
        raise ToolError(f"the expression cannot be read: {_excerpt(text)}") from error


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _value(node: ast.expr) -> Number:
    """The value of one node of the tree; the table of node types is the whole language."""
    if isinstance(node, ast.Constant):
        return _constant(node)
    if isinstance(node, ast.Name) and node.id.lower() in _CONSTANTS:
        return _CONSTANTS[node.id.lower()]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _bounded(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.Call):
        return _bounded(_call(node))
    raise ToolError(f"only arithmetic can be calculated, found {_excerpt(ast.unparse(node))}")


def _constant(node: ast.Constant) -> Number:
    value = node.value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ToolError(f"only numbers can be calculated, found {_excerpt(repr(value))}")
    if isinstance(value, int):
        return _bounded(value)
    if not math.isfinite(value):
        raise ToolError("a number in the expression is too large")
    return _bounded(Fraction(repr(value)))  # the decimal that was written, not the nearest binary one


def _bounded(value: Number) -> Number:
    if isinstance(value, complex):
        raise ToolError("the result is not a real number")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise OverflowError
        return value
    if value.denominator.bit_length() > _MAX_BITS:
        return float(value)
    if value.numerator.bit_length() > _MAX_BITS:
        raise OverflowError
    return value.numerator if value.denominator == 1 else value


def _divide(left: Number, right: Number) -> Number:
    if isinstance(left, float) or isinstance(right, float):
        return left / right
    return Fraction(left) / right


def _power(base: Number, exponent: Number) -> Number:
    """base ** exponent, exact for a whole exponent as long as the result is of a bearable size."""
    if isinstance(exponent, int) and not isinstance(base, float):
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if size <= 1 or size * abs(exponent) <= _MAX_BITS:
            return Fraction(base) ** exponent
        if isinstance(base, int) and exponent > 0:
            raise OverflowError
    if exponent == Fraction(1, 2):
        return _sqrt(base)
    if base < 0 and not isinstance(exponent, int):
        raise ToolError("the result is not a real number")
    result: float = float(base) ** float(exponent)
    if result == 0 and base != 0:
        raise ToolError("the result is too small")
    return result


def _sqrt(value: Number) -> Number:
    if value < 0:
        raise ToolError("the square root of a negative number is not a real number")
    if isinstance(value, float):
        return math.sqrt(value)
    root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    return root if root * root == value else math.sqrt(value)


def _round(value: Number, digits: Number = 0) -> Number:
    """Half to even, as Python does."""
    if not isinstance(digits, int) or abs(digits) > 100:
        raise ToolError("round needs a whole number of digits between -100 and 100")
    return round(Fraction(value), digits)


_CONSTANTS: dict[str, Number] = {"pi": math.pi, "e": math.e}
_OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
# name: (function, fewest arguments, most arguments)
_FUNCTIONS: dict[str, tuple[Callable[..., Number], int, int]] = {
    "sqrt": (_sqrt, 1, 1),
    "abs": (abs, 1, 1),
    "round": (_round, 1, 2),
    "floor": (math.floor, 1, 1),
    "ceil": (math.ceil, 1, 1),
    "min": (min, 2, 100),
    "max": (max, 2, 100),
}


def _call(node: ast.Call) -> Number:
    name = node.func.id.lower() if isinstance(node.func, ast.Name) else ""
    if name not in _FUNCTIONS or node.keywords:
        raise ToolError(f"only {', '.join(_FUNCTIONS)} can be called, found {_excerpt(ast.unparse(node))}")
    function, fewest, most = _FUNCTIONS[name]
    if not fewest <= len(node.args) <= most:
        count = "1 number" if most == 1 else f"{fewest} to {most} numbers"
        raise ToolError(f"{name} takes {count}, found {len(node.args)}")
    return function(*(_value(argument) for argument in node.args))
