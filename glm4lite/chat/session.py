"""ChatSession: a conversation as a stream of events, with the tool loop and the KV prefix kept between turns."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

from glm4lite.base.errors import Glm4liteError, ModelReplaced, SchemaError, one_line
from glm4lite.base.events import (
    Done,
    Event,
    Progress,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    ToolCallFinished,
    ToolCallStarted,
)
from glm4lite.engine.constraint import Constraint
from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import Engine, Totals
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.thinking_budget import with_an_end
from glm4lite.text.grammar import AnswerForm, Schema, ToolForm, checked_schema
from glm4lite.text.messages import Message, ToolCall
from glm4lite.text.output_parser import Call, CallBegun, CallCut, CallPiece, OutputParser, Segment, Text, Thinking
from glm4lite.text.template import Begun
from glm4lite.tools.running import Approve, nobody_to_ask, run_tool
from glm4lite.tools.tool import Tool

if TYPE_CHECKING:
    from pydantic import BaseModel

    from glm4lite.checkpoint.formats.format import Quant

    M = TypeVar("M", bound=BaseModel)

_HALF = "\ufffd"  # stands for the first bytes of a character whose last ones were cut off

# Where a generation is computed: given what makes its events and what cancels it. EngineWorker.run is one.
Compute: TypeAlias = Callable[[Callable[[Engine], Iterator[Event]], threading.Event], Iterator[Event]]


@dataclass
class _Answer:
    """What one generation said, as it is put back into the history; `begun` was said before it."""

    begun: Begun | None = None
    text: str = ""
    thinking: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    writing: ToolCall | None = None  # the call that is being written
    generation: Generation | None = None  # None: cancelled before it began

    @property
    def cut(self) -> Begun | None:
        """What was said, where it ended in the middle; None where it is whole, or calls are what matters of it."""
        if self.generation is None:
            return self.begun or Begun()
        whole = self.generation.finish_reason not in ("length", "cancelled")
        return None if whole or self.calls else Begun(self.text, self.thinking)


class ChatSession:
    """A conversation with a model.

        session = ChatSession.load("nano", tools=BUILTIN_TOOLS)
        for event in session.send("What is 37 * 24?"):
            if isinstance(event, TextDelta):
                print(event.text, end="")

    `messages` is the history in OpenAI's form. `cut` is what was said of an answer that was stopped or met a limit, and
    `go_on` goes on with it. One turn may call several tools, in at most `max_tool_rounds` rounds; a tool that fails is
    an error observation to the model, and a result takes at most half of the context that is left.
    Only the part of the prompt that is new is computed, also where several sessions take turns. Sessions that share an
    Engine may answer at once, each in a thread of its own.
    Calls of tools follow the schemas of their arguments, and every answer follows `schema`, where there is one: a JSON
    schema (an answer may still call tools first).
    A tool that needs approval runs only when `approve(call, tool)` returns True (`run_tool` says when and in which
    thread); `allowed` holds the names of tools allowed for the rest of this chat, and `approve` may add to it.
    """

    def __init__(
        self,
        engine: Engine,
        tools: Sequence[Tool] = (),
        system: str | None = None,
        params: SamplingParams | None = None,
        max_tool_rounds: int = 8,
        tool_timeout: float = 30.0,
        approve: Approve = nobody_to_ask,
        compute: Compute | None = None,
        schema: Schema | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        """`params` default to the checkpoint's. `template_variables` are what else the chat template reads, such as
        enable_thinking. Raises TemplateError for a base model, which has no template, for a thinking budget of a model
        that does not think, and for a variable that its template does not read; SchemaError for a schema that is none,
        or too large.

        With `compute` (an EngineWorker's run) only generations run there; tools run in the thread that reads `send`.
        """
        self.engine, self.template = engine, engine.chat_template()
        self.tools = {tool.name: tool for tool in tools}
        self.system = system
        self.params = params or engine.params()
        self.schema = schema
        self.max_tool_rounds, self.tool_timeout = max_tool_rounds, tool_timeout
        self.approve = approve
        self.allowed = set[str]()
        self.template_variables = dict(template_variables or {})
        self.template.check_variables(self.template_variables)
        self._compute: Compute = compute or (lambda make_events, _: make_events(self.engine))
        self._cancel = threading.Event()
        self._calls_made = 0
        self.messages: list[Message] = []
        self.cut: Begun | None = None
        self.reset()

    @classmethod
    def load(
        cls,
        source: str | Path = "nano",
        quant: str | Quant | None = "auto",
        tools: Sequence[Tool] = (),
        system: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        progress: Callable[[Progress], None] | None = None,
        kv: str = "auto",
        gpu_memory: int | str | None = None,
        ram: int | str | None = None,
        context: int | str | None = None,
        approve: Approve = nobody_to_ask,
        speculate: str | int = "auto",
        lora: str | Path | Sequence[str | Path] | None = None,
        **sampling: Any,
    ) -> ChatSession:
        """An Engine and a session on it; arguments as in `Engine.load`, `sampling` as in SamplingParams."""
        from glm4lite.checkpoint.lora.folder import Loras
        from glm4lite.loading.load_options import LoadOptions
        from glm4lite.memory.budget import Budget

        SamplingParams.check(**sampling)
        budget = Budget.of(gpu_memory, ram, context, kv)
        options = LoadOptions(quant, device, dtype, progress, budget=budget, loras=Loras.of(lora))
        engine = Engine.from_options(source, options, need_template=True, speculate=speculate)
        return cls(engine, tools, system, engine.params(**sampling), approve=approve)

    def reset(self) -> None:
        """Forgets the conversation and what was allowed in it; the system prompt and the tools stay."""
        self.allowed.clear()
        self.cut = None
        self.messages[:] = [Message("system", self.system)] if self.system else []

    def recall(self, messages: Sequence[Message], cut: Begun | None = None) -> None:
        """Goes on from a conversation that was held before, with its system prompt; `cut` as it was then."""
        self.reset()
        self.messages[:], self.cut = messages, cut
        self.system = messages[0].content if messages and messages[0].role == "system" else None
        self._calls_made = sum(len(message.tool_calls) for message in messages)  # so that no id comes twice

    def use(self, engine: Engine) -> None:
        """Goes on with another model, with its checkpoint's sampling; the conversation, the prompt and tools stay.

        Raises TemplateError for a base model.
        """
        self.template = engine.chat_template()
        self.engine, self.params = engine, engine.params()

    def instruct(self, system: str | None) -> None:
        """Sets the system prompt, from the next message on; None: there is none."""
        self.system = system
        if self.messages and self.messages[0].role == "system":
            del self.messages[0]
        if system:
            self.messages.insert(0, Message("system", system))

    @property
    def params(self) -> SamplingParams:
        """How answers are sampled. Setting it raises TemplateError where a model that does not think gets a budget."""
        return self._params

    @params.setter
    def params(self, params: SamplingParams) -> None:
        self.template.check_thinking(params.thinking_budget)
        self._params = params

    @property
    def schema(self) -> Schema | None:
        """What every answer follows; None: it is text. Setting it raises SchemaError for what is no schema."""
        return self._schema

    @schema.setter
    def schema(self, schema: Schema | None) -> None:
        self._schema = None if schema is None else checked_schema(schema)

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Length of the prompt that these messages make, with the tools' descriptions."""
        return len(self._prompt(messages))

    def stop(self) -> None:
        """Ends the answer that is being given; may be called from another thread or a signal handler."""
        self._cancel.set()

    def send(self, text: str, cancel: threading.Event | None = None) -> Generator[Event]:
        """Adds a user message and yields the events of the answer, the last one Done.

        `cancel` ends the answer as stop() does; one that is set already ends it at once. After an error
        (ContextLengthError, say) the history is as it was before.
        """
        yield from self._turn([*self.messages, Message("user", text)], None, cancel)

    @overload
    def ask(self, prompt: str, schema: None = None, cancel: threading.Event | None = None) -> str: ...
    @overload
    def ask(self, prompt: str, schema: type[M], cancel: threading.Event | None = None) -> M: ...
    @overload
    def ask(self, prompt: str, schema: Schema, cancel: threading.Event | None = None) -> Any: ...
    def ask(
        self, prompt: str, schema: type[BaseModel] | Schema | None = None, cancel: threading.Event | None = None
    ) -> Any:
        """Sends a message and returns the answer, behind all calls of tools: its text, or what a schema makes of it.

            class City(BaseModel):
                name: str
                inhabitants: int

            session.ask("Which city is the capital of China?", schema=City)      # City(name='Beijing', …)

        schema: a pydantic model, of which an object is returned, or a JSON schema, for which it is JSON's value (a dict
        for an object). Raises SchemaError for a schema that no answer can be held to, and where an answer was cut.
        """
        before = self._schema
        model = schema if isinstance(schema, type) else None
        try:
            if schema is not None:
                self.schema = _schema_of(schema)
            done = [event for event in self.send(prompt, cancel) if isinstance(event, Done)]
            said = self.messages[-1].content if self.messages[-1].role == "assistant" else ""
            if self._schema is None:
                return said
            if done[-1].finish_reason != "stop":
                why = done[-1].finish_reason
                raise SchemaError(f"the answer ended ({why}) after {done[-1].new_tokens} tokens, before it was whole")
            return json.loads(said) if model is None else model.model_validate_json(said)
        except ValueError as error:  # of the model's own validators
            raise SchemaError(f"the answer is not as its schema wants: {one_line(error, 500)}") from error
        finally:
            self._schema = before

    def resume(self, text: str, thinking: str = "", cancel: threading.Event | None = None) -> Generator[Event]:
        """Goes on with an answer that was cut: `messages` end with what it answers, `text` and `thinking` begin it.

        The events are those of the whole answer: what was said comes again first, but for the end of a call that was
        cut, which was text until now. Else as `send`.
        """
        begun = Begun(text.rstrip(_HALF), thinking.rstrip(_HALF))
        yield from self._turn(list(self.messages), begun if begun.text or begun.thinking else None, cancel)

    def go_on(self, cancel: threading.Event | None = None) -> Generator[Event]:
        """Goes on with the last answer, which must be `cut`; else as `resume`, and an error leaves it as it was."""
        if self.cut is None:
            raise Glm4liteError("there is no answer to go on with: the last one is whole")
        messages, cut = list(self.messages), self.cut
        if cut.text and messages[-1:] == [Message("assistant", cut.text)]:
            self.messages.pop()  # what was said of it
        try:
            yield from self.resume(cut.text, cut.thinking, cancel)
        except Exception:
            self.messages[:] = messages
            raise

    def _turn(self, messages: list[Message], begun: Begun | None, cancel: threading.Event | None) -> Generator[Event]:
        self._cancel = cancel or threading.Event()
        before, cut, self.messages[:] = list(self.messages), self.cut, messages
        totals = Totals()
        try:
            for left in range(self.max_tool_rounds, -1, -1):
                prompt, answer = self._prompt(self.messages, begun), _Answer(begun)
                begun = None
                try:
                    yield from self._compute(partial(self._answer, prompt, answer), self._cancel)
                finally:  # what was said stays said, also when the reader goes away
                    self._remember(answer)
                    self.cut = answer.cut
                if (generation := answer.generation) is None:
                    yield totals.cancelled(len(prompt))
                    return
                totals.add(generation)
                yield from self._run(answer.calls if left else [])
                reason = self._ending(generation, answer, left)
                if reason is not None:
                    yield totals.done(generation, reason)
                    return
        except Exception:
            self.messages[:], self.cut = before, cut
            raise

    def _ending(self, generation: Generation, answer: _Answer, rounds_left: int) -> str | None:
        """Why the turn ends here, or None when the model gets to see its calls' results."""
        if self._cancel.is_set():
            return "cancelled"
        if not answer.calls:
            return generation.finish_reason
        return None if rounds_left else "tool_rounds"

    def _prompt(self, messages: Sequence[Message], begun: Begun | None = None) -> list[int]:
        schemas = [tool.schema() for tool in self.tools.values()]
        read = {name: value for name, value in self.template_variables.items() if self.template.reads(name)}
        return self.template.encode(self.engine.tokenizer, messages, schemas, begun=begun, variables=read)

    def _starts_thinking(self, prompt: list[int]) -> bool:
        return self.template.starts_thinking(self.engine.tokenizer.text(prompt[-8:], keep_special=True))

    def _answer(self, prompt: list[int], answer: _Answer, engine: Engine) -> Iterator[Event]:
        if engine is not self.engine:
            raise ModelReplaced
        params = self.params if self._schema is None else self.params.uncut()
        if self.template.can_think:
            params = with_an_end(params, prompt, engine.model.context)
        constraint = self._constraint(prompt, answer.begun)
        generation = answer.generation = engine.generate(prompt, params, self._cancel)
        generation.constraint = constraint
        yield from self.engine.prefill(generation)
        for segment in self._segments(generation, answer.begun):
            match segment:
                case CallBegun(name):
                    answer.writing = self._new_call(name, "")
                    yield ToolCallDelta(answer.writing.id, name, "")
                case CallPiece(text) if answer.writing is not None:
                    yield ToolCallDelta(answer.writing.id, answer.writing.name, text)
                case Call(name, arguments):  # a ToolCallStarted only when it runs
                    call, answer.writing = answer.writing or self._new_call(name, arguments), None
                    answer.calls.append(replace(call, arguments=arguments))
                case Thinking(text):
                    answer.thinking += text
                    yield ThinkingDelta(text)
                case Text(text) | CallCut(written=text):
                    answer.writing = None
                    answer.text += text
                    yield TextDelta(text)

    def _new_call(self, name: str, arguments: str) -> ToolCall:
        self._calls_made += 1
        return ToolCall(f"call_{self._calls_made}", name, arguments)

    def _constraint(self, prompt: list[int], begun: Begun | None) -> Constraint | None:
        """What holds the answer to the schemas, behind what was said of it already."""
        thinking = self._starts_thinking(prompt) if begun is None else bool(begun.thinking)
        tools = tuple(ToolForm(tool.name, tool.parameters) for tool in self.tools.values())
        may_think = self.template.can_think and not thinking
        constraint = self.engine.constraint(
            AnswerForm(self._schema, tools, begun_thought=thinking, may_think=may_think)
        )
        if begun is None or constraint is None:
            return constraint
        ids = self.engine.tokenizer.ids(begun.written() if begun.thinking else begun.text)
        if constraint.fitting(ids) < len(ids):
            if self._schema is None:
                return None  # said before its tools were what they are
            raise SchemaError("the answer cannot go on: what was said of it does not follow the schema")
        constraint.accept(ids)
        return constraint

    def _segments(self, generation: Generation, begun: Begun | None) -> Iterator[Segment]:
        certain = generation.constraint is not None
        if begun is None:
            parser = OutputParser(self.tools, self._starts_thinking(generation.prompt), certain)
        else:
            parser = OutputParser(self.tools, bool(begun.thinking), certain)
            yield from parser.feed("\n" + (begun.written() if begun.thinking else begun.text))  # as GLM starts each
        for piece in self.engine.pieces(generation):
            yield from parser.separator() if piece is None else parser.feed(piece)
        yield from parser.finish()

    def _remember(self, answer: _Answer) -> None:
        """The thought is left out: the templates of thinking models drop it from history too.

        Every call gets its observation at once, so that the history is whole whenever the reader goes away.
        """
        text = answer.begun.text if answer.begun and answer.generation is None else answer.text
        if text or answer.calls:
            self.messages.append(Message("assistant", text, tuple(answer.calls)))
        for call in answer.calls:
            self.messages.append(_observation(call, "Error: the call was not run"))

    def _run(self, calls: list[ToolCall]) -> Iterator[Event]:
        """Runs the calls that were just remembered, in order, and puts their results in."""
        first = len(self.messages) - len(calls)
        for place, call in enumerate(calls, first):
            if self._cancel.is_set():
                return
            tool, arguments = self.tools.get(call.name), json.loads(call.arguments)
            asks = tool is not None and tool.name not in self.allowed and tool.asks(arguments)
            yield ToolCallStarted(call.id, call.name, arguments, asks)
            result = run_tool(tool, call, self.tool_timeout, self._cancel, self._approve, self._fitting())
            self.messages[place] = _observation(call, result.content)
            yield ToolCallFinished(call.id, call.name, result.content, result.error)

    def _fitting(self) -> Callable[[str], int]:
        """Says how many characters of a tool's result to keep: half of the context that is left is for the answer."""
        tokenizer, left = self.engine.tokenizer, self.engine.model.context - self.prompt_tokens(self.messages)
        most = max(left // 2, 0)

        def fits(result: str) -> int:
            tokens = tokenizer.ids(result)
            if len(tokens) <= most:
                return len(result)
            return len(tokenizer.text(tokens[:most]).rstrip("\ufffd"))  # half a character does not count

        return fits

    def _approve(self, call: ToolCall, tool: Tool) -> bool:
        return tool.name in self.allowed or self.approve(call, tool)


def _schema_of(schema: type[BaseModel] | Schema) -> Schema:
    """A pydantic model's JSON schema, or the schema that is given. Raises SchemaError for a model that has none."""
    if not isinstance(schema, type):
        return schema
    try:
        described: dict[str, Any] = schema.model_json_schema()
    except Exception as error:  # describing types runs the code of whoever wrote them
        raise SchemaError(f"{schema.__name__} has no JSON schema: {one_line(error, 500)}") from error
    return described


def _observation(call: ToolCall, content: str) -> Message:
    return Message("tool", content, tool_call_id=call.id, name=call.name)
