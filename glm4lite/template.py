"""A conversation as the prompt a checkpoint was trained on, by the checkpoint's own chat template.

Messages have OpenAI's form; this file alone knows GLM's: a call is an assistant message whose `metadata` is the tool's
name and whose content is the arguments, a result has the role `observation`.

Template text is tokenized with special tokens, the user's without. Before rendering, each special string inside a
message or a tool is replaced by a random marker; afterwards the special strings that are there were written by the
template, and the markers between them turn back into plain text. (A template that cuts words out of the middle of a
message could still join a special string from what is left; none of the known ones does.)
"""

import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from glm4lite.errors import CheckpointError, TemplateError
from glm4lite.messages import Message, ToolCall
from glm4lite.templating.process import TemplateProcess
from glm4lite.tokenizer import Tokenizer, token_text
from glm4lite.weights.files import read_json

TIME_LIMIT_S = 5.0  # a real template takes a millisecond; this much, that a busy machine fails none
_MAX_SOURCE = 1_000_000  # characters; real templates have a few thousand
_ROLES = ("system", "user", "assistant", "tool")
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class SchemaSource(Protocol):
    """Anything with a tool schema: `glm4lite.tools.Tool`."""

    def schema(self) -> dict[str, Any]:
        """OpenAI's `{"type": "function", "function": {…}}`."""
        ...


class ChatTemplate:
    """The chat template of a checkpoint.

    sources: template name -> Jinja source; "default", and where the checkpoint has it "tool_use", taken when tools are
    declared. origin: the file it came from, for messages. special_names: bos_token and the like, for templates that
    write them. Raises TemplateError when a source is not valid Jinja.
    """

    def __init__(
        self,
        sources: str | Mapping[str, str],
        origin: str = "chat template",
        special_names: Mapping[str, str] | None = None,
        time_limit_s: float = TIME_LIMIT_S,
    ) -> None:
        self.sources = {"default": sources} if isinstance(sources, str) else dict(sources)
        self._special_names = dict(special_names or {})
        for source in self.sources.values():
            if len(source) > _MAX_SOURCE:
                raise TemplateError(f"{origin}: a chat template of {len(source)} characters is not read")
        self._process = TemplateProcess(self.sources, origin, time_limit_s)

    @classmethod
    def from_folder(cls, path: str | Path) -> "ChatTemplate | None":
        """The template of chat_template.jinja, else of tokenizer_config.json; None where there is none (a base model).

        Raises TemplateError for a template that cannot be read or is not valid Jinja.
        """
        folder = Path(path)
        config = read_json(folder / "tokenizer_config.json", CheckpointError, optional=True)
        names = {name: text for name in _SPECIAL_NAMES if (text := token_text(config.get(name)))}
        file = folder / "chat_template.jinja"
        if file.is_file():
            try:
                return cls(file.read_text(encoding="utf-8-sig"), str(file), names)
            except (OSError, UnicodeDecodeError) as error:
                raise TemplateError(f"{file}: cannot be read as UTF-8 text ({error})") from error
        origin = str(folder / "tokenizer_config.json")
        found = config.get("chat_template")
        return None if found is None else cls(_named_sources(found, origin), f"{origin}: chat_template", names)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[SchemaSource | Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt as text, the same that Hugging Face's apply_chat_template gives; raises TemplateError.

        For reading only: tokenized as a whole, a `<|user|>` that a user typed would become a special token.
        """
        return self._render(messages, tools, add_generation_prompt, _Markers(()))

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[SchemaSource | Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The prompt as ids: special tokens only where the template wrote them. Raises TemplateError."""
        markers = _Markers(tokenizer.special)
        rendered = self._render(messages, tools, add_generation_prompt, markers)
        ids: list[int] = []
        for piece, token_id in tokenizer.split_special(rendered):
            ids.extend(tokenizer.encode(markers.restore(piece)) if token_id is None else [token_id])
        return ids

    @staticmethod
    def starts_thinking(rendered: str) -> bool:
        """True if generation from this prompt starts inside `<think>`, as Z1's does."""
        return rendered.rstrip().endswith("<think>")

    @functools.cached_property
    def thinks(self) -> bool:
        """True if this template's generation prompt opens `<think>`."""
        return self.starts_thinking(self.render([Message("user", "Hi")]))

    @property
    def takes_tools(self) -> bool:
        """False for a template that says nothing of declared tools: the model would not know them."""
        return any(re.search(r"\btools\b", source) for source in self.sources.values())

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[SchemaSource | Mapping[str, Any]],
        add_generation_prompt: bool,
        markers: "_Markers",
    ) -> str:
        schemas = [dict(tool) if isinstance(tool, Mapping) else tool.schema() for tool in tools]
        name = "tool_use" if schemas and "tool_use" in self.sources else "default"
        if name not in self.sources:
            name = next(iter(self.sources))
        variables = {
            "messages": markers.mark(_template_messages(self.sources[name], messages, schemas)),
            "tools": markers.mark(schemas) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_names,
        }
        return self._process.render(name, variables)


class _Markers:
    """Stand-ins for special strings in text that the template did not write: letters and digits, so that no filter
    (tojson's escapes, strip, split) changes them, and random, so that no text can contain them by intent."""

    def __init__(self, specials: Sequence[str] | Mapping[str, int]) -> None:
        self._specials = sorted(specials, key=len, reverse=True)
        self._nonce = f"q{secrets.token_hex(8)}q"
        self._find = re.compile("|".join(map(re.escape, self._specials))) if self._specials else None
        self._restore = re.compile(self._nonce + r"(\d+)z")

    def mark(self, value: Any) -> Any:
        """`value` (JSON data) with the special strings in it replaced, in keys too."""
        if self._find is None:
            return value
        if isinstance(value, str):
            return self._find.sub(lambda found: f"{self._nonce}{self._specials.index(found.group())}z", value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list | tuple) else value

    def restore(self, text: str) -> str:
        """Text with the special strings back."""
        return self._restore.sub(lambda found: self._specials[int(found.group(1))], text)


def _template_messages(
    source: str, messages: Sequence[Message], schemas: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The messages in the form this template reads: GLM's, or OpenAI's as most other families do."""
    glm = "metadata" in source or "observation" in source
    turns = [turn for message in messages for turn in (_glm_turns(source, message) if glm else [_openai_turn(message)])]
    # glm-4-9b-chat and its like read the tools from a system message.
    if schemas and re.search(r"\w\s*\[\s*['\"]tools['\"]\s*\]|\b(?:item|message|msg)\.tools\b", source):
        if not turns or turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": ""})
        turns[0] = {**turns[0], "tools": list(schemas)}
    return turns


def _glm_turns(source: str, message: Message) -> list[dict[str, Any]]:
    """One message per call, with the tool's name as metadata; a tool's result is an observation."""
    if message.role not in _ROLES:  # some templates write it into a special token
        raise TemplateError(f"message: role must be one of {', '.join(_ROLES)}; found {message.role!r}")
    if message.role == "tool":
        return [{"role": "observation", "content": message.content}]
    turns: list[dict[str, Any]] = [{"role": message.role, "content": message.content}]
    if message.tool_calls and not message.content:
        turns = []
    # Rumination was trained on calls in the text, as its own list of tools in the template shows.
    as_json = '[{"name": "search"' in source
    for call in message.tool_calls:
        if as_json:
            text = json.dumps({"name": call.name, "arguments": _parsed(call)}, ensure_ascii=False)
            turns.append({"role": "assistant", "content": text})
        else:
            turns.append({"role": "assistant", "metadata": call.name, "content": call.arguments})
    return turns


def _openai_turn(message: Message) -> dict[str, Any]:
    """OpenAI's form, with the arguments as an object, which is what Hugging Face's templates expect."""
    turn = message.to_dict()
    for written, call in zip(turn.get("tool_calls", ()), message.tool_calls, strict=True):
        written["function"]["arguments"] = _parsed(call)
    return turn


def _parsed(call: ToolCall) -> Any:
    try:
        return json.loads(call.arguments)
    except (ValueError, RecursionError):
        return call.arguments


def _named_sources(found: object, origin: str) -> dict[str, str]:
    """tokenizer_config.json holds one template or a list of `{"name", "template"}`."""
    if isinstance(found, str):
        return {"default": found}
    entries = found if isinstance(found, list) else []
    sources = {
        entry["name"]: entry["template"]
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    }
    if not sources or len(sources) != len(entries):
        raise TemplateError(f"{origin}: chat_template must be text or a list of objects with name and template")
    return sources
