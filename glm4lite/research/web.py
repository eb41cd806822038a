"""The web as a source: a SearXNG server searches it, pages are fetched from where that is allowed (fetching.py).

    web = Web("http://127.0.0.1:8888")                # searches there, opens public pages
    web = Web(None, allow=["wiki.example"])           # cannot search; opens pages of that host alone

SearXNG answers in JSON where its settings.yml says `search: {formats: [html, json]}`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

import httpx2

from glm4lite.base.errors import one_line, shown
from glm4lite.base.files import parse_json
from glm4lite.research.documents import of_charset, read_document
from glm4lite.research.fetching import Fetched, Fetcher, Named
from glm4lite.research.source import Hit, Page, SourceError

_LARGEST_RESULTS = 4 << 20  # bytes of a search's answer
_LONGEST_QUERY = 500
_LONGEST_TITLE, _LONGEST_SNIPPET, _LONGEST_URL = 200, 400, 2000
_HTML = ("text/html", "application/xhtml+xml")


class Web:
    """`search` is a SearXNG server's address, None where nothing can be searched; `allow` are hosts, which may lie in
    the user's own network. Raises SourceError for what is neither.
    """

    name = "web"

    def __init__(self, search: str | None, allow: Iterable[str] = (), seconds: float = 20.0) -> None:
        self._search = None if search is None else _endpoint(search)
        self._pages = Fetcher(search is not None, map(Named.of, allow), seconds)
        # The search server may lie anywhere, its pages are no pages: a result cannot lead there.
        self._results = Fetcher(False, [Named.of(search)] if search else (), seconds)

    def search(self, query: str, most: int) -> list[Hit]:
        if self._search is None:
            return []
        asked = self._search.copy_merge_params({"q": query[:_LONGEST_QUERY], "format": "json"})
        try:
            answer = self._results.fetch(str(asked), "application/json", _LARGEST_RESULTS)
        except SourceError as error:
            unset = str(error).endswith(" 403")
            hint = "; it must answer in JSON: search.formats in its settings.yml" if unset else ""
            raise SourceError(f"the search failed: {error}{hint}") from None
        return list(_hits(answer))[:most]

    def open(self, url: str) -> Page | None:
        if not url.lower().startswith(("http:", "https:")):
            return None
        answer = self._pages.fetch(url)
        kind = _kind(answer)
        data = of_charset(answer.data, answer.charset) if answer.charset and kind != "pdf" else answer.data
        if kind == "pdf" and not answer.whole:
            raise SourceError(f"{one_line(url, 200)} is larger than {len(answer.data) >> 20} MiB")
        try:
            document = read_document(data, kind)
        except SourceError as error:
            raise SourceError(f"{one_line(url, 200)}: {error}") from None
        note = document.note if answer.whole else "only the beginning of it was read"
        return Page(document.title or answer.url, answer.url, document.text, note=note)


def _endpoint(search: str) -> httpx2.URL:
    try:
        url = httpx2.URL(search)
        usable = url.scheme in ("http", "https") and Named.of(search).host and not url.userinfo
    except (httpx2.InvalidURL, ValueError, TypeError, SourceError):
        usable = False
    if not usable:
        raise SourceError(f"--search {one_line(search, 200)}: give a SearXNG server, such as http://127.0.0.1:8888")
    return url if url.path.endswith("/search") else url.copy_with(path=f"{url.path.rstrip('/')}/search", query=None)


def _hits(answer: Fetched) -> Iterable[Hit]:
    """The results of a right answer. A server that answers otherwise is told by what was found instead."""
    if not answer.whole:
        raise SourceError(f"the search server sent more than {_LARGEST_RESULTS >> 20} MiB")
    try:
        said = parse_json(answer.data)
    except (ValueError, UnicodeDecodeError) as error:
        raise SourceError(
            f"the search server sent no JSON ({one_line(error, 200)}); search.formats of its settings.yml must name it"
        ) from None
    results = said.get("results") if isinstance(said, dict) else None
    if not isinstance(results, list):
        raise SourceError(f"the search server sent no list of results, but {shown(said)}")
    for result in results:
        url = result.get("url") if isinstance(result, dict) else None
        if _is_page(url):
            title = _text(result, "title", _LONGEST_TITLE) or url
            yield Hit(title, url, _text(result, "content", _LONGEST_SNIPPET))


def _is_page(url: object) -> TypeGuard[str]:
    """An address that stays what it is in one line."""
    if not isinstance(url, str) or not url.isprintable() or len(url) > _LONGEST_URL:
        return False
    return url.startswith(("http://", "https://"))


def _text(result: Any, key: str, most: int) -> str:
    """A field of a result as one line; "" where it is no text."""
    value = result.get(key) if isinstance(result, dict) else None
    return one_line(value, most) if isinstance(value, str) else ""


def _kind(answer: Fetched) -> str:
    if answer.data[:1024].lstrip().startswith(b"%PDF-"):
        return "pdf"
    if answer.type in _HTML or (not answer.type and b"<" in answer.data[:1024]):
        return "html"
    if answer.type.startswith("text/") or answer.type in ("", "application/json", "application/xml"):
        return "text"
    raise SourceError(f"{one_line(answer.url, 200)} is {one_line(answer.type, 100)}, which is no text")
