"""The MCP servers that are added on the page: connected when the page starts, added, started anew, removed.

A server that cannot be connected stays in the list with the reason; one that is being added and cannot be is not kept.
Each has connections of its own (`McpServers`), so that one that hangs holds up no other.
"""

from __future__ import annotations

import logging
import shlex
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from glm4lite.base.errors import Glm4liteError, ToolError, one_line, said_by
from glm4lite.tools.mcp_config import ServerConfig, server_config
from glm4lite.tools.mcp_servers import McpServers
from glm4lite.tools.tool import Tool
from glm4lite.tools.toolbox import with_approval
from glm4lite_ui.saved.servers import ServerFile

logger = logging.getLogger("glm4lite")
State = Literal["connecting", "connected", "failed"]


@dataclass
class Server:
    """One of the list. `problem` is why it is not connected; `left_out` why some of its tools are not offered."""

    config: ServerConfig
    state: State = "connecting"
    problem: str = ""
    tools: tuple[Tool, ...] = ()
    left_out: tuple[str, ...] = ()
    connection: McpServers | None = None
    cancel: threading.Event = field(default_factory=threading.Event)

    @property
    def about(self) -> str:
        """What is started or called. Values of the environment and of headers may be secrets: their names alone."""
        config = self.config
        if config.url:
            return config.url + "".join(f" [{name}]" for name in config.headers)
        return " ".join([*(f"{name}=…" for name in config.env), shlex.join([config.command or "", *config.args])])

    def close(self) -> None:
        """Ends the connection, also one that is being made."""
        self.cancel.set()
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()


class Servers:
    """All of them. The methods may be called in any thread; those that connect wait for it."""

    def __init__(
        self, file: ServerFile, others: Collection[str], taken: Callable[[], Collection[str]], approval: str = "ask"
    ) -> None:
        """`others` are servers that the command line named; `taken()` names tools that are there without these."""
        self.file, self._others, self._taken, self._approval = file, frozenset(others), taken, approval
        self._all, self._lock = dict[str, Server](), threading.RLock()
        self.listeners: list[Callable[[], None]] = []  # called when anything changed
        self.problem = ""  # why the file cannot be read

    def all(self) -> list[Server]:
        """In the order of the file."""
        with self._lock:
            return list(self._all.values())

    def start(self) -> None:
        """Begins to connect the servers of the file, each in a thread of its own."""
        try:
            names = list(self.file.entries())
        except ToolError as error:
            self.problem = said_by(error)
            return
        for name in names:
            with self._lock:
                self._all[name] = Server(ServerConfig(name))
            threading.Thread(target=self._try, args=(name,), name=f"mcp-{name}"[:40], daemon=True).start()

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Connects a server, and keeps it once it told its tools. Raises ToolError; nothing is kept then."""
        name = name.strip()
        config = _config(name, entry)
        with self._lock:
            if name in self._all or name in self._others or name in self.file.entries():
                raise ToolError(
                    "there is an MCP server called {name} already; choose another name, or remove it", name=repr(name)
                )
            server = self._all[name] = Server(config)
        self._changed()
        try:
            self._connect(server)
            self.file.put(name, entry)
        except BaseException:
            self._drop(server)  # ends it, too
            raise

    def remove(self, name: str) -> None:
        """Ends a server and forgets it; ends one that is being added."""
        with self._lock:
            server = self._found(name)
            if name in self.file.entries():
                self.file.remove(name)
        self._drop(server)

    def restart(self, name: str) -> None:
        """Ends a server and connects it anew, as the file describes it now. Raises ToolError."""
        with self._lock:
            old = self._found(name)
            self._all[name] = Server(old.config)  # in its place of the list
            self._name_tools()
        self._changed()
        old.close()
        self._try(name, strict=True)

    def close(self) -> None:
        """Ends all."""
        for server in self.all():
            server.close()

    def _found(self, name: str) -> Server:
        if name not in self._all:
            raise ToolError("there is no MCP server called {name} on this page", name=repr(name))
        return self._all[name]

    def _try(self, name: str, strict: bool = False) -> None:
        """Connects a server of the file; what is wrong stands in the list, and is raised where it is `strict`."""
        server = self._found(name)
        try:
            if name in self._others:
                raise ToolError("--mcp names a server of the same name")
            server.config = _config(name, self.file.entries().get(name))
            self._connect(server)
        except Exception as error:
            if not isinstance(error, Glm4liteError):
                logger.error("the MCP server %r could not be connected", name, exc_info=error)
            server.close()
            server.state, server.problem = "failed", said_by(error)
            self._changed()
            if strict:
                raise

    def _connect(self, server: Server) -> None:
        """Returns when its tools are known and named. Raises ToolError."""
        try:
            server.connection = connection = McpServers([server.config], server.cancel)
            connection.tools()
        except ToolError:
            self._check_stays(server)
            raise
        with self._lock:
            self._check_stays(server)
            server.state = "connected"
            self._name_tools()
        self._changed()

    def _check_stays(self, server: Server) -> None:
        """Raises ToolError where it was removed meanwhile."""
        if server.cancel.is_set() or self._all.get(server.config.name) is not server:
            raise ToolError("the MCP server {name} was removed before it was connected", name=repr(server.config.name))

    def _drop(self, server: Server) -> None:
        with self._lock:
            if self._all.get(server.config.name) is server:
                del self._all[server.config.name]
            self._name_tools()
        self._changed()
        server.close()

    def _name_tools(self) -> None:
        """Gives tools their names in the order of the list, so that none of an earlier server takes another name."""
        taken = set(self._taken())
        for server in self._all.values():
            if server.connection is None or server.state != "connected":
                server.tools = ()
                continue
            tools = server.connection.tools(taken)
            server.tools = tuple(with_approval(tool, self._approval) for tool in tools)
            server.left_out = tuple(server.connection.left_out)
            taken |= {tool.name for tool in tools}

    def _changed(self) -> None:
        for tell in self.listeners:
            tell()


def _config(name: str, entry: object) -> ServerConfig:
    config = server_config("", name, entry)
    if config is None:
        raise ToolError("the server {name} is switched off in the file", name=repr(name))
    return config


def entry_of(fields: Mapping[str, str]) -> dict[str, Any]:
    """What was filled in on the page, as an entry of the file: a command line or a URL, and a line for each variable.

    Raises ToolError that names the field.
    """
    filled = {name: text.strip() for name, text in fields.items() if text.strip()}
    entry: dict[str, Any] = {}
    if command := filled.get("command"):
        try:
            words = shlex.split(command, posix=sys.platform != "win32")
        except ValueError as error:
            raise ToolError("the command line: {why}", why=one_line(error)) from None
        entry = {"command": words[0], "args": words[1:]} if words else {}
    entry |= {key: filled[key] for key in ("cwd", "url") if key in filled}
    for key, mark, example in (("env", "=", "NAME=value"), ("headers", ":", "Name: value")):
        if lines := filled.get(key, "").splitlines():
            entry[key] = dict(_pair(line, mark, example) for line in lines if line.strip())
    if not entry.keys() & {"command", "url"}:
        raise ToolError("an MCP server needs a command line or an address")
    return entry


def _pair(line: str, mark: str, example: str) -> tuple[str, str]:
    name, found, value = line.strip().partition(mark)
    if not found or not name.strip():
        raise ToolError("{line} is not of the form {example}", line=repr(line.strip()[:80]), example=example)
    return name.strip(), value.strip()
