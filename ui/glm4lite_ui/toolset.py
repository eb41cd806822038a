"""The tools of the page, by where they come from, and which of them ask before they run.

Three may say whether a tool asks: the tool itself (an MCP server's word for its own), the user for all chats
(saved/trust.py: for a tool, or a server), and the user in one chat ("always for this chat"). `--approve every` and
`all` are above them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from glm4lite.base.errors import ToolError
from glm4lite.base.sentences import Sentence
from glm4lite.research.browser import ORIGIN
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite.tools.mcp_config import ServerConfig
from glm4lite.tools.tool import Tool
from glm4lite_ui.saved.trust import Trust, Word
from glm4lite_ui.servers import Server, Servers

_BUILTIN = {tool.function for tool in BUILTIN_TOOLS}
_SERVER = "MCP server "


Kind = Literal["builtin", "research", "python", "server"]
_KINDS: tuple[Kind, ...] = ("builtin", "research", "python", "server")  # in the order in which they are listed


@dataclass(frozen=True)
class Group:
    """Tools of one place. `of` tells a server from another of its name; `server` is there for one of the page."""

    kind: Kind
    origin: str
    tools: Sequence[Tool]
    of: str = ""
    server: Server | None = None


class Toolset:
    """What is offered: the tools of the command line, and those of the servers added on the page."""

    def __init__(
        self,
        fixed: Callable[[], Sequence[Tool]],
        given: Sequence[ServerConfig],
        servers: Servers,
        trust: Trust,
        approval: str,
    ) -> None:
        """`fixed()` are the command line's tools, `given` the servers that some of them are of."""
        self._fixed, self._given = fixed, {config.origin: config.digest for config in given}
        self.servers, self.trust, self.approval = servers, trust, approval

    def groups(self) -> list[Group]:
        """Those that are there: built in, of research, Python's, then the servers."""
        by_place: dict[tuple[Kind, str], list[Tool]] = {}
        for tool in self._fixed():
            by_place.setdefault(_place(tool), []).append(tool)
        for origin in self._given:
            by_place.setdefault(("server", origin), [])
        groups = [Group(kind, origin, tools, self._given.get(origin, "")) for (kind, origin), tools in by_place.items()]
        groups.sort(key=lambda group: _KINDS.index(group.kind))
        for server in self.servers.all():
            groups.append(Group("server", server.config.origin, server.tools, server.config.digest, server))
        return groups

    def tools(self) -> list[Tool]:
        """All of them, each asking as the user said: what is taken back holds from the next call on."""
        return [self._trusted(tool, group) for group in self.groups() for tool in group.tools]

    def permission(self, tool: Tool) -> str:
        """What a chat keeps of a tool that it allows for good: its full name, and which server it is of."""
        of = next((group.of for group in self.groups() if group.kind == "server" and group.origin == tool.origin), "")
        return f"{tool.full_name} #{of[:16]}" if of else tool.full_name

    def say(self, origin: str, name: str, word: Word) -> None:
        """Keeps whether a tool, or with `name` "" all tools of a server, may run unasked. Raises Glm4liteError."""
        for group in self.groups():
            if group.origin != origin:
                continue
            if not name and group.kind == "server":
                return self.trust.say(origin, group.of, word)
            for tool in group.tools:
                if tool.name == name:
                    return self.trust.say(tool.full_name, _of(tool, group), word)
        raise ToolError("there is no tool {name} of {origin} here", name=repr(name), origin=repr(origin))

    def remove(self, name: str) -> None:
        """Ends a server, and forgets it with all that was said of it."""
        self.servers.remove(name)
        self.trust.forget(ServerConfig(name).origin)

    def about(self) -> dict[str, Any]:
        """For the page."""
        return {
            "groups": [self._group(group) for group in self.groups()],
            "approval": self.approval,
            "problem": _said(self.servers.problem),
        }

    def _group(self, group: Group) -> dict[str, Any]:
        server = group.server
        return {
            "kind": group.kind,
            "origin": group.origin,
            "name": group.origin.removeprefix(_SERVER),
            "state": server.state if server else "connected",
            "problem": _said(server.problem if server else ""),
            "about": server.about if server else "",
            "left_out": list(server.left_out) if server else [],
            "added": server is not None,
            "word": self._word_of(group),
            "tools": list(self._tools(group)),
        }

    def _tools(self, group: Group) -> Iterator[dict[str, Any]]:
        for tool in group.tools:
            yield {
                "name": tool.name,
                "full_name": tool.full_name,
                "permission": self.permission(tool),
                "about": tool.description,
                "caution": _said(tool.caution),
                "word": self.trust.word(tool.full_name, _of(tool, group)),
                "asks": self._default(tool, group),
            }

    def _default(self, tool: Tool, group: Group) -> bool:
        """Whether it asks, or may by its arguments, where nothing was said of itself."""
        word = self._word_of(group)
        return word == "ask" if word else tool.needs_approval is not False

    def _word(self, tool: Tool, group: Group) -> Word:
        """The user's: said of the tool, else of its server; none under `--approve every` or `all`."""
        if self.approval != "ask":
            return ""
        return self.trust.word(tool.full_name, _of(tool, group)) or self._word_of(group)

    def _word_of(self, group: Group) -> Word:
        if self.approval != "ask" or group.kind != "server":
            return ""
        return self.trust.word(group.origin, group.of)

    def _trusted(self, tool: Tool, group: Group) -> Tool:
        return replace(tool, needs_approval=partial(self._asks, tool, group))

    def _asks(self, tool: Tool, group: Group, arguments: Mapping[str, Any]) -> bool:
        word = self._word(tool, group)
        return word == "ask" if word else tool.asks(arguments)


def _place(tool: Tool) -> tuple[Kind, str]:
    """The kind of a tool of the command line, and the origin of what it is listed with."""
    if tool.origin.startswith(_SERVER):
        return "server", tool.origin
    if tool.origin == ORIGIN:
        return "research", ORIGIN
    return ("builtin" if tool.function in _BUILTIN else "python"), ""


def _of(tool: Tool, group: Group) -> str:
    """What a word about a tool holds for: its server, or the file of its function."""
    if group.kind == "python":
        with suppress(TypeError):
            return inspect.getsourcefile(tool.function) or ""
    return group.of


def _said(text: str) -> dict[str, Any] | None:
    """As the page takes a sentence."""
    return Sentence.from_json(text).to_json() if text else None
