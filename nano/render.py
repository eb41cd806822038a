"""Turns a dialogue into token ids and labels, in the form the chat template gives it.

`Rendered.text` equals what the template renders (a test holds that), except that a call which is the model's own fresh
output has no space after the tool's name: the template writes `name \\n`, the model is to write `name\\n`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from tokenizers import Tokenizer

from nano.dialogues import Dialogue
from nano.tokenizer import token_id
from nano.toolbox import Schema

IGNORED = -100


@dataclass(frozen=True)
class Piece:
    """A stretch of text; `taught`: the model learns to write it."""

    text: str
    taught: bool


def declaration(tools: tuple[Schema, ...]) -> str:
    """The system block that declares tools."""
    if not tools:
        return ""
    body = "".join(
        f"\n## {tool['name']}\n\n{json.dumps(tool, indent=4, ensure_ascii=False)}"
        "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
        for tool in tools
    )
    return "<|system|>\n# 可用工具\n" + body


def pieces(dialogue: Dialogue, fresh: random.Random | None = None) -> list[Piece]:
    """The conversation as text; with `fresh`, half of the calls are in the model's own output form."""
    system = f"<|system|>\n{dialogue.system}" if dialogue.system else ""
    parts = [Piece("[gMASK]<sop>" + declaration(dialogue.tools) + system, False)]
    for step in dialogue.steps:
        parts.append(Piece(f"<|user|>\n{step.user}", False))
        for call in step.calls:
            own = fresh is not None and fresh.random() < 0.5
            parts.append(Piece("<|assistant|>", False))
            parts.append(Piece(call.name + ("\n" if own else " \n") + call.arguments_json(), True))
        parts += [Piece(f"<|observation|>\n{call.observation}", False) for call in step.calls]
        parts += [Piece("<|assistant|>", False), Piece(f"\n{step.answer}", True)]
    return parts


def text_of(dialogue: Dialogue) -> str:
    """The conversation as the template renders it."""
    return "".join(piece.text for piece in pieces(dialogue))


@dataclass(frozen=True)
class Encoded:
    """Token ids; for each the id to predict next, or IGNORED; and the turn it belongs to."""

    ids: list[int]
    labels: list[int]
    turns: list[int]


def encode(tokenizer: Tokenizer, dialogue: Dialogue, fresh: random.Random | None) -> Encoded:
    """A dialogue as ids and labels: taught are the taught pieces and the special token that follows each."""
    spaced, newline, user = (token_id(tokenizer, token) for token in ("ĠĊ", "Ċ", "<|user|>"))
    parts = pieces(dialogue, fresh)
    encodings = tokenizer.encode_batch([part.text for part in parts], add_special_tokens=False)
    ids: list[int] = []
    taught: list[bool] = []
    turns: list[int] = []
    turn = -1
    for part, encoding in zip(parts, encodings, strict=True):
        ids += encoding.ids
        taught += [part.taught] * len(encoding.ids)
        turn += encoding.ids[0] == user
        turns += [turn] * len(encoding.ids)
    ids.append(user)
    taught.append(False)
    labels = []
    for position in range(len(ids) - 1):
        wanted = taught[position + 1] or taught[position]  # the token after a taught piece is its stop token
        target = ids[position + 1]
        # The history form has a space after a tool's name; what the model should write there has none.
        target = newline if target == spaced else target
        labels.append(target if wanted else IGNORED)
    return Encoded(ids[:-1], labels, turns)
