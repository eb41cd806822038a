"""Guard: who may talk to the server at all. Every request passes it, those for a page mounted on the app too.

A server on loopback is reachable from every web page the user has open. Three things keep those out:

* the Host must be this machine: a name that a foreign DNS server points at 127.0.0.1 is not (DNS rebinding);
* the Origin, which browsers send with what a page posts, must be the server's own, and `Sec-Fetch-Site` must not say
  that another site asks (that covers what comes without an Origin: images, event streams);
* with an API key, only who knows it gets in: as a bearer token, or as the password a browser asks for.

With a key the Host may be anything, since the machine is then reached under names it does not know; a page that
rebinds its name does not know the key.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import secrets
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from glm4lite.server.errors import ApiError

OPEN_PATHS = ("/health",)  # for those who watch over the server; says nothing but that it runs


class Guard:
    """ASGI middleware. `api_key` None: no key is asked for, and only loopback names are answered."""

    def __init__(self, app: ASGIApp, api_key: str | None = None, hosts: Iterable[str] = ()) -> None:
        self.app, self._key = app, api_key.encode() if api_key else None
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        refusal = self._refusal(Headers(scope=scope), scope["path"])
        if refusal is None:
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await refusal.response()(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        name = _name(host)
        if not name or (self._key is None and not self._ours(name)):
            return ApiError(f"Host {host[:100]!r} is not this server", 403, code="host_not_allowed")
        if any(not _same(origin, host) for origin in origins):
            return ApiError("requests from web pages of other origins are refused", 403, code="origin_not_allowed")
        if _from_elsewhere(headers):
            return ApiError("requests from other sites are refused", 403, code="origin_not_allowed")
        if self._key is not None and path not in OPEN_PATHS and not self._knows_key(headers):
            ask = {} if path.startswith("/v1/") else {"WWW-Authenticate": 'Basic realm="glm4lite", charset="UTF-8"'}
            return ApiError("a valid API key is needed", 401, code="invalid_api_key", headers=ask)
        return None

    def _ours(self, name: str) -> bool:
        return name in self._hosts or is_loopback(name)

    def _knows_key(self, headers: Headers) -> bool:
        given = [_credential(value) for value in headers.getlist("authorization")]
        # Compared in constant time, whatever is given.
        return len(given) == 1 and secrets.compare_digest(given[0], self._key or b"")


def is_loopback(name: str) -> bool:
    """Whether a host's name or address is this machine's own, without asking a name server."""
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    """The name of a Host header, without its port; empty for one that is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
        return parts.hostname or "" if not (parts.username or parts.path or parts.query or parts.fragment) else ""
    except ValueError:
        return ""


def _from_elsewhere(headers: Headers) -> bool:
    """Whether another site's page asks. A link there may open a page here; nothing else gets through."""
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return False
    return headers.get("sec-fetch-mode") != "navigate" or headers.get("sec-fetch-dest") != "document"


def _same(origin: str, host: str) -> bool:
    scheme, mark, rest = origin.lower().partition("://")
    return bool(mark) and scheme in ("http", "https") and rest == host


def _credential(authorization: str) -> bytes:
    """The key of `Bearer KEY`, or the password of `Basic …`; empty for anything else."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip().encode("latin-1", "replace")
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
