"""How messages travel: over a child's stdin and stdout, or by HTTP. What a server may send is bounded in both.

The SDK's own stdio transport collects a line however long it is and parses messages however many come; a server that
floods would take memory and processor from the model. So the process is started here, and the SDK does the rest.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias

import anyio
import anyio.abc
import httpx2
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from mcp.types import jsonrpc_message_adapter

from glm4lite.base.errors import ToolError, one_line
from glm4lite.base.processes import apart, end_tree
from glm4lite.tools.mcp_config import ServerConfig

MAX_BYTES = 16 << 20  # of one line, or of one HTTP answer; an image in base64 fits
MAX_UNASKED = 10_000  # messages in a row without one of ours: progress and log notices come in hundreds
_GRACE_S = 1.0  # for a server to end when its stdin is closed, before it is killed
_LAST_WORDS = 2_000  # bytes of stderr kept for an error message

_Inbox: TypeAlias = MemoryObjectReceiveStream[SessionMessage | Exception]
_Streams: TypeAlias = tuple[_Inbox, MemoryObjectSendStream[SessionMessage]]


class StdioServer:
    """A server's process. `why` says, for the user, why it stopped talking."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._unasked = 0
        self._stderr = deque[bytes](maxlen=4)
        self._flood = ""
        self.unreadable = ""  # why the last line that was no message was none
        self._ended = False
        self._process: anyio.abc.Process | None = None

    @asynccontextmanager
    async def transport(self) -> AsyncIterator[_Streams]:
        """What the SDK's Client connects to. Raises ToolError when the process cannot be started."""
        process = self._process = await self._start()
        inbox, to_client = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        from_client, outbox = anyio.create_memory_object_stream[SessionMessage](0)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read, process, inbox)
            tasks.start_soon(self._write, process, outbox)
            tasks.start_soon(self._listen_to_errors, process)
            try:
                yield to_client, from_client
            finally:
                with anyio.CancelScope(shield=True):
                    await self._end(process)
                tasks.cancel_scope.cancel()

    async def _start(self) -> anyio.abc.Process:
        config = self._config
        environment = get_default_environment() | dict(config.env)
        command = shutil.which(config.command or "", path=environment.get("PATH"))
        if command is None:
            raise ToolError(f"there is no program {config.command!r}")
        try:
            return await anyio.open_process(
                [command, *config.args], env=environment, cwd=config.cwd, stderr=subprocess.PIPE, **apart()
            )
        except (OSError, ValueError) as error:
            raise ToolError(f"{command} cannot be started ({one_line(error)})") from error

    async def _read(
        self, process: anyio.abc.Process, inbox: MemoryObjectSendStream[SessionMessage | Exception]
    ) -> None:
        if process.stdout is None:
            return
        lines = BufferedByteReceiveStream(process.stdout)
        with suppress(anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError, anyio.ClosedResourceError):
            async with inbox:
                while True:
                    try:
                        line = await lines.receive_until(b"\n", MAX_BYTES)
                    except anyio.DelimiterNotFound:
                        self._flood = f"sent a line of more than {MAX_BYTES >> 20} MiB"
                        return
                    self._unasked += 1
                    if self._unasked > MAX_UNASKED:
                        self._flood = f"sent more than {MAX_UNASKED} messages nobody asked for"
                        return
                    if line.strip():
                        message = _message(line)
                        if isinstance(message, Exception):
                            self.unreadable = one_line(message)[:200]
                        await inbox.send(message)

    async def _write(self, process: anyio.abc.Process, outbox: MemoryObjectReceiveStream[SessionMessage]) -> None:
        if process.stdin is None:
            return
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
            async with outbox:
                async for message in outbox:
                    self._unasked = 0
                    text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                    await process.stdin.send(text.encode() + b"\n")

    async def _listen_to_errors(self, process: anyio.abc.Process) -> None:
        if process.stderr is None:
            return
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for chunk in process.stderr:
                self._stderr.append(chunk[-_LAST_WORDS:])

    async def _end(self, process: anyio.abc.Process) -> None:
        if process.stdin is not None:
            with suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
                await process.stdin.aclose()
        if not self._flood:
            with anyio.move_on_after(_GRACE_S):
                while process.returncode is None:
                    await anyio.sleep(0.01)
        self.kill()
        self._ended = True
        with anyio.move_on_after(_GRACE_S):
            await process.wait()

    def kill(self) -> None:
        """Ends the process and its children at once; may be called from any thread, also when nothing else answers."""
        if self._process is None or self._ended:
            return
        end_tree(self._process.pid)

    def why(self) -> str:
        """Flood, exit status and last words, as far as known."""
        if self._flood:
            return self._flood
        status = self._process.returncode if self._process else None
        words = b"".join(self._stderr)[-_LAST_WORDS:].decode("utf-8", "replace").strip().splitlines()
        last = f": {one_line(words[-1])[:300]}" if words else ""
        return (f"ended with status {status}" if status is not None else "closed its output") + last


class HttpServer:
    """A server that is called by streamable HTTP."""

    unreadable = ""  # the SDK tells of it itself

    def __init__(self, config: ServerConfig) -> None:
        self._config = config

    @asynccontextmanager
    async def transport(self) -> AsyncIterator[tuple[Any, Any]]:
        """What the SDK's Client connects to."""
        async with (
            httpx2.AsyncClient(
                headers=dict(self._config.headers),
                timeout=httpx2.Timeout(30.0, read=300.0),
                event_hooks={"response": [_bound]},
            ) as client,
            streamable_http_client(self._config.url or "", http_client=client) as streams,
        ):
            yield streams

    def kill(self) -> None:
        """Nothing runs here."""

    def why(self) -> str:
        """Nothing is known beyond the error itself."""
        return "closed the connection"


def _message(line: bytes) -> SessionMessage | Exception:
    """One line as a message; what is none is the session's to tell."""
    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError as error:
        return error


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > MAX_BYTES:
                raise httpx2.ReadError(f"sent more than {MAX_BYTES >> 20} MiB in one answer")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _bound(response: httpx2.Response) -> None:
    if isinstance(response.stream, httpx2.AsyncByteStream):
        response.stream = _Bounded(response.stream)
