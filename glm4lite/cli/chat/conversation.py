"""A conversation at the terminal, or over lines of stdin, and what a user may change of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4lite.base.errors import ConfigError, one_line
from glm4lite.base.events import Done, Event, Progress, TextDelta, ThinkingDelta, ToolCallDelta, ToolCallStarted
from glm4lite.base.user_folder import chats_folder
from glm4lite.chat.session import ChatSession
from glm4lite.checkpoint.lora.folder import Loras
from glm4lite.cli.chat import saved
from glm4lite.cli.chat.settings import Settings
from glm4lite.cli.signals import interrupt_stops
from glm4lite.cli.streams import echo
from glm4lite.cli.terminal import ending
from glm4lite.engine.engine import Engine
from glm4lite.hub.sources import locate
from glm4lite.text.template import Begun

if TYPE_CHECKING:
    from glm4lite.cli.terminal import Renderer
    from glm4lite.loading.load_options import LoadOptions
    from glm4lite.text.grammar import Schema
    from glm4lite.tools.tool import Tool


@dataclass(frozen=True)
class Source:
    """Where a model came from: its name, and what was asked of the load."""

    model: str
    options: LoadOptions
    speculate: str = "auto"
    draft: str | None = None
    keep_prefixes: str | None = None

    def load(self, progress: Callable[[Progress], None], before_weights: Callable[[], None] | None = None) -> Engine:
        options = replace(self.options, progress=progress)
        return Engine.from_options(
            self.model,
            options,
            need_template=True,
            before_weights=before_weights,
            speculate=self.speculate,
            draft=self.draft,
            keep_prefixes=self.keep_prefixes,
        )


@dataclass
class Conversation:
    """A session with what a user may change of it by commands.

    `tools` are those that can be offered; `by_hand`: at a terminal.
    """

    session: ChatSession
    renderer: Renderer
    source: Source
    settings: Settings
    tools: tuple[Tool, ...] = ()
    by_hand: bool = True
    file: Path | None = None  # where it was saved last

    @classmethod
    def begin(
        cls,
        source: Source,
        renderer: Renderer,
        tools: tuple[Tool, ...],
        sampling: dict[str, Any],
        system: str | None,
        by_hand: bool,
        schema: Schema | None = None,
    ) -> Conversation:
        """Loads the model; `sampling` is what was given of SamplingParams, `schema` what answers follow.

        Raises what `Engine.load` raises.
        """
        engine = source.load(renderer.show)
        session = ChatSession(engine, tools, system, schema=schema)
        if tools and not session.template.takes_tools:
            own = "; `glm4lite research` gives it those it knows" if session.template.lists_research_tools else ""
            renderer.remark(f"(this model's chat template has no place for tools: they are not offered{own})")
        settings = Settings(session, renderer, tools, sampling)
        settings.renew()
        return cls(session, renderer, source, settings, tools, by_hand)

    def ask_before_tools(self) -> None:
        """From now on tools that want it are asked for at the keyboard."""
        from glm4lite.cli.chat.approval import TerminalApproval

        self.session.approve = TerminalApproval(self.session, self.renderer)

    def ask(self, text: str) -> None:
        """Sends a message and shows the answer."""
        self._answer(self.session.send(text))

    def _answer(self, events: Iterator[Event]) -> None:
        self.renderer.ending = self._ending
        with interrupt_stops(self.session), echo(False):
            self.renderer.show_all(events)

    def _ending(self, done: Done) -> str:
        """What is said of how an answer ended, and how to go on with it."""
        way_on = "; /continue goes on" if self.by_hand and self.session.cut is not None else ""
        if done.finish_reason != "length":
            said = ending(done)
            return f"{said.removesuffix(')')}{way_on})" if said else ""
        said = f"the answer was cut at {done.new_tokens} tokens"
        if self.session.params.max_new_tokens is None:
            return f"({said}: the model's context is full)"
        return f"({said}{way_on or ': --max-new-tokens allows no more'})"

    # --- what commands do

    def go_on_with_answer(self) -> None:
        """Shows the rest of an answer that was cut."""
        cut = self.session.cut or Begun()
        self._answer(_unshown(self.session.go_on(), cut, self.renderer.drawn_with(cut.text)))

    def reset(self) -> None:
        self.session.reset()
        self.file = None
        self.renderer.remark("(the conversation is forgotten)")

    def save(self, name: str) -> None:
        """To `name`, or once more to where it was saved."""
        path = saved.place_for(name, self.file) if name else self.file
        if path is None:
            raise ConfigError("usage: /save NAME")
        if not any(message.role != "system" for message in self.session.messages):
            raise ConfigError("there is nothing to save yet")
        sampling = {name: value for name, value in self.settings.sampling.items() if value not in (None, ())}
        title = "" if saved.is_path(name) else name
        kept = saved.Saved(self.session.messages, sampling, self.source.model, title, cut=self.session.cut)
        title = saved.save(path, kept, path == self.file)
        self.file = path
        self.renderer.remark(f"(saved: {title if path.parent == chats_folder() else path})")

    def load(self, name: str) -> None:
        """In place of this conversation; the model stays."""
        if not name:
            self.renderer.remark(saved.listed() or "(nothing is saved yet)")
            return
        path = saved.find(name)
        found = saved.load(path)
        tokens = self._tokens(found.messages)
        self.settings.restore(found.settings)
        self.session.recall(found.messages, found.cut)
        self.file = path if found.in_our_form else None
        asked = sum(message.role == "user" for message in found.messages)
        other = f", held with {found.model}" if found.model not in ("", self.source.model) else ""
        way_on = "; its last answer was cut: /continue goes on" if found.cut and self.by_hand else ""
        self.renderer.remark(f"(loaded: {_questions(asked)}, {tokens} tokens{other}{way_on})")

    def change_model(self, model: str, quant: str | None = None) -> None:
        """Loads another model and keeps the conversation.

        The old one leaves memory before the weights are read, since both may be more than there is; it is loaded again
        where the new one then fails.
        """
        locate(model)
        old, options = self.source, self.source.options
        loras = options.loras if model == old.model else Loras()  # adapters are of their own model
        aim = options.aim if model == old.model and quant is None else None
        asked = replace(options, quant=quant or options.quant, loras=loras, aim=aim)
        new = replace(self.source, model=model, options=asked)
        unloaded = False

        def unload() -> None:
            nonlocal unloaded
            unloaded = True
            self.session.engine.unload()

        try:
            self._use(new.load(self.renderer.show, unload), new)
        except (Exception, KeyboardInterrupt) as error:
            if not unloaded:
                raise
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)
            self.renderer.remark(f"error: {reason}; {old.model} is loaded again")
            del error
            self._use(old.load(self.renderer.show), old)
        finally:
            self.renderer.close()

    def _use(self, engine: Engine, source: Source) -> None:
        self.session.use(engine)
        self.settings.renew()
        self.source = source

    # --- what they tell

    def model_line(self) -> str:
        model = self.session.engine.model
        return f"{self.source.model}: {model.config.num_hidden_layers} layers, context {model.context} tokens"

    def lines(self) -> Iterator[tuple[str, str]]:
        """(name, value) of all that is in force."""
        context = self.session.engine.model.context
        asked = sum(message.role == "user" for message in self.session.messages)
        yield "model", f"{self.source.model}, {self.session.engine.model.config.num_hidden_layers} layers"
        yield "context", f"{self._tokens(self.session.messages)} of {context} tokens, {_questions(asked)}"
        yield "saved", str(self.file or "no")
        yield from self.settings.lines()

    def tool_lines(self) -> Iterator[str]:
        for tool in self.tools:
            asks = "" if tool.needs_approval is False else "asks before it runs; "
            allowed = "allowed in this chat; " if tool.name in self.session.allowed else ""
            state = "" if tool.name in self.session.tools else "off; "
            yield f"{tool.full_name}: {state}{allowed or asks}{one_line(tool.description, 200)}"

    def _tokens(self, messages: Sequence[Any]) -> int:
        return self.session.prompt_tokens(messages) if messages else 0


def _questions(count: int) -> str:
    return f"{count} question{'' if count == 1 else 's'}"


def _unshown(events: Iterator[Event], shown: Begun, again: str) -> Iterator[Event]:
    """The events of an answer without what was shown of it, but for the end of its text that is shown `again`."""
    text, thinking = len(shown.text) - len(again), len(shown.thinking)
    for event in events:
        if isinstance(event, TextDelta):
            new, text = event.text[text:], max(text - len(event.text), 0)
            if new:
                yield TextDelta(new)
        elif isinstance(event, ThinkingDelta):
            new, thinking = event.text[thinking:], max(thinking - len(event.text), 0)
            if new and not shown.text:
                yield ThinkingDelta(new)
        else:
            if isinstance(event, ToolCallDelta | ToolCallStarted):  # what was shown of the call is no text any more
                text, shown = 0, Begun()
            yield event
