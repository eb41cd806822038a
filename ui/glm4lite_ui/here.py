"""Who asks: the user of this machine, or somebody else.

An MCP server is a program that runs with the user's rights, and may be called with the user's secrets; a tool that is
allowed for good runs unasked. So servers are added, started and removed, and tools allowed, only by the page as it is
open on this machine, for this user: what else reaches the port (another user of the machine, a proxy or a tunnel for
other machines, a tool that the model may call) is refused.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from starlette.requests import Request

from glm4lite.base.errors import Glm4liteError
from glm4lite.server.guard import is_loopback

# What proxies and tunnels say of whom they ask for.
_FORWARDED = ("forwarded", "via", "x-real-ip", "cf-connecting-ip")
_ESTABLISHED = "01"


def from_elsewhere(request: Request) -> str:
    """Why this was not asked by this machine's user, in a few words; "" where it was, as far as that can be told."""
    client, server = request.client, request.scope.get("server")
    if client is None or server is None or not is_loopback(client.host):
        return "another machine asks"
    if any(name in _FORWARDED or name.startswith("x-forwarded-") for name in request.headers):
        return "a proxy asks"
    if sys.platform != "win32":
        users = _users(client.port, server[1])
        if users is not None and (not users or users - {os.getuid(), 0}):
            return "another user of this machine asks"
    return ""


def refuse_from_elsewhere(request: Request) -> None:
    """For what starts or ends programs, or lets them run unasked. Raises Glm4liteError.

    A browser says of what a page posts where the page is from, and the Guard has compared that; a program that says
    nothing (a tool that fetches what a model names) is none.
    """
    reason = from_elsewhere(request) or ("" if "origin" in request.headers else "it is no page that asks")
    if reason:
        raise Glm4liteError(
            "MCP servers, and what may run unasked, are changed on this machine only ({reason}); "
            "glm4lite ui --servers-from-elsewhere lets everyone do so who reaches the page",
            reason=reason,
        )


def _users(client: int, server: int) -> set[int] | None:
    """Whose connection it is from the client's port to the server's, both here; None where the system does not tell.

    One whose owner let go of it has no user, and none of the established is that.
    """
    found, told = set[int](), False
    for name in ("tcp", "tcp6"):  # a program may reach 127.0.0.1 through a socket of IPv6
        try:
            lines = Path("/proc/net", name).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        told = True
        for fields in map(str.split, lines):
            ports = tuple(int(address.rpartition(":")[2], 16) for address in fields[1:3])
            if ports == (client, server) and fields[3] == _ESTABLISHED:
                found.add(int(fields[7]))
    return found if told else None
