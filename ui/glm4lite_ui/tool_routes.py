"""What the page asks about tools: which there are, which ask, and the MCP servers that are added on it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from pydantic import BaseModel

from glm4lite_ui.here import from_elsewhere, refuse_from_elsewhere
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.trust import Word
from glm4lite_ui.servers import entry_of
from glm4lite_ui.windows import Windows


class Said(BaseModel):
    """The user's word about a tool, or with "" about all of a server."""

    origin: str
    tool: str
    word: Word


class Tools:
    """The routes. Servers are changed, and tools allowed, from this machine only (here.py)."""

    def __init__(self, runtime: Runtime, windows: Windows) -> None:
        self.runtime, self.windows = runtime, windows
        runtime.toolset.servers.listeners.append(self._changed)

    def add(self, router: APIRouter) -> None:
        router.add_api_route("/tools", self.about, methods=["GET"])
        router.add_api_route("/tools/trust", self.trust, methods=["POST"])
        router.add_api_route("/servers", self.add_server, methods=["POST"])
        router.add_api_route("/servers", self.remove_server, methods=["DELETE"])
        router.add_api_route("/servers/restart", self.restart_server, methods=["POST"])

    def about(self, request: Request) -> dict[str, Any]:
        """All groups, and why this window may change none; then without command lines, which may hold secrets."""
        refused = "" if self.runtime.servers_from_elsewhere else from_elsewhere(request)
        takes = self.runtime.engine.chat_template().takes_tools
        about = self.runtime.toolset.about()
        for group in about["groups"] if refused else ():
            group["about"] = ""
        return {**about, "takes_tools": takes, "refused": refused}

    def trust(self, request: Request, said: Said) -> None:
        """Whether a tool, or all of a server, may run unasked. That one asks may be said from anywhere."""
        if said.word != "ask":
            self._check(request)
        self.runtime.toolset.say(said.origin, said.tool, said.word)
        self._changed()

    def add_server(
        self, request: Request, name: Annotated[str, Body()], fields: Annotated[dict[str, str], Body()]
    ) -> list[str]:
        """Waits until the server has told its tools; their names."""
        self._check(request)
        servers = self.runtime.toolset.servers
        servers.add(name, entry_of(fields))
        return [tool.name for server in servers.all() if server.config.name == name.strip() for tool in server.tools]

    def remove_server(self, request: Request, name: str) -> None:
        self._check(request)
        self.runtime.toolset.remove(name)

    def restart_server(self, request: Request, name: Annotated[str, Body(embed=True)]) -> None:
        self._check(request)
        self.runtime.toolset.servers.restart(name)

    def _check(self, request: Request) -> None:
        if not self.runtime.servers_from_elsewhere:
            refuse_from_elsewhere(request)

    def _changed(self) -> None:
        self.windows.tell({"type": "tools"})
