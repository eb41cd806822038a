"""What clients ask, checked: OpenAI's fields as pydantic models. An ApiError names the field that cannot be used.

Fields that OpenAI knows and this server does not are ignored where they change nothing (`user`, `metadata`) and refused
where the answer would not be what was asked for (`n` = 2, `logit_bias`, another response format).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from glm4lite.errors import one_line
from glm4lite.server.errors import ApiError

R = TypeVar("R", bound="_Request")
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Tokens = Annotated[int, Field(ge=1, le=2**31)]


class StreamOptions(BaseModel):
    """`include_usage`: a last chunk with the counts."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class _Request(BaseModel):
    """What both endpoints know. None is the same as leaving a field out."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @classmethod
    def read(cls: type[R], body: dict[str, Any]) -> R:
        """Raises ApiError for the first field that cannot be used."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False)
            # Where a field may be a text or a list, each has its complaint; the innermost says most.
            field = problems[0]["loc"][0]
            problem = max((one for one in problems if one["loc"][0] == field), key=lambda one: len(one["loc"]))
            param = where(problem["loc"])
            found = "" if problem["type"] == "missing" else f", found {str(problem['input'])[:80]!r}"
            raise ApiError(one_line(f"{param}: {problem['msg']}{found}"), param=param) from None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, most: int) -> dict[str, Any]:
        """Fields of SamplingParams; `most` tokens where no number is asked for."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names}
        seed = None if self.seed is None else self.seed % 2**63
        return given | {"seed": seed, "stop": stop, "max_new_tokens": self.most_tokens or most}

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens


class ResponseFormat(BaseModel):
    """Only text is written."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    functions: None = None
    function_call: None = None

    @field_validator("functions", "function_call", mode="before")
    @classmethod
    def _deprecated(cls, value: object) -> object:
        if value is not None:
            raise ValueError("is not supported; use tools and tool_choice")
        return value

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives per token; None: no log probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs: logprobs must be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """`POST /v1/completions`: one prompt, as text or as token ids."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)] | Annotated[list[int], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one(cls, value: object) -> object:
        if isinstance(value, list) and len(value) > 1 and not isinstance(value[0], int):
            raise ValueError(f"one prompt a request, found {len(value)}")
        return value

    best_of: Annotated[int, Field(ge=1, le=1)] | None = None


def where(path: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") -> messages[0].role; the names pydantic gives to a union's members are left out."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float"):
            text += f".{part}" if text else part
    return text
