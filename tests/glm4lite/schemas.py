"""JSON schemas of many kinds, the same ones each time: written by hand, and put together at random."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

JSON = dict[str, Any]


def closed(properties: JSON, *required: str, **more: Any) -> JSON:
    """An object of these properties and no others; without names all are required."""
    names = list(required or properties)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False, **more}


CITY = closed({"name": {"type": "string", "maxLength": 12}, "inhabitants": {"type": "integer", "minimum": 0}})
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": closed(
            {
                "value": {"type": "integer", "maximum": 99, "minimum": 0},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "value",
        )
    },
}
BY_HAND: list[JSON] = [
    CITY,
    TREE,
    {"type": "object"},
    {},
    {"type": "string", "maxLength": 20},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    {"type": "string", "pattern": "ab+c", "maxLength": 10},
    {"type": "integer"},
    {"type": "integer", "minimum": -7, "maximum": 12},
    {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 2000},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    {"type": "number"},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": -3.5, "maximum": 2.25},
    {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 5},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["string", "null"], "maxLength": 8},
    {"type": ["integer", "boolean"]},
    {"const": "北京"},
    {"const": {"a": [1, None, {"b": "c\n"}]}},
    {"const": 'quote " and \\ and \t'},
    {"enum": ["sunny", "rain", 3, None, [1], {"a": 1}]},
    {"enum": ["上海", "北京", "a longer one with spaces"]},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "ipv6"},
    {"type": "string", "format": "email"},
    {"type": "array"},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 5},
    {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [{"type": "boolean"}], "items": {"type": "null"}, "maxItems": 3},
    {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "maxItems": 2},
    {"type": "array", "items": CITY, "minItems": 1, "maxItems": 2},
    {"type": "array", "maxItems": 0},
    closed({"城市": {"type": "string", "maxLength": 6}, "a key": {"type": "null"}, 'q"\\': {"const": 1}}),
    closed({"a": {"type": "integer"}, "b": {"type": "integer"}}, "b"),
    closed({"outer": closed({"middle": closed({"inner": closed({"value": {"type": "boolean"}})})})}),
    closed({f"field_{number}": {"type": "boolean"} for number in range(40)}),
    closed({f"field_{number}": {"type": "boolean"} for number in range(60)}, "field_0", "field_59"),
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    {"type": "object", "additionalProperties": {"enum": ["on", "off"]}, "minProperties": 1, "maxProperties": 1},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
    {"type": "object", "patternProperties": {"^x_[a-z]{1,3}$": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "required": ["unknown"]},
    {"type": "object", "properties": {"never": False, "always": True}, "required": ["always"]},
    {"properties": {"a": {"type": "integer"}}, "required": ["a"], "type": "object"},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 4}, {"type": "null"}]},
    {"anyOf": [closed({"kind": {"const": "a"}, "x": {"type": "integer"}}), closed({"kind": {"const": "b"}})]},
    {"oneOf": [{"type": "integer"}, {"type": "boolean"}]},
    {"oneOf": [closed({"kind": {"const": "a"}}), closed({"kind": {"const": "b"}, "y": {"type": "boolean"}})]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}, {"required": ["a"]}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/s"}}, "required": ["a"], "$defs": {"s": {"const": 1}}},
    {"$ref": "#/definitions/s", "definitions": {"s": {"type": "array", "items": {"type": "null"}, "maxItems": 3}}},
    {"type": "object", "properties": {"self": {"$ref": "#"}}, "additionalProperties": False},
    {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T", "description": "D", "type": "boolean"},
    {"type": "string", "maxLength": 10, "default": "x", "examples": ["y"], "deprecated": True},
    {"x-guidance": {"lenient": True, "whitespace_pattern": "x+"}, **CITY},
]

_TEXTS = (
    {"type": "string", "maxLength": 9},
    {"type": "string", "pattern": "^[a-z]{1,5}$"},
    {"type": "string", "format": "date"},
    {"enum": ["red", "green", "blue"]},
    {"enum": ["晴", "雨"]},
    {"const": "fixed"},
)
_NAMES = ("name", "city", "count", "is_open", "价格", "first name", "x", "unit", "items", "note", "kind", "data")


def made(chance: random.Random, depth: int = 3) -> JSON:
    """A schema whose documents are short."""
    kind = chance.choice(
        ("object", "object", "array", "any", "ref", "text", "number", "simple") if depth else ("text",)
    )
    match kind:
        case "object":
            names = chance.sample(_NAMES, chance.randint(1, 4))
            schema = closed({name: made(chance, depth - 1) for name in names}, *names[: chance.randint(1, len(names))])
            if chance.random() < 0.2:
                del schema["additionalProperties"]
            return schema
        case "array":
            least = chance.randint(0, 2)
            return {"type": "array", "items": made(chance, depth - 1), "minItems": least, "maxItems": least + 2}
        case "any":
            return {"anyOf": [made(chance, depth - 1) for _ in range(chance.randint(2, 3))]}
        case "ref":
            inner = made(chance, 0)
            return {"type": "array", "items": {"anyOf": [inner, {"type": "null"}]}, "maxItems": 2}
        case "number":
            least = chance.randint(-50, 50)
            whole = {"type": chance.choice(("integer", "number")), "minimum": least, "maximum": least + 90}
            return chance.choice(
                (whole, {"type": "integer", "exclusiveMinimum": least, "multipleOf": 3, "maximum": 999})
            )
        case "simple":
            return dict(chance.choice(({"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]})))
    return dict(chance.choice(_TEXTS))


def schemas(count: int, seed: int = 0) -> Iterator[JSON]:
    """`count` of them, those by hand first."""
    chance = random.Random(seed)
    yield from BY_HAND[:count]
    for _ in range(count - len(BY_HAND)):
        yield made(chance)
