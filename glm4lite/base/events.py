"""The one stream every front end draws: the terminal, `--json`, the HTTP API and the web page.

`to_json()` gives the line of `glm4lite chat --json`: an object whose "type" names the event. The first line tells the
version of these forms (`FORMAT_VERSION`); docs/events.schema.json is their JSON schema.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeAlias

FORMAT_VERSION = 1
"""Goes up when a line changes or loses a field, or a field its meaning; new fields and new types do not count."""


class _Event:
    """What all events share: their fields, under the name of their type."""

    type: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """This event as a JSON object, `type` first."""
        return {"type": self.type, **asdict(self)}  # type: ignore[call-overload]  # every subclass is a dataclass


@dataclass(frozen=True)
class Start(_Event):
    """The first line of `--json`; no part of an answer."""

    version: int = FORMAT_VERSION
    type: ClassVar[str] = "start"


@dataclass(frozen=True)
class TextDelta(_Event):
    """A piece of the answer."""

    text: str
    type: ClassVar[str] = "text"


@dataclass(frozen=True)
class ThinkingDelta(_Event):
    """A piece of the thought before the answer (between `<think>` and `</think>`)."""

    text: str
    type: ClassVar[str] = "thinking"


@dataclass(frozen=True)
class ToolCallDelta(_Event):
    """A call is being written; `arguments` is what comes next of their text, first nothing.

    It is made where ToolCallStarted names its id. Where the answer ends before it is whole, or stops, it is none: what
    was written of it comes as TextDelta.
    """

    id: str
    name: str
    arguments: str
    type: ClassVar[str] = "tool_call_delta"


@dataclass(frozen=True)
class ToolCallStarted(_Event):
    """The model called a declared tool; it runs now, or first the user is asked (`needs_approval`)."""

    id: str
    name: str
    arguments: dict[str, Any]
    needs_approval: bool = False
    type: ClassVar[str] = "tool_call"


@dataclass(frozen=True)
class ToolCallFinished(_Event):
    """The observation the model gets for the call `id`; `error` says that the tool failed."""

    id: str
    name: str
    content: str
    error: bool
    type: ClassVar[str] = "tool_result"


@dataclass(frozen=True)
class Progress(_Event):
    """`done` of `total` `unit`s ("bytes", "tensors", "tokens") of a long step ("download", "load", "prefill")."""

    stage: str
    done: int
    total: int
    unit: str
    type: ClassVar[str] = "progress"


@dataclass(frozen=True)
class Done(_Event):
    """The last event of a turn. `prefilled_tokens` counts the prompt tokens not found in the kept prefix."""

    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    tokens_per_s: float
    prefilled_tokens: int
    type: ClassVar[str] = "done"


Event: TypeAlias = TextDelta | ThinkingDelta | ToolCallDelta | ToolCallStarted | ToolCallFinished | Progress | Done
