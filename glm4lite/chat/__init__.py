"""Text and events over the engine: conversations, tool calls, completions."""
