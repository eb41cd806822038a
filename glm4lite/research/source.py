"""What research asks: a folder, the web, an MCP server, or a class of the user's own with these two methods.

class Wiki:
    name = "wiki"

    def search(self, query: str, most: int) -> list[Hit]: ...
    def open(self, url: str) -> Page | None: ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from glm4lite.base.errors import Glm4liteError


class SourceError(Glm4liteError):
    """A source cannot answer, in one line that the model, and who reads the report, is told. Research goes on."""


@dataclass(frozen=True)
class Hit:
    """One result of a search. `url` is what `open` takes; `at` where in its text the match is, in characters.

    `link` is where a reader of the report finds it, "" where that is `url`.
    """

    title: str
    url: str
    snippet: str = ""
    at: int = 0
    link: str = ""


@dataclass(frozen=True)
class Page:
    """The whole text behind an address. `link` as in Hit; `note` is what the model is told of how it was read."""

    title: str
    url: str
    text: str
    link: str = ""
    note: str = ""


class Source(Protocol):
    """Both methods may be called from several threads at once, and raise SourceError."""

    name: str

    def search(self, query: str, most: int) -> list[Hit]:
        """At most `most` results, the best first; [] also for a source that can only open."""
        ...

    def open(self, url: str) -> Page | None:
        """The page at an address; None where it is none of this source's."""
        ...
