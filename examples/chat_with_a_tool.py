"""Chat with a tool of your own: what the model may call, who is asked before it runs, what becomes of the answer.

    python examples/chat_with_a_tool.py                             # the embedded `nano`
    python examples/chat_with_a_tool.py zai-org/GLM-4-9B-0414

A tool is a typed function: its schema is made of the types and the docstring. A turn is a stream of events, the same
that the terminal, `--json`, the HTTP API and the web page draw; calls are parsed, checked and run on the way.
"""

from __future__ import annotations

import sys

from glm4lite import BUILTIN_TOOLS, ChatSession, Tool, tool
from glm4lite.base.events import Done, TextDelta, ToolCallFinished, ToolCallStarted
from glm4lite.text.messages import ToolCall

QUESTIONS = ("How is the weather in Lisbon?", "What is 37 * 24?", "Who are you?")


@tool(needs_approval=True)
def get_weather(city: str) -> str:
    """Current weather in a city.

    Args:
        city: City name.
    """
    if city == "Atlantis":
        raise ValueError("no weather station under water")  # the model is told, and can say so
    return f"18 degrees and sunny in {city}"


def approve(call: ToolCall, asked: Tool) -> bool:
    """A program that people use would ask them here; it may take its time."""
    print(f"  may {asked.name} run with {call.arguments}? yes")
    return True


def main(model: str = "nano") -> None:
    session = ChatSession.load(model, tools=[*BUILTIN_TOOLS, get_weather], approve=approve, temperature=0.0)
    for question in QUESTIONS:  # one conversation: the model sees what was said before
        print(f"> {question}")
        for event in session.send(question):
            match event:
                case ToolCallStarted(name=name, arguments=arguments):
                    print(f"  {name} is called with {arguments}")
                case ToolCallFinished(content=content, error=error):
                    print(f"  it {'failed' if error else 'answered'}: {content}")
                case TextDelta(text=text):
                    print(text, end="", flush=True)
                case Done(new_tokens=count, finish_reason=reason):
                    print(f"\n  ({count} tokens, {reason})")


if __name__ == "__main__":
    main(*sys.argv[1:])
