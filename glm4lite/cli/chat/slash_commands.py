"""The commands of a conversation: `/set temperature 0.7`, `/save trip`, …"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm4lite.base.errors import ConfigError
from glm4lite.cli.chat import mentions, saved
from glm4lite.cli.chat.keyboard import unquoted
from glm4lite.cli.chat.settings import HELP
from glm4lite.cli.paths import models, paths

if TYPE_CHECKING:
    from glm4lite.cli.chat.conversation import Conversation
    from glm4lite.cli.terminal import Renderer

Run = Callable[["Conversation", str], None]
Words = Callable[["Conversation", str], Iterable[str]]

SHORT_HELP = "/help lists the commands, /exit leaves, Ctrl-C stops an answer."
PIPED_HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer."


class Leave(Exception):
    """The user leaves the conversation."""


@dataclass(frozen=True)
class Command:
    """`usage`: its arguments ("" where it takes none); `words`: what may stand in their place, by what is typed."""

    usage: str
    help: str
    run: Run
    words: Words = lambda _, __: ()
    piped: bool = False  # obeyed in the lines of `--lines` too


def of(text: str, by_hand: bool) -> tuple[Command, str] | None:
    """The command a text is, with its argument; None for a message.

    One that takes no argument is a lone word, and one that takes some is one line or holds a block; "/tmp is full"
    and "/reset the router?" are messages.
    """
    match = re.fullmatch(r"(/\w+|/\?)(?:\s+(.*))?", text, re.DOTALL)
    command = _known(by_hand).get(match[1]) if match else None
    if match is None or command is None:
        return None
    argument = (match[2] or "").strip()
    several_lines = "\n" in argument and '"""' not in argument
    return None if (argument and not command.usage) or several_lines else (command, argument)


def is_misspelt(text: str, by_hand: bool, renderer: Renderer) -> bool:
    """What is nearly a command is worth a hint; all else is a message, such as a path or a comment.

    A lone word may be meant for any, what has words behind it for one that takes some.
    """
    match = re.fullmatch(r"(/\w+)(?:[ \t]+(.*))?", text)
    if match is None:
        return False
    word, argument = match.groups()
    known = [name for name, command in _known(by_hand).items() if command.usage or not argument]
    near = difflib.get_close_matches(word, known, 1, 0.8)
    said = f"{word} is not a command"
    if near:
        way_out = ' (""" before and behind it sends it)' if argument else ""
        renderer.remark(f"({said} and was not sent; is it {near[0]}?{way_out})")
    elif not argument:
        renderer.remark(f"({said}: it is sent as a message)")
    return bool(near)


def offers(conversation: Conversation, before: str) -> Iterator[tuple[str, int]]:
    """For the text before the cursor: a command's name, its argument, or a file's name."""
    head, space, rest = before.partition(" ")
    if before.startswith("/") and "\n" not in before:
        if not space:
            yield from ((name, -len(before)) for name in COMMANDS if name.startswith(head) and name != "/?")
            return
        command = COMMANDS.get(head)
        if command is not None and command.usage:
            typed = rest.lstrip()
            *_, last = typed.split(" ")
            for word in command.words(conversation, typed):
                if word.startswith(typed):  # which may have spaces
                    yield word, -len(typed)
                elif word.startswith(last):
                    yield word, -len(last)
            return
    yield from mentions.completions(before)


def _known(by_hand: bool) -> dict[str, Command]:
    return COMMANDS if by_hand else {name: command for name, command in COMMANDS.items() if command.piped}


def _help(conversation: Conversation, _: str) -> None:
    if not conversation.by_hand:
        conversation.renderer.remark(PIPED_HELP)
        return
    rows = [(" ".join(filter(None, (name, command.usage))), command.help) for name, command in _listed()]
    width = max(len(left) for left, _ in rows)
    conversation.renderer.remark("\n".join(f"{left:<{width}}  {text}" for left, text in rows))
    conversation.renderer.remark(_TYPING)


_TYPING = (
    'Several lines: paste them, put """ before and behind them, or end each with\n'
    "a backslash (or Alt+Enter). @notes.txt adds a file to the question; @@ writes\n"
    "an @. Tab completes. Ctrl-C stops an answer."
)


def _listed() -> Iterator[tuple[str, Command]]:
    """Each command once, under its first name."""
    shown: set[int] = set()
    for name, command in COMMANDS.items():
        if id(command) not in shown:
            shown.add(id(command))
            yield name, command


def _set(conversation: Conversation, argument: str) -> None:
    name, _, value = argument.partition(" ")
    name, value = name.replace("-", "_"), unquoted(value.strip())
    if not name:
        conversation.renderer.remark("\n".join(f"/set {known:<18}  {text}" for known, text in HELP.items()))
        return
    if value or name not in HELP:
        conversation.settings.set(name, value)
    conversation.renderer.remark(f"({conversation.settings.told(name)})")


def _set_words(conversation: Conversation, typed: str) -> Iterable[str]:
    name, space, _ = typed.partition(" ")
    return conversation.settings.words(name) if space else HELP


def _show(conversation: Conversation, _: str) -> None:
    conversation.renderer.remark("\n".join(f"{name:<18}  {value}" for name, value in conversation.lines()))


def _tools(conversation: Conversation, _: str) -> None:
    conversation.renderer.remark("\n".join(conversation.tool_lines()) or "(there are no tools)")


def _model(conversation: Conversation, argument: str) -> None:
    words = argument.split()
    if len(words) > 2:
        raise ConfigError("usage: /model NAME [int4|int8|nf4|fp4|none]")
    if words:
        conversation.change_model(*words)
    conversation.renderer.remark(f"({conversation.model_line()})")


def _save(conversation: Conversation, argument: str) -> None:
    conversation.save(argument)


def _load(conversation: Conversation, argument: str) -> None:
    conversation.load(argument)


def _saved_words(_: Conversation, typed: str) -> Iterable[str]:
    return paths(typed) if "/" in typed else saved.titles()


def _model_words(_: Conversation, typed: str) -> Iterable[str]:
    return models(typed)


def _continue(conversation: Conversation, _: str) -> None:
    conversation.go_on_with_answer()


def _reset(conversation: Conversation, _: str) -> None:
    conversation.reset()


def _leave(_: Conversation, __: str) -> None:
    raise Leave


_RESET = Command("", "forget the conversation", _reset, piped=True)
_EXIT = Command("", "leave (Ctrl-D)", _leave, piped=True)
_HELP = Command("", "this", _help, piped=True)
COMMANDS = {
    "/help": _HELP,
    "/?": _HELP,
    "/set": Command("NAME VALUE", "change a setting; /set alone lists them", _set, _set_words),
    "/show": Command("", "what is in force", _show),
    "/save": Command("[NAME]", "keep the conversation, for the page too; or at a path", _save, _saved_words),
    "/load": Command("[NAME]", "go on with a conversation, the page's too; /load lists them", _load, _saved_words),
    "/continue": Command("", "go on with an answer that was cut or stopped", _continue),
    "/reset": _RESET,
    "/clear": _RESET,
    "/model": Command("NAME", "go on with another model", _model, _model_words),
    "/tools": Command("", "the tools, and which of them ask", _tools),
    "/exit": _EXIT,
    "/quit": _EXIT,
    "/bye": _EXIT,
}
