"""The tools of MCP servers as `Tool`s: a synchronous front of the asyncio SDK, which runs in one background thread."""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import logging
import re
import threading
from collections import Counter
from collections.abc import Collection, Coroutine, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from glm4lite.base.errors import ToolError
from glm4lite.text.tool_schema import check_schema
from glm4lite.tools.mcp_client.connection import Connection
from glm4lite.tools.mcp_config import ServerConfig, read_config
from glm4lite.tools.running import ToolResult, abandoned
from glm4lite.tools.tool import Tool

if TYPE_CHECKING:
    from mcp.types import Tool as McpTool

logger = logging.getLogger("glm4lite")
_Result = TypeVar("_Result")
_CLOSE_LIMIT_S = 8.0
_MAX_DESCRIPTION = 2_000  # characters


class McpServers:
    """Connections to MCP servers; a context manager that ends them.

        with McpServers.from_files(["mcp.json"]) as servers:
            session = ChatSession.load("nano", tools=servers.tools(), approve=...)

    A tool asks for approval unless its server says that it only reads (`readOnlyHint`). A call ends when nobody waits
    for it any more; a server that ended is started again by the next call.
    """

    def __init__(self, configs: Iterable[ServerConfig], cancel: threading.Event | None = None) -> None:
        """Connects all servers at once, until `cancel` is set; raises ToolError naming one that cannot be connected."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        self._connections = list[Connection]()
        self._offers: list[tuple[Connection, list[McpTool]]] | None = None
        self.left_out = list[str]()  # why some of the tools are not offered, since `tools` was last called
        try:
            self._wait(self._connect(list(configs)), gone=cancel)
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_files(cls, paths: Iterable[str | Path]) -> McpServers:
        """The servers of `mcp.json` files (`mcpServers`)."""
        return cls(read_config(paths))

    def __enter__(self) -> McpServers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tools(self, taken: Collection[str] = ()) -> list[Tool]:
        """Every server's tools, asked for once; one that cannot be offered is left out with a warning.

        A tool keeps its own name, which small models call more surely than a longer one. It is `server__tool` where
        two servers offer that name, or where it is among the `taken` ones, so that no server takes another's calls.
        """
        offers = self._offers = self._offers or [(one, self._wait(one.tools())) for one in self._connections]
        uses = Counter([*taken, *(name for _, tools in offers for name in {tool.name for tool in tools})])
        found, told, self.left_out = dict[str, Tool](), self.left_out, []
        for connection, tools in offers:
            server = connection.config.name
            for offered in tools:
                try:
                    tool = self._tool(connection, offered, f"{server}__" if uses[offered.name] > 1 else "")
                except ToolError as error:
                    self.left_out.append(f"a tool is left out: {error}")
                    continue
                if tool.name in found or tool.name in taken:
                    self.left_out.append(f"a second tool {tool.name!r} is left out")
                else:
                    found[tool.name] = tool
            for reason in self.left_out:
                if reason not in told:
                    logger.warning("MCP server %r: %s", server, reason)
                    told = [*told, reason]
        return list(found.values())

    def close(self) -> None:
        """Ends all servers; within some seconds, whatever they do."""
        atexit.unregister(self.close)
        if self._loop.is_closed():
            return
        closing = asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop)
        try:
            closing.result(_CLOSE_LIMIT_S)
        except TimeoutError:
            logger.warning("an MCP server did not end in time and was killed")
        for connection in self._connections:
            connection.kill()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self._loop.close()

    async def _connect(self, configs: list[ServerConfig]) -> None:
        self._connections += [Connection(config) for config in configs]
        async with asyncio.TaskGroup() as group:
            for connection in self._connections:
                group.create_task(connection.open())

    async def _disconnect(self) -> None:
        await asyncio.gather(*(connection.close() for connection in self._connections), return_exceptions=True)

    def _tool(self, connection: Connection, offered: McpTool, prefix: str) -> Tool:
        name = _safe_name(prefix, offered.name)
        description = " ".join((offered.description or offered.title or "").split())[:_MAX_DESCRIPTION]
        schema = {key: value for key, value in offered.input_schema.items() if key not in ("$schema", "title")}
        check_schema(name, description, schema)
        reads = offered.annotations is not None and offered.annotations.read_only_hint is True

        def call(**arguments: Any) -> ToolResult:
            return self._wait(connection.call(offered.name, arguments), connection)

        return Tool(name, description, schema, call, needs_approval=not reads, origin=connection.config.origin)

    def _wait(
        self,
        work: Coroutine[Any, Any, _Result],
        connection: Connection | None = None,
        gone: threading.Event | None = None,
    ) -> _Result:
        """Runs `work` in the background until `gone` is set: else until nobody waits for its tool call."""
        if not self._thread.is_alive() or self._loop.is_closed():
            work.close()
            raise ToolError("the MCP servers were closed")
        future, gone = asyncio.run_coroutine_threadsafe(work, self._loop), gone or abandoned()
        try:
            while not gone.wait(0) and not future.done() and self._thread.is_alive():
                try:
                    return future.result(0.05)
                except TimeoutError:
                    continue
            if future.done():
                return future.result()
            if not self._thread.is_alive():
                raise ToolError("the MCP servers were closed")
            if connection is not None:  # told before the cancelling, which the SDK may delay
                self._loop.call_soon_threadsafe(connection.doubt)
            raise ToolError("nobody waits for this call any more")
        except ExceptionGroup as group:  # of servers that are connected at once: the first that failed
            raise group.exceptions[0] from group
        finally:
            future.cancel()


def _safe_name(prefix: str, tool: str) -> str:
    """The name in letters that a call can be written with; a long one keeps its start."""
    if not tool or not tool.isprintable():
        raise ToolError(f"the name {tool[:80]!r} cannot be a tool's name")
    name = re.sub(r"[^\w.-]", "_", prefix + tool)
    return name if len(name) <= 64 else f"{name[:55]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
