"""What every request meets before an endpoint: the guard, the pages that may ask, and an id for its answer."""

from __future__ import annotations

import re
import secrets

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm4lite.server.errors import is_anthropic
from glm4lite.server.guard import Access, Guard

_SANE_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
EXPOSED = ["X-Request-Id", "X-Ignored-Fields", "Retry-After"]


def with_manners(app: Starlette, access: Access) -> None:
    """Puts them in front of the whole app, whatever is mounted on it later."""
    app.add_middleware(Guard, access=access)
    if access.origins:  # outside the guard, so that a page reads a refusal too, and asks its leave without the key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[*access.origins, *map(str.lower, access.origins)],
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
            allow_private_network=True,
        )
    app.add_middleware(_Numbered)


class _Numbered:
    """Gives each answer an id, the client's own where it sent one: `X-Request-Id`, for Anthropic's API `request-id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def numbering(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if is_anthropic(scope["path"]):
                    headers["request-id"] = request_id
            await send(message)

        await self._app(scope, receive, numbering)
