"""Text of others as a terminal may show it."""

from __future__ import annotations

import re

from glm4lite.base.errors import one_line

# What a model or a tool says must not move the cursor, change the title or answer for the user.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` without control characters (line ends and tabs stay), each shown as the replacement character."""
    return CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


def printable_line(text: object) -> str:
    """`text` as a single printable line, for messages that may quote a checkpoint."""
    return printable(one_line(text))
