"""The `python` tool: runs code the model wrote, in a process with limits. Off by default, and always asks."""

import functools
import logging
from dataclasses import replace

from glm4lite.base.errors import ToolError
from glm4lite.tools.running import ToolResult, abandoned
from glm4lite.tools.sandbox.process import Limits, run_python
from glm4lite.tools.tool import Tool, tool

logger = logging.getLogger("glm4lite")


@tool(needs_approval=True)
def python(code: str) -> ToolResult:
    """Run a Python program without network or access to files, and return what it prints.

    Args:
        code: The program; it must print what is wanted.
    """
    outcome = run_python(code, Limits(), abandoned())
    lines = [f"Error: {outcome.failure}"] if outcome.failure else []
    lines += [outcome.output.rstrip("\n") or "(nothing was printed)"]
    if outcome.missing:
        lines.append(f"[not limited on this system: {', '.join(outcome.missing)}]")
    return ToolResult("\n".join(lines), error=bool(outcome.failure))


@functools.cache
def python_tool() -> Tool:
    """`python`, once it is known that it can run here; a limit that this system lacks is said with each question."""
    try:
        missing = run_python("").missing
    except ToolError as error:
        raise ToolError(f"--tools python: {error}") from error
    if not missing:
        return python
    caution = f"python: this system cannot limit: {', '.join(missing)}. Read the code before you allow it."
    logger.warning(caution)
    return replace(python, caution=caution)
