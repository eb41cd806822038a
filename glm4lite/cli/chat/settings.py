"""What `/set` changes and `/show` tells: sampling, the system prompt, tools, the thought, how an answer is drawn."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from glm4lite.base.errors import ConfigError, Glm4liteError, SamplingError, TemplateError, shown

if TYPE_CHECKING:
    from glm4lite.chat.session import ChatSession
    from glm4lite.cli.terminal import Renderer
    from glm4lite.tools.tool import Tool

DEFAULT = "default"

# name -> (type, help) of the fields of SamplingParams
SAMPLING: dict[str, tuple[Callable[[str], Any], str]] = {
    "temperature": (float, "0 is greedy, 1 as the model learned"),
    "top_k": (int, "draw among so many; 0: all"),
    "top_p": (float, "draw among the likeliest that together have this probability"),
    "min_p": (float, "leave out what is less likely than this part of the likeliest"),
    "repetition_penalty": (float, "above 1: repeat less, the prompt included"),
    "frequency_penalty": (float, "-2 to 2: repeat less, the more often a token came"),
    "presence_penalty": (float, "-2 to 2: say new things"),
    "seed": (int, "the same seed gives the same text"),
    "max_new_tokens": (int, "longest answer, in tokens, its thought included"),
    "thinking_budget": (int, "longest thought, in tokens; 0: none"),
    "stop": (lambda text: (text,), "a text that ends the answer"),
}
SWITCHES = {
    "tools": "whether the model is offered its tools",
    "think": "whether the model thinks before it answers, or how long, in tokens",
    "markdown": "whether Markdown in an answer is drawn",
}
HELP = {name: text for name, (_, text) in SAMPLING.items()} | {"system": "the system prompt"} | SWITCHES


@dataclass
class Settings:
    """What is in force in a conversation. `sampling` holds what was given; all else is the checkpoint's own.

    `start` is what the command line gave, to which "default" goes back.
    """

    session: ChatSession
    renderer: Renderer
    tools: tuple[Tool, ...]
    sampling: dict[str, Any]
    start: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.start = {**self.sampling, "system": self.session.system}

    def set(self, name: str, value: str) -> None:
        """Raises Glm4liteError for a name that is none and a value it cannot have; then nothing has changed."""
        name = name.replace("-", "_")
        if name in SAMPLING:
            self._sample(name, self.start.get(name) if value == DEFAULT else _parsed(name, value))
        elif name == "system":
            self.session.instruct(self.start["system"] if value == DEFAULT else _without_quotes(value) or None)
        elif name == "think" and value.isdecimal():
            self._sample("thinking_budget", _parsed("thinking_budget", value))
        elif name in SWITCHES:
            self._switch(name, _on(name, value))
        else:
            near = [known for known in HELP if known.startswith(name)] or difflib.get_close_matches(name, HELP, 1, 0.6)
            raise ConfigError(f"there is no setting {name[:100]!r}{f'; is it {near[0]}?' if near else ''}")

    def restore(self, values: dict[str, Any]) -> None:
        """The sampling that was saved with a conversation; Glm4liteError for what it cannot be."""
        for name, value in values.items():
            texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
            if name not in SAMPLING or (name == "stop" and not texts) or (name != "stop" and not _is_number(value)):
                raise ConfigError(f"the saved settings hold {shown(name)}: {shown(value)}, which cannot be used")
        known = {name: tuple(value) if name == "stop" else value for name, value in values.items()}
        self._apply({name: value for name, value in self.sampling.items() if name not in known} | known)

    def renew(self) -> None:
        """When a model came: what was not given is its checkpoint's."""
        self._apply(self.sampling)

    def lines(self) -> Iterator[tuple[str, str]]:
        """(name, what is in force), for people."""
        session = self.session
        for name in SAMPLING:
            value = getattr(session.params, name)
            text = " ".join(map(repr, value)) if isinstance(value, tuple) else str(value)
            own = "" if self.sampling.get(name) is not None else " (the checkpoint's)"
            yield name, _UNSET.get(name, "none") if value in (None, ()) else text + ("" if name in _OURS else own)
        yield "system", session.system or "none"
        for name in SWITCHES:
            yield name, "on" if self._is_on(name) else "off"

    def told(self, name: str) -> str:
        """One of them, as `lines` tells it."""
        return f"{name}: {dict(self.lines())[name]}"

    def words(self, name: str) -> list[str]:
        """What may stand behind a setting's name, for completion."""
        return ["on", "off"] if name in SWITCHES else [DEFAULT] if name in HELP else []

    def _sample(self, name: str, value: Any) -> None:
        if name == "thinking_budget":
            self.session.template.check_thinking(value)
        self._apply({**self.sampling, name: value})

    def _apply(self, sampling: dict[str, Any]) -> None:
        """A thinking budget waits for a model that thinks."""
        used = sampling
        if sampling.get("thinking_budget") and not self.session.template.can_think:
            used = sampling | {"thinking_budget": None}
            self.renderer.remark("(this model does not think: the thinking budget changes nothing)")
        self.session.params = self.session.engine.params(**used)
        self.sampling = sampling

    def _is_on(self, name: str) -> bool:
        if name == "tools":
            return bool(self.session.tools)
        if name == "think":
            return self.session.template.can_think and self.session.params.thinking_budget != 0
        return self.renderer.markdown

    def _switch(self, name: str, on: bool) -> None:
        if name == "tools":
            if on and not self.tools:
                raise ConfigError("there are no tools: glm4lite was started with --no-tools")
            self.session.tools = {tool.name: tool for tool in self.tools} if on else {}
        elif name == "think":
            self._think(on)
        else:
            self.renderer.markdown = on

    def _think(self, on: bool) -> None:
        """A thinking budget of 0 and back to what it was at the start, in a word."""
        if on and not self.session.template.can_think:
            raise TemplateError("this model does not think: its chat template knows no thoughts")
        self._sample("thinking_budget", (self.start.get("thinking_budget") or None) if on else 0)


_OURS = ("seed", "max_new_tokens", "thinking_budget", "stop", "frequency_penalty", "presence_penalty")
"""No checkpoint has them."""
_UNSET = {"max_new_tokens": "what the context leaves", "thinking_budget": "no limit"}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parsed(name: str, value: str) -> Any:
    try:
        return SAMPLING[name][0](_without_quotes(value))
    except ValueError:
        raise SamplingError(f"{name} is {value[:40]!r}; give a number, or {DEFAULT}") from None


def _without_quotes(value: str) -> str:
    """A text may stand in quotes, so that it can begin or end with a space, or be empty."""
    quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1] if quoted else value


def _on(name: str, value: str) -> bool:
    if value not in ("on", "off", DEFAULT):
        raise Glm4liteError(f"{name} is {value[:40]!r}; give on or off")
    return value != "off"
