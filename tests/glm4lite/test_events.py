"""The lines of `--json` are those of docs/events.schema.json, of the version that the first line tells."""

from __future__ import annotations

import json
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator, ValidationError

from glm4lite.base.events import FORMAT_VERSION, Done, Event, Start, TextDelta, ToolCallStarted
from glm4lite.cli.terminal import JsonLines
from tests.commands import forked

SCHEMA: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs" / "events.schema.json").read_text())
EVENTS = (Start, *get_args(Event))


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    Draft202012Validator.check_schema(SCHEMA)
    return Draft202012Validator(SCHEMA)


def test_real_output_with_a_tool_call_is_valid(validator: Draft202012Validator) -> None:
    command = [*forked(), "chat", "-p", "What is 37 * 24?", "--json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line in lines:
        validator.validate(line)
    assert lines[0] == {"type": "start", "version": FORMAT_VERSION}
    assert {line["type"] for line in lines} >= {"start", "progress", "tool_call", "tool_result", "text", "done"}


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.type)
def test_the_schema_has_each_event_with_its_fields(event: type[Any]) -> None:
    described = SCHEMA["$defs"][event.type]
    assert list(described["properties"]) == ["type", *(field.name for field in fields(event))]
    assert described["required"] == list(described["properties"])
    assert described["properties"]["type"] == {"const": event.type}


def test_the_schema_has_no_other_events_and_this_version() -> None:
    assert [reference["$ref"].rpartition("/")[2] for reference in SCHEMA["oneOf"]] == list(SCHEMA["$defs"])
    assert set(SCHEMA["$defs"]) == {event.type for event in EVENTS}
    assert SCHEMA["$defs"]["start"]["properties"]["version"]["const"] == FORMAT_VERSION


@pytest.mark.parametrize(
    "line",
    [
        {"type": "text"},
        {"type": "start", "version": 2},
        {"type": "other"},
        {**Done(1, 1, "stop", 1.0, 1).to_json(), "finish_reason": "tired"},
        {**ToolCallStarted("1", "look", {}).to_json(), "arguments": "{}"},
    ],
    ids=str,
)
def test_the_schema_refuses_what_is_none(line: dict[str, Any], validator: Draft202012Validator) -> None:
    with pytest.raises(ValidationError):
        validator.validate(line)


def test_the_version_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = JsonLines()
    lines.show_all(iter([TextDelta("a")]))
    lines.show_all(iter([TextDelta("b")]))
    types = [json.loads(line)["type"] for line in capsys.readouterr().out.splitlines()]
    assert types == ["start", "text", "text"]
