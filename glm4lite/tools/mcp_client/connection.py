"""One MCP server: connected, asked for its tools, called, connected again when it had ended."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from mcp import Client, MCPError
from mcp.types import CONNECTION_CLOSED, CallToolResult, EmbeddedResource, TextContent, TextResourceContents, Tool
from pydantic import ValidationError

from glm4lite.base.errors import ToolError, one_line
from glm4lite.tools.mcp_client.transport import HttpServer, StdioServer
from glm4lite.tools.mcp_config import ServerConfig
from glm4lite.tools.running import ToolResult

logger = logging.getLogger("glm4lite")
START_LIMIT_S = 60.0  # npx and uvx download a server before they start it
CALL_LIMIT_S = 600.0  # the session's own limit is shorter; this ends what nobody waits for
MAX_TOOLS = 200
_MAX_PAGES = 50
_MAX_BLOCKS = 1000  # of one result
_CHECK_LIMIT_S = 2.0  # for an answer to something simple, after a call that got none


class Connection:
    """All methods run in the event loop that `open` ran in. Errors are ToolError and name the server."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._client: Client | None = None
        self._server: StdioServer | HttpServer | None = None
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._doubtful = False

    async def open(self) -> None:
        """Start or call the server, unless it is connected; one that hangs is started again."""
        async with self._opening:
            if self._client is not None:
                if await self._answers():
                    return
                self.kill()
            await self.close()
            self._closing.clear()
            ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._stay(ready))
            try:
                self._client = await asyncio.wait_for(ready, START_LIMIT_S)
            except TimeoutError:
                await self.close()
                raise self._late(START_LIMIT_S) from None
            except asyncio.CancelledError:
                await self.close()
                raise

    def doubt(self) -> None:
        """A call was given up: look whether the server still answers before the next."""
        self._doubtful = True

    async def _answers(self) -> bool:
        if not self._doubtful:
            return True
        self._doubtful = False
        try:
            await self._ask(lambda client: client.list_tools(cache_mode="refresh"), _CHECK_LIMIT_S)
        except ToolError:
            return False
        return True

    async def tools(self) -> list[Tool]:
        """The tools it offers, at most MAX_TOOLS."""
        found, cursor = list[Tool](), None
        for _ in range(_MAX_PAGES):
            page = await self._ask(lambda client, at=cursor: client.list_tools(cursor=at), START_LIMIT_S)
            found += page.tools
            cursor = page.next_cursor
            if cursor is None or len(found) >= MAX_TOOLS:
                break
        if cursor is not None or len(found) > MAX_TOOLS:
            logger.warning("MCP server %r: of its tools only %d are offered", self.config.name, len(found[:MAX_TOOLS]))
        return found[:MAX_TOOLS]

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Run one tool; cancelling this tells the server."""
        await self.open()
        result = await self._ask(lambda client: client.call_tool(name, arguments), CALL_LIMIT_S)
        return ToolResult(("Error: " if result.is_error else "") + _text(result), result.is_error)

    async def close(self) -> None:
        """End the connection and the process."""
        connected, self._client = self._client is not None, None
        self._closing.set()
        if self._task is not None:
            task, self._task = self._task, None
            if not connected:  # it waits for an answer, not for `_closing`
                task.cancel()
            _, unfinished = await asyncio.wait([task], timeout=5.0)
            if unfinished:
                task.cancel()
                self.kill()

    def kill(self) -> None:
        """End the server's process from any thread, also when the event loop does not answer."""
        if self._server is not None:
            self._server.kill()

    async def _stay(self, ready: asyncio.Future[Client]) -> None:
        """Holds the connection: the SDK wants it opened and closed by one task."""
        self._server = HttpServer(self.config) if self.config.url else StdioServer(self.config)
        try:
            async with Client(self._server.transport(), cache=None) as client:
                if not ready.done():
                    ready.set_result(client)
                await self._closing.wait()
        except Exception as error:  # also an ExceptionGroup; after `ready` the calls have told it
            if not ready.done():
                ready.set_exception(self._told(error))

    async def _ask(self, request: Any, limit_s: float) -> Any:
        client = self._client
        if client is None:
            raise self._error("is not connected")
        try:
            async with asyncio.timeout(limit_s):
                return await request(client)
        except TimeoutError as error:
            raise self._late(limit_s) from error
        except Exception as error:
            if _is_closed(error) and self._client is client:
                await self.close()  # the next call starts it anew
            raise self._told(error) from error

    def _told(self, error: BaseException) -> ToolError:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if _is_closed(error) and self._server is not None:
            return self._error(self._server.why())
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            return self._error(one_line(f"sent what MCP does not allow: {where}: {first['msg']}")[:500])
        reason = one_line(error)[:500]
        if isinstance(error, ToolError | MCPError) and reason:
            return self._error(reason)
        return self._error(f"{type(error).__name__}: {reason}")

    def _late(self, limit_s: float) -> ToolError:
        """No answer; what came instead may have been meant as one."""
        unreadable = self._server.unreadable if self._server else ""
        instead = f"; it sent what cannot be read: {unreadable}" if unreadable else ""
        return self._error(f"did not answer within {limit_s:g} s{instead}")

    def _error(self, reason: str) -> ToolError:
        return ToolError(f"the MCP server {self.config.name!r}: {reason}")


def _is_closed(error: BaseException) -> bool:
    return isinstance(error, MCPError) and error.code == CONNECTION_CLOSED


def _text(result: CallToolResult) -> str:
    """What a model can read of a result; other blocks are named."""
    blocks = [_block(block) for block in result.content[:_MAX_BLOCKS]]
    if len(result.content) > _MAX_BLOCKS:
        blocks.append(f"[{len(result.content) - _MAX_BLOCKS} more parts are left out]")
    if not blocks and result.structured_content is not None:
        blocks = [json.dumps(result.structured_content, ensure_ascii=False)]
    return "\n".join(blocks) if blocks else "(no result)"


def _block(block: Any) -> str:
    if isinstance(block, TextContent):
        return block.text
    if isinstance(block, EmbeddedResource) and isinstance(block.resource, TextResourceContents):
        return block.resource.text
    kind = getattr(block, "mime_type", None) or block.type
    return f"[{one_line(kind)[:100]}: not text, so it is left out]"
