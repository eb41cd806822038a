"""Tool: a typed Python function that a model can call.

    @tool
    def weather(city: str, days: int = 1) -> str:
        '''Forecast for a city.

        Args:
            city: Name of the city.
            days: How many days ahead.
        '''

`weather.schema()` is what the template shows the model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

from glm4lite.text.tool_schema import check_name, described, openai_form

NeedsApproval: TypeAlias = bool | Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Tool:
    """A function the model may call. `parameters` is the JSON schema of its arguments.

    Where `needs_approval` is True (or true of the arguments), it runs only when run_tool's `approve` says so.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[..., Any]
    needs_approval: NeedsApproval = False  # before each call, or by its arguments
    origin: str = ""  # where it comes from, for who is asked to approve: "MCP server weather"
    caution: str = ""  # what who is asked must know before: what this system cannot limit

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def full_name(self) -> str:
        """The name with its origin: one that is approved for good is not another server's of the same name."""
        return f"{self.name} ({self.origin})" if self.origin else self.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def asks(self, arguments: Mapping[str, Any]) -> bool:
        """Whether somebody must allow a call with these arguments; a rule that fails asks."""
        if isinstance(self.needs_approval, bool):
            return self.needs_approval
        try:
            return bool(self.needs_approval(arguments))
        except (Exception, SystemExit):
            return True

    def schema(self) -> dict[str, Any]:
        """OpenAI's form, in the key order GLM-4 was trained on."""
        return openai_form(self.name, self.description, self.parameters)


@overload
def tool(function: Callable[..., Any]) -> Tool: ...
@overload
def tool(
    *, name: str | None = None, description: str | None = None, needs_approval: NeedsApproval = False
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    description: str | None = None,
    needs_approval: NeedsApproval = False,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a Tool of a function with typed parameters; usable as `@tool` and as `@tool(name=…, needs_approval=True)`.

    The description is the docstring's first paragraph; a parameter's is its pydantic `Field(description=…)`, else its
    entry under "Args:". Raises ToolError when a parameter has no type or one that JSON cannot carry.
    """

    def declare(function: Callable[..., Any]) -> Tool:
        return Tool(*described(function, name, description), function, needs_approval)

    return declare if function is None else declare(function)
