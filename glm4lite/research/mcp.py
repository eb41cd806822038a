"""An MCP server that searches, as a source.

Of its tools two are called: `search`, with a text, and `fetch`, with the id of a result. Their answers are those that
ChatGPT's connectors agreed on: `{"results": [{"id", "title", "url"}]}` and `{"id", "title", "text", "url"}`. An answer
that is no such JSON is taken as the text that was found.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any
from urllib.parse import quote

from glm4lite.base.errors import ToolError, one_line
from glm4lite.base.files import parse_json
from glm4lite.research.source import Hit, Page, SourceError
from glm4lite.tools.running import ToolResult
from glm4lite.tools.tool import Tool

SCHEME = "mcp:"
_MOST_KEPT = 1000  # results that can still be opened
_MOST_ANSWER = 2_000_000  # characters


class McpSource:
    """Asks one server's tools. Raises SourceError where none of them searches."""

    def __init__(self, origin: str, tools: Iterable[Tool]) -> None:
        self.name = origin.removeprefix("MCP server ")
        offered = {tool.name.rpartition("__")[2]: tool for tool in tools}
        if "search" not in offered:
            raise SourceError(f"the MCP server {self.name!r} has no tool called search, so it is no source")
        self._find, self._fetch = offered["search"], offered.get("fetch")
        for tool in filter(None, (self._find, self._fetch)):
            if tool.asks({}):
                raise SourceError(
                    f"{tool.full_name} may write, as far as it says, and nobody is asked here; --approve all allows it"
                )
        self._results: dict[str, tuple[str, Page]] = {}  # address -> (id or "", what the search said of it)
        self._lock = threading.Lock()

    def search(self, query: str, most: int) -> list[Hit]:
        answer = self._call(self._find, query)
        results = answer.get("results") if isinstance(answer, dict) else answer
        if not isinstance(results, list):
            said = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
            return [self._taken("", one_line(f"{self.name}: {query}", 200), "", said)] if said.strip() else []
        hits = []
        for result in results[:most]:
            if isinstance(result, dict):
                known = str(result.get("id", result.get("url", "")))
                title, link = one_line(str(result.get("title") or known), 200), str(result.get("url") or "")
                hits.append(self._taken(known, title, link, str(result.get("text") or result.get("snippet") or "")))
        return hits

    def open(self, url: str) -> Page | None:
        with self._lock:
            known = self._results.get(url)
        if known is None:
            if url.startswith(f"{SCHEME}{quote(self.name)}/"):
                raise SourceError(f"{self.name} gave no such result")
            return None
        identity, page = known
        if self._fetch is None or not identity:
            if not page.text.strip():
                raise SourceError(f"{self.name} has no text for {page.title}")
            return page
        answer = self._call(self._fetch, identity)
        text = answer.get("text") if isinstance(answer, dict) else answer
        title = answer.get("title") if isinstance(answer, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise SourceError(f"{self.name} has no text for {one_line(identity, 100)}")
        return Page(one_line(title, 200) if isinstance(title, str) else page.title, url, text, page.link)

    def _taken(self, identity: str, title: str, link: str, text: str) -> Hit:
        """A result under an address of this source, so that opening it asks the server and not the web."""
        told = "\n".join((identity, title, link)).encode("utf-8", "replace")
        digest = hashlib.sha256(told).hexdigest()[:12]
        url = f"{SCHEME}{quote(self.name)}/{digest}"
        safe = link if link.startswith(("http://", "https://")) and link.isprintable() else ""
        with self._lock:
            self._results[url] = identity, Page(title, url, text, safe)
            while len(self._results) > _MOST_KEPT:
                del self._results[next(iter(self._results))]
        return Hit(title, url, one_line(text, 400), link=safe)

    def _call(self, tool: Tool, text: str) -> Any:
        """What a tool answers: JSON data, else text."""
        names = list(tool.parameters.get("required", ()) or tool.parameters.get("properties", ()))
        if not names:
            raise SourceError(f"{tool.full_name} takes no text")
        try:
            result = tool.function(**{names[0]: text})
        except ToolError as error:
            raise SourceError(str(error)) from None
        content = result.content if isinstance(result, ToolResult) else str(result)
        if isinstance(result, ToolResult) and result.error:
            raise SourceError(f"{tool.full_name}: {one_line(content, 300)}")
        try:
            return parse_json(content[:_MOST_ANSWER].encode("utf-8", "replace"))
        except ValueError:
            return content[:_MOST_ANSWER]


def mcp_sources(tools: Sequence[Tool]) -> list[McpSource]:
    """One source for each server that the tools are of. Raises SourceError for one that does not search."""
    by_server = sorted(tools, key=lambda tool: tool.origin)
    return [McpSource(origin, group) for origin, group in groupby(by_server, key=lambda tool: tool.origin)]
