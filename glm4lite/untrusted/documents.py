"""The text of a document. These functions run apart (process.py); each yields one object: text, form, and what else the
user is told of how it was read."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any
from xml.parsers import expat

from glm4lite.base.errors import Glm4liteError, said_by
from glm4lite.base.sentences import Sentence

MOST_PAGES = 2000
LONGEST = 4_000_000  # characters of a text; the longest context, a million tokens, is about as long
_LARGEST_PART = 64 << 20  # bytes of the text of a Word file, unpacked
_LARGEST_NOTEBOOK = 32 << 20
_LARGEST_PAGE = 4 << 20  # bytes of HTML
_CHARSET = re.compile(rb"<meta[^>]{0,300}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE)
_AROUND = "script, style, noscript, template, svg, iframe, object, form, nav, aside, dialog, footer, body > header"
_SHOWN_OUTPUT = 2000  # characters of one result in a notebook


class Refused(Glm4liteError):
    """Why the file is not read, in one line that does not name it."""


def _found(text: str, form: str, **more: Any) -> Iterator[dict[str, Any]]:
    if len(text) > LONGEST:
        raise Refused("it holds more than {count} characters, which no context takes", count=LONGEST)
    if not text.strip():
        raise Refused("it holds no text")
    yield {"text": text, "form": form, **more}


def _pdf() -> Callable[[IO[bytes]], Iterator[dict[str, Any]]]:
    from glm4lite.base.extras import require

    require("reading a PDF", "pypdf", extra="documents")
    import pypdf

    def read(file: IO[bytes]) -> Iterator[dict[str, Any]]:
        reader = pypdf.PdfReader(file)
        if reader.is_encrypted and not reader.decrypt(""):
            raise Refused("it is protected by a password")
        count = len(reader.pages)
        if count > MOST_PAGES:
            raise Refused("it has {count} pages; at most {most} are read", count=count, most=MOST_PAGES)
        pages, length = list[str](), 0
        for page in reader.pages:
            pages.append(page.extract_text().strip())
            length += len(pages[-1])
            if length > LONGEST:
                break
        if not any(pages):
            raise Refused("its pages are pictures and hold no text; the model reads text only")
        yield from _found("\n\n".join(pages), "PDF", pages=count)

    return read


def _office() -> Callable[[IO[bytes]], Iterator[dict[str, Any]]]:
    """A zip archive: a Word file, or what else to do with it."""
    others = {
        "xl/workbook.xml": Sentence("it is a spreadsheet; save it as CSV"),
        "ppt/presentation.xml": Sentence("it is a presentation; save it as PDF"),
        "content.xml": Sentence("it is an OpenDocument file; save it as Word or PDF"),
        "META-INF/container.xml": Sentence("it is a book; save it as PDF or text"),
    }

    def read(file: IO[bytes]) -> Iterator[dict[str, Any]]:
        with zipfile.ZipFile(file) as archive:
            names = set(archive.namelist())
            if "word/document.xml" not in names:
                archived = Sentence("it is an archive; unpack it")
                raise Refused(next((said for name, said in others.items() if name in names), archived))
            with archive.open("word/document.xml") as part:
                document = part.read(_LARGEST_PART + 1)
        if len(document) > _LARGEST_PART:
            raise Refused("its text takes more than {size} MiB when it is unpacked", size=_LARGEST_PART >> 20)
        yield from _found(_WordText().read(document), "Word")

    return read


class _WordText:
    """The paragraphs of a WordprocessingML document (ECMA-376, part 1) as Markdown: headings, lists, rows of tables."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._line, self._before = "", ""  # of the paragraph that is read, and what marks it
        self._cells: list[list[str]] = []  # of the rows that are open, one in the other
        self._hidden = 0  # depth inside of what stands twice: the form for older programs
        self._in_text = False

    def read(self, document: bytes) -> str:
        """Entities and other declarations, with which XML can grow without bound, have no place in a Word file."""
        parser = expat.ParserCreate(namespace_separator=" ")
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = self._say, self._refuse
        parser.buffer_text = True
        parser.Parse(document, True)
        return "\n".join(self._lines).strip()

    def _refuse(self, *_: Any) -> None:
        raise Refused("its XML declares a document type, which no Word file does")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition(" ")[2]
        value = next((value for key, value in attributes.items() if key.endswith(" val")), "")
        if name == "Fallback" or self._hidden:
            self._hidden += 1
        elif name == "t":
            self._in_text = True
        elif name in ("tab", "br", "cr"):
            self._line += "\t" if name == "tab" else "\n"
        elif name == "pStyle" and (level := re.fullmatch(r"(?i)heading\s?([1-6])|(title)", value)):
            self._before = "#" * int(level[1] or 1) + " "
        elif name == "numPr":
            self._before = self._before or "- "
        elif name == "tr":
            self._cells.append([])
        elif name == "tc" and self._cells:
            self._cells[-1].append("")

    def _end(self, name: str) -> None:
        name = name.rpartition(" ")[2]
        if self._hidden:
            self._hidden -= 1
        elif name == "t":
            self._in_text = False
        elif name == "p":
            self._end_paragraph()
        elif name == "tr" and self._cells:
            self._put("| " + " | ".join(cell.strip() for cell in self._cells.pop()) + " |")

    def _end_paragraph(self) -> None:
        line, self._line, self._before = self._before + self._line if self._line.strip() else "", "", ""
        self._put(line)

    def _put(self, line: str) -> None:
        if self._cells and self._cells[-1]:
            self._cells[-1][-1] += " " + line.replace("\n", " ")
        else:
            self._lines.append(line)

    def _say(self, text: str) -> None:
        if self._in_text and not self._hidden:
            self._line += text


def _notebook() -> Callable[[IO[bytes]], Iterator[dict[str, Any]]]:
    def read(file: IO[bytes]) -> Iterator[dict[str, Any]]:
        data = file.read(_LARGEST_NOTEBOOK + 1)
        if len(data) > _LARGEST_NOTEBOOK:
            raise Refused("it is larger than {size} MiB; clear its outputs", size=_LARGEST_NOTEBOOK >> 20)
        try:
            notebook = json.loads(data)
        except ValueError:
            raise Refused("it is no notebook: it is not JSON") from None
        cells = _field(notebook, "cells", list) or _field(
            (_field(notebook, "worksheets", list) or [{}])[0], "cells", list
        )
        if not cells:
            raise Refused("it is no notebook, or has no cells")
        described = _field(_field(notebook, "metadata", dict), "language_info", dict)
        language = re.sub(r"\W", "", _field(described, "name", str) or "python")
        yield from _found(
            "\n\n".join(filter(None, (_cell(cell, language) for cell in cells))), "notebook", cells=len(cells)
        )

    return read


def _field(value: Any, name: str, kind: type) -> Any:
    """What stands under the name, or an empty one of its kind."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, kind) else kind()


def _cell(cell: Any, language: str) -> str:
    source = _lines_of(cell, "source") or _lines_of(cell, "input")
    if _field(cell, "cell_type", str) != "code":
        return source.strip()
    pieces = [_fenced(source.strip("\n"), language)] if source.strip() else []
    for output in _field(cell, "outputs", list):
        data = _field(output, "data", dict)
        text = _lines_of(output, "text") or _lines_of(data, "text/plain") or _field(output, "evalue", str)
        if text.strip():
            cut = text if len(text) <= _SHOWN_OUTPUT else f"{text[:_SHOWN_OUTPUT]}\n[cut: {len(text):,} characters]"
            pieces.append("Output:\n" + _fenced(cut.strip("\n"), ""))
    return "\n\n".join(pieces)


def _lines_of(value: Any, name: str) -> str:
    """A text, or a list of its lines."""
    return _field(value, name, str) or "".join(line for line in _field(value, name, list) if isinstance(line, str))


def _fenced(code: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`{3,}", code)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _text() -> Callable[[IO[bytes]], Iterator[dict[str, Any]]]:
    from glm4lite.text.encodings import decoded

    def read(file: IO[bytes]) -> Iterator[dict[str, Any]]:
        data = file.read(4 * LONGEST + 1)
        if len(data) > 4 * LONGEST:
            raise Refused("it holds more than {count} characters, which no context takes", count=LONGEST)
        try:
            text, encoding = decoded(data)
        except ValueError as error:
            raise Refused(said_by(error)) from None
        yield from _found(text, "text", encoding=encoding.to_json())

    return read


def _html() -> Callable[[IO[bytes]], Iterator[dict[str, Any]]]:
    """A page's text, a line for each of its blocks, without what stands around it on every page of a site."""
    from glm4lite.base.extras import require

    require("reading HTML", "justhtml", extra="documents")
    import justhtml

    from glm4lite.text.encodings import decoded, named

    def read(file: IO[bytes]) -> Iterator[dict[str, Any]]:
        data = file.read(_LARGEST_PAGE + 1)
        whole, data = len(data) <= _LARGEST_PAGE, data[:_LARGEST_PAGE]
        # justhtml knows no Chinese, Japanese or Korean encodings, and takes UTF-8 that is not named for Latin.
        charset = _CHARSET.search(data, 0, 4096)
        text = None if charset is None else named(data, charset[1].decode())
        try:
            text = decoded(data)[0] if text is None else text
        except ValueError as error:
            raise Refused(said_by(error)) from None
        # Only its text is taken, so nothing in it needs to be made harmless.
        page = justhtml.JustHTML(text, sanitize=False, transforms=[justhtml.Drop(_AROUND)])
        title = page.query_one("title")
        content = next((one for name in ("main", "body") if (one := page.query_one(name)) is not None), page.root)
        text = content.to_text(separator="\n", separator_blocks_only=True)[:LONGEST]
        yield from _found(text, "HTML", title="" if title is None else title.to_text(), whole=whole)

    return read


READERS = {"pdf": _pdf, "office": _office, "notebook": _notebook, "html": _html, "text": _text}
