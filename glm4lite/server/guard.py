"""Guard: who may talk to the server at all. Every request passes it, those for a page mounted on the app too.

A server on loopback is reachable from every web page the user has open. Three things keep those out:

* the Host must be this machine: a name that a foreign DNS server points at 127.0.0.1 is not (DNS rebinding);
* the Origin, which browsers send with what a page posts, must be the server's own, and `Sec-Fetch-Site` must not say
  that another site asks (that covers what comes without an Origin: images, event streams);
* with an API key, only who knows it gets in: as a bearer token, as `X-Api-Key`, or as the password a browser asks for.

With a key the Host may be anything, since the machine is then reached under names it does not know; a page that
rebinds its name does not know the key. Other Hosts and Origins are let in where they were named exactly.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
import secrets
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from glm4lite.base.errors import ConfigError
from glm4lite.server.errors import ApiError

_HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/*?#@,]+")
OPEN_PATHS = ("/health",)  # for those who watch over the server; says nothing but that it runs


@dataclass(frozen=True)
class Access:
    """Who is let in. `api_key` None: no key is asked for, and only loopback names are answered.

    hosts: names besides localhost and loopback addresses under which it answers without a key. origins: of web pages
    that may ask, such as "https://chat.example" or "app://obsidian.md". Both are compared as they stand: a pattern
    would let in more than somebody thought of. Raises ConfigError for what can be neither.
    """

    api_key: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for host in self.hosts:
            if not host or _name(host.lower()) != host.lower():
                raise ConfigError(f"allowed host {host[:100]!r}: give a name alone, such as host.docker.internal")
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin.lower()):
                example = "give one origin as browsers send it, such as https://chat.example or app://obsidian.md"
                raise ConfigError(f"allowed origin {origin[:100]!r}: {example}")


class Guard:
    """ASGI middleware that lets in whom `access` names."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self._key = app, access.api_key.encode() if access.api_key else None
        self._hosts = {host.lower() for host in access.hosts}
        self._origins = {origin.lower() for origin in access.origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        refusal = self._refusal(Headers(scope=scope), scope["path"])
        if refusal is None:
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await refusal.response(scope["path"])(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        name = _name(host)
        if not name or (self._key is None and not self._ours(name)):
            return ApiError(f"Host {host[:100]!r} is not this server", 403, code="host_not_allowed")
        named = bool(origins) and all(origin.lower() in self._origins for origin in origins)
        if not named and any(not _same(origin, host) for origin in origins):
            return ApiError("requests from web pages of other origins are refused", 403, code="origin_not_allowed")
        if not named and _from_elsewhere(headers):
            return ApiError("requests from other sites are refused", 403, code="origin_not_allowed")
        if self._key is not None and path not in OPEN_PATHS and not self._knows_key(headers):
            ask = {} if path.startswith("/v1/") else {"WWW-Authenticate": 'Basic realm="glm4lite", charset="UTF-8"'}
            return ApiError("a valid API key is needed", 401, code="invalid_api_key", headers=ask)
        return None

    def _ours(self, name: str) -> bool:
        return name in self._hosts or is_loopback(name)

    def _knows_key(self, headers: Headers) -> bool:
        given = [_credential(value) for value in headers.getlist("authorization")]
        given += [value.strip().encode("latin-1", "replace") for value in headers.getlist("x-api-key")]
        # Compared in constant time, whatever is given. Clients of Anthropic's API may send both.
        right = [secrets.compare_digest(one, self._key or b"") for one in given]
        return bool(right) and all(right)


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
    found = _HOST.fullmatch(host)
    return found[1] if found else ""


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
