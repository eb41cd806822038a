"""Which tools a front end offers: the built-in ones, the user's files, MCP servers, the Python tool."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from glm4lite.errors import ToolError
from glm4lite.tools import BUILTIN_TOOLS, Tool

MAX_SCHEMA_CHARACTERS = 16_000  # about 5k tokens, in every prompt
APPROVALS = ("ask", "every", "all")


class Toolbox:
    """The tools of the command line's options, each name once; closes the MCP servers it started.

    with Toolbox(["my_tools.py", "python"], mcp=["mcp.json"]) as box:
        session = ChatSession.load("nano", tools=box.tools, approve=...)
    """

    def __init__(
        self,
        sources: Sequence[str | Path] = (),
        mcp: Sequence[str | Path] = (),
        builtins: bool = True,
        approval: str = "ask",
    ) -> None:
        """`sources`: Python files, folders of them, or "python"; `mcp`: files with `mcpServers`.

        `approval` is "ask" (each tool's own rule), "every" (every call of every tool) or "all" (nothing is asked).
        Raises ToolError, in one line, for what cannot be read, started or offered.
        """
        if approval not in APPROVALS:
            raise ToolError(f"--approve is {approval[:100]!r}; use {', '.join(APPROVALS)}")
        self._open = ExitStack()
        try:
            found = [*(BUILTIN_TOOLS if builtins else ()), *(tool for one in sources for tool in _of_source(one))]
            if mcp:
                found += self._of_servers(mcp)
            self.tools = tuple(_with_approval(tool, approval) for tool in checked(found))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the MCP servers; their tools fail from then on."""
        self._open.close()

    def _of_servers(self, files: Sequence[str | Path]) -> list[Tool]:
        from glm4lite.mcp_tools import McpServers

        return self._open.enter_context(McpServers.from_files(files)).tools()


def _of_source(source: str | Path) -> list[Tool]:
    if str(source) == "python":
        from glm4lite.python_tool import python

        return [python]
    from glm4lite.tool_files import load_tools

    return load_tools(source)


def _with_approval(tool: Tool, approval: str) -> Tool:
    return tool if approval == "ask" else replace(tool, needs_approval=approval == "every")


def checked(tools: Iterable[Tool]) -> list[Tool]:
    """The tools, if a model can be offered all of them; raises ToolError for two of a name and for a bad schema."""
    found = dict[str, Tool]()
    for tool in tools:
        if tool.name in found and found[tool.name] is not tool:
            raise ToolError(f"two tools are called {tool.name!r}; rename one: @tool(name=…)")
        check_schema(tool)
        found[tool.name] = tool
    return list(found.values())


def check_schema(tool: Tool) -> None:
    """Raises ToolError where the tool's parameters are no JSON schema of an object that a prompt can hold."""
    schema = tool.parameters
    properties = schema.get("properties", {}) if isinstance(schema, dict) else None
    required = schema.get("required", []) if isinstance(schema, dict) else None
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise ToolError(f"tool {tool.name!r}: its schema must be an object with type 'object'")
    if not isinstance(properties, dict) or not all(isinstance(one, dict | bool) for one in properties.values()):
        raise ToolError(f"tool {tool.name!r}: its schema's properties must be an object of schemas")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ToolError(f"tool {tool.name!r}: its schema's required must be a list of names")
    try:
        size = len(json.dumps(tool.schema(), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolError(f"tool {tool.name!r}: its schema is not JSON ({error})") from error
    if size > MAX_SCHEMA_CHARACTERS:
        raise ToolError(f"tool {tool.name!r}: its schema has {size} characters, more than {MAX_SCHEMA_CHARACTERS}")
