"""What clients ask, checked: OpenAI's fields as pydantic models. An ApiError names the field that cannot be used.

What other fields may hold is in unsupported.py; names that nobody here knows are ignored, and the answer says which.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from glm4lite.base.errors import one_line, shown
from glm4lite.server.errors import ApiError
from glm4lite.server.thinking import (
    BUDGETS,
    Budget,
    Effort,
    TemplateVariables,
    Thinking,
    WantedThinking,
    wanted_thinking,
)
from glm4lite.server.unsupported import ignored, refuse_unsupported

R = TypeVar("R", bound="_Request")
M = TypeVar("M", bound=BaseModel)
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Tokens = Annotated[int, Field(ge=1, le=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Answers = Annotated[int, Field(ge=1, le=128)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]  # the first that is none is enough to say
MOST_MESSAGES = 16_384  # each is a token or more, and a template takes its time for each
MOST_PROMPTS = 2048  # of one request
MOST_ANSWERS = 4096  # to all its prompts; each is computed as if it had been asked alone


class StreamOptions(BaseModel):
    """`include_usage`: a last chunk with the counts."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class _Request(BaseModel):
    """What both endpoints know. None is the same as leaving a field out."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # -1 is off, as 0 is
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256, fail_fast=True)] | None = None
    min_tokens: TokenId | None = None
    ignore_eos: bool | None = None
    n: Answers | None = None
    response_format: dict[str, Any] | None = None
    _ignored: list[str] = PrivateAttr(default_factory=list)

    @classmethod
    def read(cls: type[R], body: dict[str, Any]) -> R:
        """Raises ApiError for the first field that cannot be used."""
        refuse_unsupported(body, cls.model_fields.keys())
        asked = checked(cls, body)
        asked._ignored = ignored(body, cls.model_fields.keys())
        return asked

    @property
    def ignored(self) -> list[str]:
        """Names in the body that mean nothing here."""
        return self._ignored

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _by_ids(cls, value: object) -> object:
        if value == []:  # as some clients write nothing
            return None
        wrong = next((key for key in value if not _is_id(key)), None) if isinstance(value, dict) else None
        if wrong is not None:
            raise ValueError(f"its keys are token ids, found {shown(wrong)}")
        return value

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> dict[str, Any]:
        """Fields of SamplingParams, None where nothing is asked for."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty")
        given = {name: getattr(self, name) for name in (*names, "presence_penalty", "ignore_eos")}
        if self.top_k == -1:
            given["top_k"] = 0
        most, least = self.most_tokens, self.min_tokens
        if most is not None and least is not None and least > most:
            raise ApiError(f"min_tokens: {least} are more than the {most} that may come", param="min_tokens")
        bias = {int(token): value for token, value in (self.logit_bias or {}).items() if value}
        given |= {"logit_bias": bias, "stop_token_ids": tuple(self.stop_token_ids or ()), "min_new_tokens": least}
        seed = None if self.seed is None else self.seed % 2**63
        return given | {"seed": seed, "stop": stop, "max_new_tokens": most}

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[Objects, Field(min_length=1)]
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    thinking: Thinking | None = None
    thinking_budget: Budget | None = None
    thinking_token_budget: Budget | None = None
    thinking_budget_tokens: Budget | None = None
    reasoning_budget_tokens: Budget | None = None
    chat_template_kwargs: TemplateVariables | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _bounded(cls, value: object) -> object:
        if isinstance(value, list) and len(value) > MOST_MESSAGES:
            raise ValueError(f"at most {MOST_MESSAGES} can be read, found {len(value)}")
        return value

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_thinking(self) -> WantedThinking | None:
        """What is asked of the thought, None where nothing is; ApiError for fields that contradict each other."""
        thinking, variables = self.thinking or Thinking(), self.chat_template_kwargs or TemplateVariables()
        return wanted_thinking(
            switches={
                "enable_thinking": self.enable_thinking,
                "thinking": thinking.enabled,
                "chat_template_kwargs.enable_thinking": variables.enable_thinking,
            },
            budgets={
                **{name: getattr(self, name) for name in BUDGETS},
                "thinking.budget_tokens": thinking.budget_tokens,
                "chat_template_kwargs.thinking_budget": variables.thinking_budget,
            },
            effort=self.reasoning_effort,
        )

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives per token; None: no log probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs: logprobs must be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """`POST /v1/completions`: prompts, each as text or as token ids."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[int], Field(min_length=1, fail_fast=True)]
        | Annotated[list[list[int]], Field(min_length=1, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Answers | None = None

    @property
    def most_tokens(self) -> int | None:
        """OpenAI's default, which vLLM has too: a base model does not end by itself. None at all, beside an echo, are
        one that nobody sees.
        """
        if self.max_tokens == 0 and not self.echo:
            raise ApiError("max_tokens: 0 gives nothing but with echo", param="max_tokens")
        return 16 if self.max_tokens is None else max(self.max_tokens, 1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each of them."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)  # type: ignore[list-item,arg-type]

    @property
    def candidates(self) -> int:
        """How many answers are computed for each prompt, of which `n` are given. Raises ApiError."""
        wanted, best_of = self.n or 1, self.best_of or self.n or 1
        if best_of < wanted:
            raise ApiError(f"best_of: {best_of} are fewer than n, which is {wanted}", param="best_of")
        if best_of > wanted and self.stream:
            raise ApiError(
                "best_of: which answers are the best is known at their end; leave stream out", param="best_of"
            )
        if len(self.prompts) * best_of > MOST_ANSWERS:
            raise ApiError(f"prompt: at most {MOST_ANSWERS} answers can be asked for at once", param="prompt")
        return best_of

    @field_validator("prompt", mode="before")
    @classmethod
    def _bounded(cls, value: object) -> object:
        if isinstance(value, list) and len(value) > MOST_PROMPTS and not isinstance(value[0], int):
            raise ValueError(f"at most {MOST_PROMPTS} can be answered at once, found {len(value)}")
        return value

    @field_validator("logprobs", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return None if value is False else value


def _is_id(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 10


def checked(form: type[M], body: dict[str, Any]) -> M:
    """A body as that model. Raises ApiError for the first field that cannot be used."""
    try:
        return form.model_validate(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
    # Where a field may be a text or a list, each has its complaint; the innermost says most.
    field = problems[0]["loc"][0]
    problem = max((one for one in problems if one["loc"][0] == field), key=lambda one: len(one["loc"]))
    param = where(problem["loc"])
    if problem["type"] == "extra_forbidden":
        said = f"{param}: {shown(problem['input'])} is not supported"
        raise ApiError(one_line(said), param=param, code="unsupported_value")
    found = "" if problem["type"] in ("missing", "value_error") else f", found {shown(problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    raise ApiError(one_line(f"{param}: {message}{found}"), param=param)


def where(path: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") -> messages[0].role; the names pydantic gives to a union's members are left out."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float"):
            text += f".{part}" if text else part
    return text
