"""Question: a checked request as the model gets it: token ids, sampling, and what to look for in the output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from glm4lite.base.errors import ContextLengthError, Glm4liteError, SamplingError, TemplateError
from glm4lite.engine.constraint import Constraint
from glm4lite.engine.engine import Engine
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.thinking_budget import with_an_end
from glm4lite.server.body import Structure
from glm4lite.server.declared import check_name, declared_tools, forced_names
from glm4lite.server.errors import ApiError
from glm4lite.server.requests import ChatRequest, CompletionRequest
from glm4lite.server.structured import held, tool_forms, wanted_schema
from glm4lite.server.thinking import EFFORT, TemplateVariables
from glm4lite.server.unsupported import refuse_in_message
from glm4lite.text.grammar import AnswerForm
from glm4lite.text.messages import Message
from glm4lite.text.template import ChatTemplate

MOST_ITEMS = 4096  # parts or calls of one message
LONGEST = "This model's maximum context length is {context} tokens"  # OpenAI's words, which clients look for


@dataclass(frozen=True)
class Question:
    """`constraint`: what each answer follows. `chat` false: the output is text as it comes.

    `n` answers are wanted, the likeliest of `best_of`, and as many to each of the `further` prompts. `echo`: the text
    begins with the prompt, from this id of it on; with `silent` it ends there, too. `ignored`: parts of the request
    that mean nothing to this model or cannot be followed, by their paths.
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
    n: int = 1
    best_of: int = 1
    further: tuple[list[int], ...] = ()
    echo: int | None = None
    silent: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether there is one answer."""
        return self.best_of == 1 and not self.further

    def each(self) -> list[Question]:
        """One for each candidate: `best_of` of the first prompt, then of the next. Each but the first draws by a seed
        of its own; the answers to a prompt are those that it would have alone."""
        alone = [
            replace(self, prompt=prompt, params=self.params.nth(number), n=1, best_of=1, further=())
            for prompt in (self.prompt, *self.further)
            for number in range(self.best_of)
        ]
        if self.best_of > self.n and self.top_logprobs is None:  # they say which is the best
            alone = [replace(one, top_logprobs=0) for one in alone]
        return alone


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
        budget, ignored = _thinking_budget(request, template)
        variables = _variables(request, template)
        prompt = template.encode(engine.tokenizer, messages, tools, context=engine.model.context, variables=variables)
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
    params, prompt = _params(engine, request, thinking_budget=budget), _fitting(engine, prompt, "messages")
    if template.can_think:
        params = with_an_end(params, prompt, engine.model.context)
    params, constraint = _held(engine, form, params)
    loosened = () if constraint is None else constraint.loosened
    schemas = [f"tools[{place}].function.parameters" for place, name in enumerate(names) if name in loosened]
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
        n=request.n or 1,
        best_of=request.n or 1,
        ignored=(*ignored, *schemas),
    )


def completion_question(engine: Engine, request: CompletionRequest) -> Question:
    """The prompts' ids, behind the model's prefix where they are text. Raises ApiError."""
    several = len(request.prompts) > 1
    prompts = [
        _completed(engine, prompt, f"prompt[{place}]" if several else "prompt")
        for place, prompt in enumerate(request.prompts)
    ]
    prefix = len(engine.tokenizer.prefix_ids) if isinstance(request.prompts[0], str) else 0
    form = AnswerForm(wanted_schema(request.response_format))
    params, constraint = _held(engine, form, _params(engine, request))
    return Question(
        engine,
        prompts[0],
        params,
        chat=False,
        constraint=constraint,
        top_logprobs=request.logprobs,
        n=request.n or 1,
        best_of=request.candidates,
        further=tuple(prompts[1:]),
        echo=prefix if request.echo else None,
        silent=request.max_tokens == 0,
    )


def _completed(engine: Engine, prompt: str | list[int], at: str) -> list[int]:
    """One prompt's ids; `at` names it."""
    if isinstance(prompt, str):
        try:
            ids = engine.tokenizer.ids(prompt, context=engine.model.context)
        except ContextLengthError as error:
            raise _too_long(error, engine.model.context, at) from None
        return _fitting(engine, engine.tokenizer.prefix_ids + ids, at)
    wrong = next((token for token in prompt if not 0 <= token < engine.tokenizer.size), None)
    if wrong is not None:
        raise ApiError(f"{at}: {wrong} is no token of this model", param=at)
    return _fitting(engine, prompt, at)


def _held(engine: Engine, form: AnswerForm, params: SamplingParams) -> tuple[SamplingParams, Constraint | None]:
    """What holds an answer to that form, and its sampling. Raises ApiError."""
    constraint = held(engine, form)
    if constraint is not None and params.ignore_eos:
        raise ApiError("ignore_eos: what follows a schema has an end", param="ignore_eos")
    return params.uncut() if form.ends_itself else params, constraint


def _variables(request: ChatRequest, template: ChatTemplate) -> dict[str, Any]:
    """What `chat_template_kwargs` gives the template to read. Raises ApiError for what it does not read."""
    given = {} if request.chat_template_kwargs is None else request.chat_template_kwargs.given()
    for name in given.keys() - TemplateVariables.model_fields.keys():
        try:
            template.check_variables([name])
        except TemplateError as error:
            at = f"chat_template_kwargs.{name[:80]}"
            raise ApiError(f"{at}: {error}", param=at, code="unsupported_value") from None
    if request.enable_thinking is not None:
        given.setdefault("enable_thinking", request.enable_thinking)
    return {name: value for name, value in given.items() if template.reads(name)}


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


def _thinking_budget(request: ChatRequest, template: ChatTemplate) -> tuple[int | None, tuple[str, ...]]:
    """The limit of the thought, and what means nothing here. A model that does not think may be asked for no thought;
    an effort, which clients send to any model, is ignored, and anything else refused."""
    wanted = request.wanted_thinking
    if wanted is None:
        return None, ()
    if not template.can_think and wanted.field == EFFORT:
        return None, (EFFORT,) if wanted.budget != 0 else ()
    if not template.can_think and wanted.budget != 0:
        raise ApiError(f"{wanted.field}: a thought is not supported, this model does not think", param=wanted.field)
    return wanted.budget, ()


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
        name = str(error).partition(":")[0]
        raise ApiError(str(error), param=name if name in type(request).model_fields else None) from None
