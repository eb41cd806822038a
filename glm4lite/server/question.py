"""Question: a checked request as the model gets it: token ids, sampling, and what to look for in the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from glm4lite.base.errors import ContextLengthError, Glm4liteError, SamplingError, TemplateError
from glm4lite.engine.constraint import Constraint
from glm4lite.engine.engine import Engine
from glm4lite.engine.sampling import SamplingParams
from glm4lite.server.body import Structure
from glm4lite.server.declared import check_name, declared_tools, forced_names
from glm4lite.server.errors import ApiError
from glm4lite.server.requests import ChatRequest, CompletionRequest
from glm4lite.server.structured import held, tool_forms, wanted_schema
from glm4lite.server.unsupported import refuse_in_message
from glm4lite.text.grammar import AnswerForm
from glm4lite.text.messages import Message
from glm4lite.text.template import ChatTemplate

MOST_ITEMS = 4096  # parts or calls of one message
LONGEST = "This model's maximum context length is {context} tokens"  # OpenAI's words, which clients look for


@dataclass(frozen=True)
class Question:
    """`constraint`: what the answer follows. `chat` false: the output is text as it comes. `ignored`: parts of the
    request that cannot be followed, by their paths.
    """

    engine: Engine  # whose tokens the prompt is made of
    prompt: list[int]
    params: SamplingParams
    chat: bool
    tools: frozenset[str] = frozenset()
    constraint: Constraint | None = None
    parallel: bool = True
    thinking: bool = False
    top_logprobs: int | None = None
    ignored: tuple[str, ...] = ()


def chat_question(engine: Engine, request: ChatRequest) -> Question:
    """Renders and tokenizes the conversation. Raises ApiError; over-long conversations are refused here."""
    structure = Structure(engine.model.context)
    messages = in_order([_message(message, place, structure) for place, message in enumerate(request.messages)])
    tools = declared_tools(request.tools or [])
    names = [tool["function"]["name"] for tool in tools]
    forced = forced_names(request.tool_choice, names)
    if request.tool_choice == "none":  # a tool that the model does not know of is not called
        tools, names = [], []
    try:
        template = engine.chat_template()
        if tools and not template.takes_tools:
            raise ApiError("tools: this model's chat template has no place for them", param="tools")
        budget = _thinking_budget(request, template)
        prompt = template.encode(engine.tokenizer, messages, tools, context=engine.model.context)
    except ContextLengthError as error:
        raise _too_long(error, engine.model.context, "messages") from None
    except TemplateError as error:
        raise ApiError(str(error), param="messages") from None
    thinking = template.starts_thinking(engine.tokenizer.text(prompt[-8:], keep_special=True))
    form = AnswerForm(
        schema=wanted_schema(request.response_format),
        tools=tool_forms(request.tools, names),
        must_call=forced,
        parallel=request.parallel_tool_calls is not False,
        begun_thought=thinking,
        may_think=template.can_think and not thinking,
    )
    # No stop text ends what follows a schema in its middle.
    whole: dict[str, Any] = {"stop": ()} if form.ends_itself else {}
    params, prompt = _params(engine, request, thinking_budget=budget, **whole), _fitting(engine, prompt, "messages")
    constraint = held(engine, form)
    return Question(
        engine,
        prompt,
        params,
        chat=True,
        tools=frozenset(names),
        constraint=constraint,
        parallel=form.parallel,
        thinking=thinking,
        top_logprobs=request.wanted_logprobs,
        ignored=tuple(
            f"tools[{place}].function.parameters"
            for place, name in enumerate(names)
            if constraint is not None and name in constraint.loosened
        ),
    )


def completion_question(engine: Engine, request: CompletionRequest) -> Question:
    """The prompt's ids, behind the model's prefix where it is text. Raises ApiError."""
    match request.prompt:
        case [int(), *_]:
            prompt = [token for token in request.prompt if isinstance(token, int)]
            wrong = next((token for token in prompt if not 0 <= token < engine.tokenizer.size), None)
            if wrong is not None:
                raise ApiError(f"prompt: {wrong} is no token of this model", param="prompt")
        case [str(text)] | str(text):
            try:
                ids = engine.tokenizer.ids(text, context=engine.model.context)
            except ContextLengthError as error:
                raise _too_long(error, engine.model.context, "prompt") from None
            prompt = engine.tokenizer.prefix_ids + ids
        case _:
            raise ApiError("prompt: must be text or token ids", param="prompt")
    fitting, form = _fitting(engine, prompt, "prompt"), AnswerForm(wanted_schema(request.response_format))
    params = _params(engine, request, **({"stop": ()} if form.ends_itself else {}))
    constraint = held(engine, form)
    return Question(engine, fitting, params, chat=False, constraint=constraint, top_logprobs=request.logprobs)


def in_order(messages: list[Message]) -> list[Message]:
    """Results of one turn's calls in the order of the calls: GLM's observations carry no ids, their order is all."""
    ordered, places = list[Message](), dict[str | None, int]()
    run: list[Message] = []

    def close() -> None:
        run.sort(key=lambda result: places.get(result.tool_call_id, len(places)))
        ordered.extend(run)
        run.clear()

    for message in messages:
        if message.role == "tool":
            run.append(message)
            continue
        close()
        ordered.append(message)
        places = {call.id: place for place, call in reversed(list(enumerate(message.tool_calls)))}
    close()
    return ordered


def _message(data: dict[str, Any], place: int, structure: Structure) -> Message:
    at = f"messages[{place}]"
    refuse_in_message(data, at)
    for name in ("content", "tool_calls"):
        items = data.get(name)
        if isinstance(items, list) and len(items) > MOST_ITEMS:
            raise ApiError(f"{at}.{name}: at most {MOST_ITEMS} can be read, found {len(items)}", param=f"{at}.{name}")
    try:
        message = Message.from_dict(data)
    except Glm4liteError as error:
        raise ApiError(f"{at}: {str(error).removeprefix('message: ')}", param=at) from None
    for number, call in enumerate(message.tool_calls):
        check_name(call.name, f"{at}.tool_calls[{number}].function.name")
        try:  # some templates want them parsed
            structure.end()
            structure.feed(call.arguments.encode("utf-8", "replace"))
        except ApiError as error:
            where = f"{at}.tool_calls[{number}].function.arguments"
            raise ApiError(f"{where}: {error}".replace("the body", "JSON that"), param=where) from None
    return message


def _thinking_budget(request: ChatRequest, template: ChatTemplate) -> int | None:
    """The limit of the thought; a model that does not think may be asked for none, and for nothing else."""
    wanted = request.wanted_thinking
    if wanted is None:
        return None
    if not template.can_think and wanted.budget != 0:
        raise ApiError(f"{wanted.field}: a thought is not supported, this model does not think", param=wanted.field)
    return wanted.budget


def _too_long(error: ContextLengthError, context: int, param: str) -> ApiError:
    said = f"{LONGEST.format(context=context)}; {param}: {error}"
    return ApiError(said, param=param, code="context_length_exceeded")


def _fitting(engine: Engine, prompt: list[int], param: str) -> list[int]:
    context = engine.model.context
    if not prompt:
        raise ApiError(f"{param}: the prompt is empty: there is nothing to go on from", param=param)
    if len(prompt) >= context:
        raise ApiError(
            f"{LONGEST.format(context=context)}; {param} took {len(prompt)}, and nothing was cut. Shorten them.",
            param=param,
            code="context_length_exceeded",
        )
    return prompt


def _params(engine: Engine, request: ChatRequest | CompletionRequest, **instead: Any) -> SamplingParams:
    try:
        return engine.params(**request.sampling() | instead)
    except SamplingError as error:
        raise ApiError(str(error)) from None
