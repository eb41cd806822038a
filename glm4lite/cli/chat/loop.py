"""What is typed, line by line: questions to the model, commands to the program."""

from __future__ import annotations

from glm4lite.base.errors import Glm4liteError, one_line
from glm4lite.cli.chat import slash_commands
from glm4lite.cli.chat.conversation import Conversation
from glm4lite.cli.chat.keyboard import Keyboard, Typed, unquoted
from glm4lite.cli.chat.mentions import with_files


def converse(conversation: Conversation, keyboard: Keyboard) -> None:
    """Reads until /exit or the end of input. An error of one turn does not end the conversation."""
    help_line = slash_commands.SHORT_HELP if conversation.by_hand else slash_commands.PIPED_HELP
    conversation.renderer.remark(help_line)
    while True:
        try:
            typed = keyboard.read()
        except KeyboardInterrupt:
            conversation.renderer.remark(help_line)
            continue
        if typed is None:
            return
        try:
            _take(conversation, typed)
        except slash_commands.Leave:
            return
        except Glm4liteError as error:
            conversation.renderer.remark(f"error: {one_line(error)}")
        except KeyboardInterrupt:
            conversation.renderer.remark("(interrupted)")


def _take(conversation: Conversation, typed: Typed) -> None:
    text = typed.text.strip()
    if typed.by_hand and "\n" in text:  # the first line of code keeps its indentation
        text = typed.text.strip("\n").rstrip()
    command = slash_commands.of(text, typed.by_hand)
    if command is not None:
        command[0].run(conversation, command[1])
    elif text and not slash_commands.is_misspelt(text, typed.by_hand, conversation.renderer):
        if typed.by_hand:
            text = with_files(unquoted(text), typed.pasted, conversation.renderer.remark)
        conversation.ask(text)
