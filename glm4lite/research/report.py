"""A report as Markdown: its citations become links, and those of what was never read are marked.

【3†Tides】      [3](https://…)                 a page that was opened
【4†Moon】       [4](https://…) (not opened)    only a search named it
【9†Sun】        [9: no such source]            the model made it up
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

from glm4lite.base.errors import one_line
from glm4lite.research.browser import Browser, Found

_CITATION = re.compile(r"【\s*(\d{1,6})\s*(?:†[^【】\n]{0,300})?】")
_LOADED = re.compile(
    r"!(?=\[)|<(?=(?:img|picture|svg|video|audio|source|iframe|object|embed|link|style|script|input)\b)", re.IGNORECASE
)
_LONGEST = 320  # characters in which a citation ends
_SIGNS = re.compile(r"([\\`*_{}\[\]()#+!|<>~&-])")
_SAFE = "/:?#[]@!$&'()*+,;=%~._-"


@dataclass(frozen=True)
class Cited:
    """A source of a report. `opened`: its text was read, not only a line of a search."""

    number: int
    title: str
    link: str
    opened: bool


@dataclass(frozen=True)
class Report:
    """What research gave. `text` is Markdown; `sources` are those it cites, then others that were read.

    `complete` is False where it was stopped, or cut at a limit: what it says then ends in the middle, or is nothing.
    """

    question: str
    text: str
    sources: tuple[Cited, ...] = ()
    complete: bool = True

    def markdown(self) -> str:
        """The report with the list of its sources.

        Nothing in it is loaded by what shows it: a page may have talked the model into a picture whose address tells
        a stranger what was read. Pictures become links.
        """
        text = _LOADED.sub(lambda sign: f"&#{ord(sign[0])};", self.text.strip())
        return f"{text or f'# {one_line(self.question, 500)}'}\n{self.listed()}"

    def listed(self) -> str:
        """The sources as a Markdown list under a heading; "" where there are none."""
        if not self.sources:
            return ""
        lines = (
            f"- {source.number}: {_linked(_escaped(source.title), source.link)}"
            f"{'' if source.opened else ' (not opened)'}\n"
            for source in self.sources
        )
        return f"\n## Sources\n\n{''.join(lines)}"


class Citations:
    """Turns the citations of a text into links while it comes; what may become one is held back."""

    def __init__(self, numbered: Callable[[int], Found | None]) -> None:
        self._numbered, self._held = numbered, ""
        self.cited = dict[int, None]()  # numbers that stand for something, in the order of the text

    def feed(self, text: str) -> str:
        """What is certain of the text so far and was not given yet."""
        held, self._held = self._held + text, ""
        start = held.rfind("【")
        if start >= 0 and "】" not in held[start:] and len(held) - start < _LONGEST:
            held, self._held = held[:start], held[start:]
        return self.linked(held)

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return self.linked(held)

    def linked(self, text: str) -> str:
        """A whole text with its links."""
        return _CITATION.sub(self._link, text)

    def _link(self, citation: re.Match[str]) -> str:
        number = int(citation[1])
        found = self._numbered(number)
        if found is None:
            return f"[{number}: no such source]"
        self.cited[number] = None
        return f"{_linked(str(number), found.link)}{'' if found.opened else ' (not opened)'}"


def sources_of(browser: Browser, cited: Citations) -> tuple[Cited, ...]:
    """The cited sources in the order of the text, then those that were opened and are not cited."""
    numbers = [*cited.cited, *(one.number for one in browser.found.values() if one.opened)]
    found = [browser.numbered(number) for number in dict.fromkeys(numbers)]
    return tuple(Cited(one.number, one.title, one.link, one.opened) for one in found if one is not None)


def _escaped(title: str) -> str:
    """A stranger's text that Markdown shows as it is, in one line."""
    return _SIGNS.sub(r"\\\1", one_line(title, 200))


def _linked(text: str, link: str) -> str:
    """A link that Markdown takes for one whatever is in it; only the text where nothing opens such an address."""
    openable = re.match(r"(?i)(https?|file|doc|mcp):", link)
    return f"[{text}](<{quote(link, safe=_SAFE)}>)" if openable else f"[{text}]"
