"""How one call of a tool is run, and what the model observes of it.

`run_tool` never raises: a bad argument, an exception, an unserializable result or a timeout becomes an observation that
starts with "Error: ", and a result that is too long is cut with a word.
"""

import asyncio
import contextvars
import inspect
import json
import threading
import time
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import ValidationError

from glm4lite.base.errors import ToolError, one_line
from glm4lite.text.messages import ToolCall
from glm4lite.text.tool_schema import arguments_model
from glm4lite.tools.tool import Tool

MAX_RESULT_CHARACTERS = 16_000  # about 5k tokens; more would crowd the conversation out of the context
_MAX_REASON = 500  # characters of another's words about what went wrong
_MOMENT_S = 0.2  # for a tool to end when it is abandoned, so that nothing of it meets the next call


@dataclass(frozen=True)
class ToolResult:
    """What a call gave: the text the model observes, and whether the tool failed. A function may return one itself."""

    content: str
    error: bool


Approve: TypeAlias = Callable[[ToolCall, Tool], bool]
_abandoned: contextvars.ContextVar[threading.Event] = contextvars.ContextVar("_abandoned")


def abandoned() -> threading.Event:
    """For a tool (and for `approve`): set when nobody waits for the running call any more, so that it can end."""
    return _abandoned.get(threading.Event())


def nobody_to_ask(call: ToolCall, tool: Tool) -> bool:
    """The `approve` where there is no user: refuses, and says why."""
    raise ToolError(f"{call.name} needs the user's approval, and there is nobody to ask; it was not run")


def run_tool(
    tool: Tool | None,
    call: ToolCall,
    timeout_s: float = 30.0,
    cancel: threading.Event | None = None,
    approve: Approve = nobody_to_ask,
    fits: Callable[[str], int] = len,
) -> ToolResult:
    """Run one call in a thread of its own and wait at most `timeout_s` seconds, or until `cancel`; never raises.

    `tool` is None when the model named a tool that was not declared. Where the tool needs approval, `approve(call,
    tool)` is asked in that same thread once the arguments are known to be right; it may take its time, which does not
    count, should return when `abandoned()` is set, and may raise ToolError with a reason the model is to see.
    A call that is too slow is abandoned: Python cannot stop a thread, so the daemon thread goes on until its function
    returns and its result is dropped; `abandoned()` lets a function end earlier. (No SIGALRM: main thread only.)
    `fits` says how many characters of a text there is room for; a longer result, or one of more than
    MAX_RESULT_CHARACTERS, is cut, and says so.
    """
    if tool is None:
        return ToolResult(f"Error: there is no tool named {call.name}", error=True)
    run = _Run(tool, call, approve, fits)
    thread = threading.Thread(target=run, name=f"tool-{tool.name}", daemon=True)
    thread.start()
    while thread.is_alive() and not (cancel and cancel.is_set()) and run.seconds() < timeout_s:
        thread.join(max(0.0, min(timeout_s - run.seconds(), 0.1)))
    if run.result:
        return run.result
    run.over.set()
    thread.join(_MOMENT_S)
    return _failure(
        f"{tool.name} was stopped by the user"
        if cancel and cancel.is_set()
        else f"{tool.name} did not finish within {timeout_s:g} s"
    )


class _Run:
    """What the thread of one call does: check the arguments, ask, run."""

    def __init__(self, tool: Tool, call: ToolCall, approve: Approve, fits: Callable[[str], int]) -> None:
        self.tool, self.call, self.approve, self.fits = tool, call, approve, fits
        self.over = threading.Event()
        self.result: ToolResult | None = None
        self._started: float | None = time.monotonic()  # None while the user is asked

    def seconds(self) -> float:
        """How long the tool has been running."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    def __call__(self) -> None:
        _abandoned.set(self.over)
        try:
            self.result = self._work()
        except ToolError as error:
            self.result = self._observed(f"Error: {one_line(error, MAX_RESULT_CHARACTERS)}", error=True)
        except BaseException as error:  # also SystemExit: whatever a tool does, the conversation goes on
            said = one_line(error, MAX_RESULT_CHARACTERS)
            self.result = self._observed(one_line(f"Error: {type(error).__name__}: {said}"), error=True)

    def _work(self) -> ToolResult:
        values = _values(self.tool, self.call.arguments)
        keywords = _keywords(self.tool, values)
        if self.tool.asks(values):
            self._started = None
            allowed = self.approve(self.call, self.tool)
            self._started = time.monotonic()
            if not allowed or self.over.is_set():
                return _failure(f"the user did not allow this call of {self.tool.name}; it was not run")
        result = self.tool.function(**keywords)
        result = asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result
        if isinstance(result, ToolResult):  # a tool that tells its failure in several lines
            return self._observed(result.content, bool(result.error))
        return self._observed(result, error=False)

    def _observed(self, result: object, error: bool) -> ToolResult:
        """What the model gets to see of a result, with a word where that is not all."""
        text, size = _result_text(result)
        kept = min(len(text), self.fits(text))
        if kept == size:
            return ToolResult(text, error)
        missing = "the rest" if size is None else f"{size - kept} more characters"
        return ToolResult(f"{text[:kept]}\n[cut: {missing}]", error)


def _failure(reason: str) -> ToolResult:
    return ToolResult(f"Error: {reason}", error=True)


def _values(tool: Tool, arguments: str) -> dict[str, Any]:
    """The call's arguments, whose names are those of the schema the model saw."""
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise ToolError(f"the arguments of {tool.name} are not JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ToolError(f"the arguments of {tool.name} must be a JSON object, found {type(values).__name__}")
    _check_names(tool, values)
    return values


def _keywords(tool: Tool, values: dict[str, Any]) -> dict[str, Any]:
    """The arguments as the function's types want them."""
    try:
        checked = arguments_model(tool.function).model_validate(values)
    except ValidationError as error:
        raise ToolError(f"{tool.name}: {_first_problem(error)}") from error
    keywords = {field.alias or key: getattr(checked, key) for key, field in type(checked).model_fields.items()}
    return keywords | (checked.model_extra or {})


async def _awaited(result: typing.Awaitable[Any]) -> Any:
    return await result


def _check_names(tool: Tool, values: Mapping[str, Any]) -> None:
    """The schema the model saw decides which arguments exist, also for a function with **kwargs."""
    properties = tool.parameters.get("properties", {})
    extra = [name for name in values if name not in properties]
    if extra and tool.parameters.get("additionalProperties") in (None, False):
        known = ", ".join(properties) or "none"
        raise ToolError(f"{tool.name} has no argument {extra[0]!r} (its arguments: {known})")
    missing = [name for name in tool.parameters.get("required", ()) if name not in values]
    if missing:
        raise ToolError(f"{tool.name} needs the argument {missing[0]!r}")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    return one_line(f"{where}: {problem['msg']}, found {str(problem['input'])[:80]!r}")


def _result_text(result: object) -> tuple[str, int | None]:
    """The beginning of a result, text as it is and everything else as JSON, and its whole length (None: not counted).

    Lone surrogates, which UTF-8 cannot carry, become "?".
    """
    try:
        if isinstance(result, str):
            whole = str.__str__(result)
            found: tuple[str, int | None] = whole[:MAX_RESULT_CHARACTERS], len(whole)
        else:
            found = _beginning_of_json(result)
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"the tool's result ({type(result).__name__}) is not JSON: {one_line(error, _MAX_REASON)}"
        raise ToolError(reason) from error
    text, size = found
    return text.encode("utf-8", "replace").decode("utf-8"), size


def _beginning_of_json(result: object) -> tuple[str, int | None]:
    pieces, size = list[str](), 0
    for piece in json.JSONEncoder(ensure_ascii=False, allow_nan=False).iterencode(result):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_RESULT_CHARACTERS:  # the rest is not even written
            return "".join(pieces)[:MAX_RESULT_CHARACTERS], None
    return "".join(pieces), size
