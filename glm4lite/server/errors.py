"""ApiError: what a client did wrong, in OpenAI's shape, or in Anthropic's at Anthropic's addresses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from glm4lite.base.errors import CheckpointError, Glm4liteError, NoModel

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error"}
# https://docs.anthropic.com/en/api/errors
_ANTHROPIC_TYPES = {
    **{401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"},
    **{429: "rate_limit_error", 500: "api_error", 503: "overloaded_error"},
}


class ApiError(Exception):
    """A refusal: `param` is the field of the request that it is about, `code` a word that programs look for."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's object."""
        kind = _TYPES.get(self.status, "server_error" if self.status > 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """Anthropic's object."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, path: str = "") -> Response:
        """The object as an answer with its status, in the form of the API that `path` is an address of."""
        body = self.anthropic_body() if is_anthropic(path) else self.body()
        return json_response(body, self.status, self.headers)


def is_anthropic(path: str) -> bool:
    """Whether Anthropic's API has this address."""
    return path.removeprefix("/v1").rstrip("/") in ("/messages", "/messages/count_tokens")


def told(error: BaseException) -> ApiError:
    """What a client is told of any error: its own faults and the model's in words, a bug by its kind alone."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NoModel):
        return ApiError(str(error), 503, code="model_not_loaded")
    if isinstance(error, Glm4liteError):  # a file of the model may fail at this text: its tokenizer, say
        return ApiError(str(error), 500 if isinstance(error, CheckpointError) else 400)
    return ApiError(f"the request failed: {type(error).__name__}; the log says more", 500)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON that any client can read: halves of surrogate pairs, which a request can carry, become "?"."""
    return Response(encode(body), status, dict(headers or {}), "application/json")


def encode(body: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
