"""A conversation as the prompt a checkpoint was trained on, by the checkpoint's own chat template.

Messages have OpenAI's form; this file alone knows GLM's: a call is an assistant message whose `metadata` is the tool's
name and whose content is the arguments, a result has the role `observation`.

Template text is tokenized with special tokens, the user's without. Templates also look for words in what they are
given (Z1's cuts each message behind its last `</think>`), which in a user's, a file's or a tool's text are text. Before
rendering, each character that a special string or such a word begins with is replaced by one that occurs nowhere else;
afterwards the special strings that are there were written by the template, and the stand-ins turn back. Nothing else
changes, not even a length, and whatever a template cuts out, no control word can be joined from what is left. Of the
assistant's own answers only special strings are replaced, as templates drop the thoughts of earlier turns.
"""

import functools
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from glm4lite.base.errors import CheckpointError, TemplateError
from glm4lite.base.files import decoded, open_file, read_json
from glm4lite.base.magic import START_BYTES, dangling, mistaken_for
from glm4lite.text.messages import Message, ToolCall
from glm4lite.text.templating.process import TemplateProcess
from glm4lite.text.tokenization.codec import Codec, token_text

END_OF_THOUGHT = "\n</think>\n\n"
"""Between a thought and its answer, as GLM-Z1 writes it."""

TIME_LIMIT_S = 5.0  # a real template takes a millisecond; this much, that a busy machine fails none
_MAX_SOURCE = 1_000_000  # characters; real templates have a few thousand
_ROLES = ("system", "user", "assistant", "tool")
_PRIVATE, _PRIVATE_SIZE = 0xF0000, 0xFFFE  # Unicode's private use plane: no filter changes its characters
_RESEARCH = '[{"name": "search"'  # how the list of tools begins in Rumination's template
_PIECE = 64 << 10  # characters looked through at once; nobody else runs meanwhile
OWN_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt"})
"""What every prompt gives a template to read by itself."""
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Begun:
    """The beginning of an answer that was cut, as `TextDelta`s and `ThinkingDelta`s gave it."""

    text: str = ""
    thinking: str = ""

    def written(self) -> str:
        """As the model wrote it behind the `<think>` that its prompt ended with."""
        if not self.text:
            return self.thinking
        return f"{self.thinking.rstrip()}{END_OF_THOUGHT}{self.text}"

    @classmethod
    def of(cls, kept: object, messages: Sequence[Message]) -> "Begun | None":
        """From `asdict` of one, kept with a conversation; None where its messages do not end with it."""
        fields = kept if isinstance(kept, Mapping) else {}
        text, thinking = fields.get("text"), fields.get("thinking")
        if not isinstance(text, str) or not isinstance(thinking, str) or not messages or not (text or thinking):
            return None
        fits = messages[-1] == Message("assistant", text) if text else messages[-1].role in ("user", "tool")
        return cls(text, thinking) if fits else None


class SchemaSource(Protocol):
    """Anything with a tool schema: `glm4lite.tools.tool.Tool`."""

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
        self._origin = origin
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
        config = read_json(Path(path) / "tokenizer_config.json", CheckpointError, optional=True)
        sources, origin = read_sources(Path(path), config)
        names = {name: text for name in _SPECIAL_NAMES if (text := token_text(config.get(name)))}
        return cls(sources, origin, names) if sources else None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[SchemaSource | Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt as text, the same that Hugging Face's apply_chat_template gives; raises TemplateError.

        For reading only: tokenized as a whole, a `<|user|>` that a user typed would become a special token.
        """
        rendered, restore = self._render(messages, tools, add_generation_prompt, ())
        return restore(rendered)

    def encode(
        self,
        tokenizer: Codec,
        messages: Sequence[Message],
        tools: Sequence[SchemaSource | Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        context: int | None = None,
        begun: Begun | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt as ids: special tokens only where the template wrote them. Raises TemplateError.

        variables: what else the template reads (see `reads`), such as enable_thinking.
        begun: the prompt ends inside an answer, behind this beginning of it (Transformers' continue_final_message).
        context: raises ContextLengthError for a text that does not fit, most often without tokenizing it.
        """
        if context is not None:  # what is in every prompt, before the memory and time for several copies
            kept = ("user", "tool") if self.takes_tools else ("user",)
            said = (message.content.strip() for message in messages if message.role in kept)
            tokenizer.check_fits("".join(said), context)
        rendered, restore = self._render(messages, tools, add_generation_prompt, tokenizer.special, begun, variables)
        if context is not None:
            tokenizer.check_fits(restore(rendered), context)
        return tokenizer.ids_between(rendered, restore, context)

    def render_given(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        names: Mapping[str, str],
        specials: Collection[str] | None = None,
    ) -> tuple[str, Callable[[str], str]]:
        """The default template over messages in the form it reads itself, and what turns stand-ins back.

        variables: what else the template reads; names: bos_token and the like, where the variables have others.

        specials: where there are any, stand-ins hide them (and what the template looks for) in all that is given, as in
        `encode`. None: nothing is hidden. Raises TemplateError.
        """
        given = {**names, **variables, "messages": messages}
        if specials is None:
            return self._process.render("default", given), str
        stand_ins = _StandIns(specials, self._process.openers["default"], json.dumps(given, ensure_ascii=False))
        hidden = {name: stand_ins.in_schema(value) for name, value in variables.items()}
        turns = [{stand_ins.in_schema(key): _hidden(turn, key, stand_ins) for key in turn} for turn in messages]
        return self._process.render("default", {**names, **hidden, "messages": turns}), stand_ins.restore

    @staticmethod
    def starts_thinking(rendered: str) -> bool:
        """True if generation from this prompt starts inside `<think>`, as Z1's does."""
        return rendered.rstrip().endswith("<think>")

    @property
    def can_think(self) -> bool:
        """False for a template that knows no thoughts: its model was not trained to think before it answers."""
        return any("<think>" in source or "</think>" in source for source in self.sources.values())

    def check_thinking(self, budget: int | None) -> None:
        """Raises TemplateError where a model that does not think is allowed to."""
        if budget and not self.can_think:
            raise TemplateError("this model does not think, so it has no use for a thinking budget")

    def reads(self, name: str) -> bool:
        """False for a variable that no template of these names."""
        return any(re.search(rf"\b{re.escape(name)}\b", source) for source in self.sources.values())

    def check_variables(self, variables: Iterable[str]) -> None:
        """Raises TemplateError for what would change nothing, or is given by other means."""
        for name in variables:
            if name in OWN_VARIABLES:
                raise TemplateError(f"{name[:80]} is no variable for the chat template: it has its own place")
            if not self.reads(name):
                raise TemplateError(f"this model's chat template does not read {name[:80]!r}")

    @property
    def takes_tools(self) -> bool:
        """False for a template that says nothing of declared tools: the model would not know them."""
        return self.reads("tools")

    @property
    def lists_research_tools(self) -> bool:
        """True for GLM-Z1-Rumination's, which itself lists search, click, open and finish, and takes no others."""
        return any(_RESEARCH in source for source in self.sources.values())

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[SchemaSource | Mapping[str, Any]],
        add_generation_prompt: bool,
        specials: Collection[str],
        begun: Begun | None = None,
        others: Mapping[str, Any] | None = None,
    ) -> tuple[str, Callable[[str], str]]:
        """The prompt with stand-ins, and what turns them back."""
        schemas = [dict(tool) if isinstance(tool, Mapping) else tool.schema() for tool in tools]
        name = "tool_use" if schemas and "tool_use" in self.sources else "default"
        if name not in self.sources:
            name = next(iter(self.sources))
        specials = {*specials, *self._special_names.values()}
        try:
            begins = [begun.text, begun.thinking] if begun else []
            given = json.dumps(
                [[message.to_dict() for message in messages], schemas, self.sources[name], begins, others],
                ensure_ascii=False,
            )
            place = _unused(given, 1)[0] if begun else ""  # stands where the answer would
            stand_ins = _StandIns(specials, self._process.openers[name], given + place)
            del given  # as long as all messages
            schemas = stand_ins.in_schema(schemas)
            variables = {
                "documents": None,
                **{key: stand_ins.in_schema(value) for key, value in (others or {}).items()},
                "messages": _template_messages(self.sources[name], messages, schemas, stand_ins),
                "tools": schemas or None,
                "add_generation_prompt": add_generation_prompt,
                **self._special_names,
            }
            rendered = self._process.render(name, variables)
            if begun is not None:
                said = stand_ins.in_answer(begun.text), stand_ins.in_answer(begun.thinking)
                rendered = self._begin(rendered, Begun(*said), name, variables, place)
            return rendered, stand_ins.restore
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"{self._origin}: messages and tools must be JSON data ({error})") from error

    def _begin(self, prompt: str, begun: Begun, name: str, variables: dict[str, Any], place: str) -> str:
        """The prompt with the beginning of the answer behind it; `place` is a text that nothing else holds.

        Templates drop the thoughts of earlier answers, so one with a thought is written behind the prompt, as the model
        wrote it. What else stands between the two (GLM's line end) is seen where the template writes an answer itself.
        """
        if self.starts_thinking(prompt):
            return f"{prompt}\n{begun.written()}"
        if begun.thinking:
            return f"{prompt}\n<think>\n{begun.written()}"
        turns = [*variables["messages"], {"role": "assistant", "content": place}]
        answered = variables | {"messages": turns, "add_generation_prompt": False}
        head, found, _ = self._process.render(name, answered).rpartition(place)
        if not found or place in head:
            raise TemplateError(f"{self._origin}: this template has no place where an answer could go on")
        return head + begun.text


class _StandIns:
    """Characters that take the place of those which control words begin with, in text the template did not write.

    specials: the special strings; openers: first characters of what the template looks for; given: all text there is,
    of which no stand-in may be a part.
    """

    def __init__(self, specials: Collection[str], openers: str, given: str) -> None:
        first = {text.lstrip()[:1] for text in specials} - {""}
        every = sorted((first | set(openers)) - {'"', "\\"})  # tojson must find these two, to escape them
        self._stand_ins = dict(zip(every, _unused(given, len(every)), strict=True))
        self._tags = {letter: self._stand_ins[letter] for letter in every if letter in first | {"<", "["}}
        self._letters = {stand_in: letter for letter, stand_in in self._stand_ins.items()}
        for write in (json.dumps, ascii):  # a template may write a value as Python does
            self._letters |= {write(stand_in)[1:-1]: self._letters[stand_in] for stand_in in self._stand_ins.values()}
        self._specials = {text: _replaced(text, self._stand_ins) for text in sorted(specials, key=len, reverse=True)}

    def in_text(self, value: Any) -> Any:
        """`value` (JSON data) for what users, files and tools say: no control word is left in its strings and keys."""
        return _changed(value, lambda text: _replaced(text, self._stand_ins))

    def in_schema(self, value: Any) -> Any:
        """The same for names and schemas, where templates do look for keys and values: only tags are hidden."""
        return _changed(value, lambda text: _replaced(text, self._tags))

    def in_answer(self, text: str) -> str:
        """The same for what the assistant said: only special strings are hidden."""
        return _replaced(text, self._specials)

    def restore(self, text: str) -> str:
        """Text with the characters back, also where their stand-ins were escaped, as in JSON or a printed list."""
        return _replaced(text, self._letters)


def _replaced(text: str, table: Mapping[str, str]) -> str:
    for found, instead in table.items():  # few; a pass for each is much faster than one through a table
        text = text.replace(found, instead)
    return text


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """JSON data with every string, key or value, changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(item, change) for key, item in value.items()}
    return [_changed(item, change) for item in value] if isinstance(value, list | tuple) else value


def _unused(given: str, count: int) -> list[str]:
    """Private characters that `given` does not hold; at random, so that no text can be made to meet them."""
    used = set[str]()
    for begin in range(0, 0 if given.isascii() else len(given), _PIECE):
        used.update(given[begin : begin + _PIECE])
    start = secrets.randbelow(_PRIVATE_SIZE)
    all_of_them = (chr(_PRIVATE + (start + step) % _PRIVATE_SIZE) for step in range(_PRIVATE_SIZE))
    found = list(islice((letter for letter in all_of_them if letter not in used), count))
    if len(found) < count:
        raise TemplateError("the messages hold every private character of Unicode; leave some out")
    return found


def _template_messages(
    source: str, messages: Sequence[Message], schemas: Sequence[dict[str, Any]], stand_ins: _StandIns
) -> list[dict[str, Any]]:
    """The messages in the form this template reads: GLM's, or OpenAI's as most other families do."""
    glm = "metadata" in source or "observation" in source
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message.role not in _ROLES:  # some templates write it into a special token
            raise TemplateError(f"message: role must be one of {', '.join(_ROLES)}; found {message.role!r}")
        turns += _glm_turns(source, message, stand_ins) if glm else [_openai_turn(message, stand_ins)]
    # glm-4-9b-chat and its like read the tools from a system message.
    if schemas and re.search(r"\w\s*\[\s*['\"]tools['\"]\s*\]|\b(?:item|message|msg)\.tools\b", source):
        if not turns or turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": ""})
        turns[0] = {**turns[0], "tools": list(schemas)}
    return turns


def _hidden(turn: Mapping[str, Any], key: str, stand_ins: _StandIns) -> Any:
    """One value of a message that came in the template's own form."""
    value = turn[key]
    answered = turn.get("role") == "assistant" and not turn.get("metadata")  # with metadata: a call's arguments
    change = functools.partial(_changed, change=stand_ins.in_answer) if answered else stand_ins.in_text
    if key == "content" and isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
        return [
            {stand_ins.in_schema(name): part[name] if name == "type" else change(part[name]) for name in part}
            for part in value
        ]
    if key == "content" or (key in ("reasoning_content", "thinking", "reasoning") and answered):
        return change(value)
    return stand_ins.in_schema(value)


def _content(message: Message, stand_ins: _StandIns) -> Any:
    answered = message.role == "assistant"
    return stand_ins.in_answer(message.content) if answered else stand_ins.in_text(message.content)


def _glm_turns(source: str, message: Message, stand_ins: _StandIns) -> list[dict[str, Any]]:
    """One message per call, with the tool's name as metadata; a tool's result is an observation."""
    content = _content(message, stand_ins)
    if message.role == "tool":
        return [{"role": "observation", "content": content}]
    turns: list[dict[str, Any]] = [{"role": message.role, "content": content}]
    if message.tool_calls and not message.content:
        turns = []
    # Rumination was trained on calls in the text, as its own list of tools in the template shows.
    as_json = _RESEARCH in source
    for call in message.tool_calls:
        if as_json:
            text = json.dumps({"name": call.name, "arguments": _parsed(call)}, ensure_ascii=False)
            turns.append({"role": "assistant", "content": stand_ins.in_text(text)})
        else:
            name, arguments = stand_ins.in_schema(call.name), stand_ins.in_text(call.arguments)
            turns.append({"role": "assistant", "metadata": name, "content": arguments})
    return turns


def _openai_turn(message: Message, stand_ins: _StandIns) -> dict[str, Any]:
    """OpenAI's form, with the arguments as an object, which is what Hugging Face's templates expect."""
    turn = stand_ins.in_schema(message.to_dict()) | {"content": _content(message, stand_ins)}
    for written, call in zip(turn.get("tool_calls", ()), message.tool_calls, strict=True):
        written["function"]["arguments"] = stand_ins.in_text(_parsed(call))
    return turn


def _parsed(call: ToolCall) -> Any:
    try:
        return json.loads(call.arguments)
    except (ValueError, RecursionError):
        return call.arguments


def read_sources(folder: Path | None, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """The templates of a folder by name, none for a base model, and the file they came from.

    config: its tokenizer_config.json, all there is without a folder. Raises TemplateError for what cannot be read.
    """
    origin = str((folder or Path()) / "tokenizer_config.json")
    file = None if folder is None else folder / "chat_template.jinja"
    if file is not None and os.path.lexists(file):
        return {"default": _source(file)}, str(file)
    found = config.get("chat_template")
    return {} if found is None else _named_sources(found, origin), f"{origin}: chat_template"


def _source(file: Path) -> str:
    """A chat_template.jinja. A pointer or a page in its place would be the prompt, whatever is asked."""
    try:
        with open_file(file) as opened:
            data = opened.read(4 * _MAX_SOURCE + 1)
        source = decoded(data)
    except (OSError, UnicodeDecodeError) as error:
        why = f"cannot be read as text ({getattr(error, 'strerror', None) or error})"
        link = dangling(file)
        raise TemplateError(f"{file}: {why}" if link is None else f"{file} is {link}") from error
    what = None if "{" in source else mistaken_for(data[:START_BYTES])
    if what is not None:
        raise TemplateError(f"{file} is {what}")
    return source


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
