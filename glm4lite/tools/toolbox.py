"""Which tools a front end offers: the built-in ones, the user's files, MCP servers, the Python tool."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from glm4lite.base.errors import ToolError
from glm4lite.text.tool_schema import check_schema
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite.tools.mcp_config import ServerConfig, read_config
from glm4lite.tools.tool import Tool

logger = logging.getLogger("glm4lite")
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
        more: Sequence[Tool] = (),
    ) -> None:
        """`sources`: Python files, folders of them, or "python"; `mcp`: files with `mcpServers`; `more`: made already.

        `approval` is "ask" (each tool's own rule), "every" (every call of every tool) or "all" (nothing is asked).
        Raises ToolError, in one line, for what cannot be read, started or offered.
        """
        if approval not in APPROVALS:
            raise ToolError(f"--approve is {approval[:100]!r}; use {', '.join(APPROVALS)}")
        if sys.flags.optimize > 1:
            logger.warning("python -OO removed the docstrings that describe tools: the model sees their names alone")
        self._open = ExitStack()
        self.servers: tuple[ServerConfig, ...] = ()
        try:
            own = (*(BUILTIN_TOOLS if builtins else ()), *more)
            found = [*own, *(tool for one in sources for tool in _of_source(one))]
            if mcp:
                found += self._of_servers(mcp, {tool.name for tool in found})
            self.tools = tuple(with_approval(tool, approval) for tool in checked(found))
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

    def _of_servers(self, files: Sequence[str | Path], taken: Collection[str]) -> list[Tool]:
        from glm4lite.tools.mcp_servers import McpServers

        self.servers = tuple(read_config(files))
        return self._open.enter_context(McpServers(self.servers)).tools(taken)


def _of_source(source: str | Path) -> list[Tool]:
    if str(source) == "python":
        from glm4lite.tools.python import python_tool

        return [python_tool()]
    from glm4lite.tools.tool_files import load_tools

    return load_tools(source)


def with_approval(tool: Tool, approval: str) -> Tool:
    """The tool under `--approve`: its own rule, every call or none."""
    return tool if approval == "ask" else replace(tool, needs_approval=approval == "every")


def checked(tools: Iterable[Tool]) -> list[Tool]:
    """The tools, if a model can be offered all of them; raises ToolError for two of a name and for a bad schema."""
    found = dict[str, Tool]()
    for tool in tools:
        if tool.name in found and found[tool.name] is not tool:
            raise ToolError(f"two tools are called {tool.name!r}; rename one: @tool(name=…)")
        check_schema(tool.name, tool.description, tool.parameters)
        found[tool.name] = tool
    return list(found.values())
