"""The training text is what the chat template renders, and the labels teach the model's own output form."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glm4lite.text.messages import Message, ToolCall
from glm4lite.text.template import ChatTemplate
from glm4lite.text.tokenizer import Tokenizer as ChatTokenizer
from nano.dialogues import Dialogue, generate
from nano.export import TEMPLATE
from nano.render import IGNORED, encode, text_of
from nano.tokenizer import load

PACKAGE = Path(__file__).parents[2] / "glm4lite" / "nano"
PUBLISHED = Path(__file__).parents[3] / "shared" / "glm4" / "templates" / "glm4-0414_chat.jinja"


def _messages(dialogue: Dialogue) -> list[Message]:
    messages = [Message("system", dialogue.system)] if dialogue.system else []
    for step in dialogue.steps:
        messages.append(Message("user", step.user))
        calls = tuple(ToolCall(str(n), call.name, call.arguments_json()) for n, call in enumerate(step.calls))
        if calls:
            messages.append(Message("assistant", "", calls))
            messages += [Message("tool", call.observation, tool_call_id=str(n)) for n, call in enumerate(step.calls)]
        messages.append(Message("assistant", step.answer))
    return messages


def _render(source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = True) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)

    extensions: list[type[Extension]] = []
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    return environment.from_string(source).render(messages=messages, tools=tools, add_generation_prompt=True)


def test_training_text_is_what_the_template_renders() -> None:
    template, tokenizer = ChatTemplate.from_folder(PACKAGE), ChatTokenizer.from_folder(PACKAGE)
    fast, rng = load(PACKAGE), random.Random(2)
    assert template is not None
    for _ in range(5):
        dialogue = generate(rng)
        tools = [{"type": "function", "function": schema} for schema in dialogue.tools]
        ids = template.encode(tokenizer, _messages(dialogue), tools, add_generation_prompt=False)
        assert fast.decode(ids, skip_special_tokens=False) == text_of(dialogue)
        assert ids == encode(fast, dialogue, None).ids


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published template is not beside the repository")
def test_the_template_renders_as_the_published_one() -> None:
    tools = [
        {"type": "function", "function": {"name": "a", "description": "甲", "parameters": {"type": "object"}}},
        {"name": "b", "description": "", "parameters": {}},
    ]
    turns = [
        {"role": "user", "content": "U1\n"},
        {"role": "assistant", "metadata": "a", "content": '{"k": 1}'},
        {"role": "assistant", "metadata": "b", "content": "{}"},
        {"role": "observation", "content": "OA"},
        {"role": "observation", "content": "OB"},
        {"role": "assistant", "content": " A1"},
        {"role": "system", "content": "late"},
    ]
    for messages in ([], turns, [{"role": "system", "content": "S"}, *turns]):
        for declared in ([], tools[:1], tools):
            ours = _render(TEMPLATE.read_text(encoding="utf-8"), messages, declared)
            assert ours == _render(PUBLISHED.read_text(encoding="utf-8"), messages, declared)


def test_labels_teach_a_call_without_the_space_of_the_history_form() -> None:
    tokenizer, rng = load(PACKAGE), random.Random(4)
    while True:
        dialogue = generate(rng)
        if dialogue.steps[0].calls:
            break
    row = encode(tokenizer, dialogue, None)
    call = dialogue.steps[0].calls[0]
    taught = [label for label, turn in zip(row.labels, row.turns, strict=True) if turn == 0 and label != IGNORED]
    text = tokenizer.decode(taught, skip_special_tokens=False)
    assert text.startswith(f"{call.name}\n{call.arguments_json()}<|")
    assert text.endswith(f"\n{dialogue.steps[0].answer}<|user|>") or len(dialogue.steps) == 1
