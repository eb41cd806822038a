"""Files named in a question: `@notes.txt`, `@"my notes.txt"`; `@@` writes an @.

Only what the user types or gives with -p is looked through: what is piped, pasted in several lines, or said by a model
or a tool names no file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from glm4lite.base.errors import Glm4liteError
from glm4lite.cli.paths import paths
from glm4lite.text.text_files import TextFile, read_text_file

MAX_TOTAL = 8 << 20  # characters of all files of one question

# At the start of a word, so that a@b.c is none; "(" and "[" may stand before it.
_MENTION = re.compile(r"""(?<![^\s(\[])@(?:(?P<at>@)|"(?P<quoted>[^"\n]+)"|(?P<bare>[^\s@"'`]\S*))""")
_CALL = re.compile(r"\w+(?:\.\w+)*\(")  # a decorator: @app.route("/")
_AFTER = ",.;:!?)]}>\"'…，。；：！？）】》"
_UNFINISHED = re.compile(r"""(?<![^\s(\[])@(?:"(?P<quoted>[^"\n]*)|(?P<bare>[^\s@"'`]\S*)?)\Z""")


def with_files(text: str, pasted: Sequence[str] = (), remark: Callable[[str], None] = lambda _: None) -> str:
    """The question, and below it each file it names, once; the names stay in it without their @.

    `pasted` are parts of the text that name none. Raises TextFileError for a file that is missing or no text, and
    Glm4liteError for too much of it.
    """
    files: dict[Path, TextFile] = {}

    def found(match: re.Match[str]) -> str:
        if match["at"]:
            return "@"
        path, rest = _named(match["quoted"], match["bare"])
        if path is None:
            return match[0]
        if path not in files:
            files[path] = _read(path, remark)
        return f"{match['quoted'] or str(match['bare']).removesuffix(rest)}{rest}"

    said = "".join(part if part in pasted else _MENTION.sub(found, part) for part in _parts(text, pasted))
    if sum(len(file.text) for file in files.values()) > MAX_TOTAL:
        raise Glm4liteError(f"the files make more than {MAX_TOTAL >> 20} Mi characters; name fewer")
    return "\n\n".join([said, *(file.quoted() for file in files.values())])


def _parts(text: str, pasted: Sequence[str]) -> list[str]:
    """The text cut around what was pasted."""
    whole = sorted(filter(None, pasted), key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, whole))})", text) if whole else [text]


def _named(quoted: str | None, bare: str | None) -> tuple[Path | None, str]:
    """The file that is meant, None where none is, and what stands behind its name in the word."""
    if quoted is not None:
        return Path(quoted).expanduser(), ""
    word = bare or ""
    name = word.rstrip(_AFTER)
    for candidate in (word, name):
        if candidate and _is_file(candidate):
            return Path(candidate).expanduser(), word[len(candidate) :]
    looks_like_one = any(sign in name for sign in "./\\~") and not _CALL.match(word)
    return (Path(name).expanduser(), word[len(name) :]) if name and looks_like_one else (None, "")


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a user who does not exist
        return False


def _read(path: Path, remark: Callable[[str], None]) -> TextFile:
    try:
        file = read_text_file(path)
    except Glm4liteError as error:
        raise type(error)(f"{error} (@@ writes an @ that names no file)") from None
    if file.encoding:
        remark(f"({file.name} is read as {file.encoding})")
    return file


def completions(before: str) -> Iterator[tuple[str, int]]:
    """For the text before the cursor that ends in `@` and the beginning of a path: (text to put, where, <= 0)."""
    match = _UNFINISHED.search(before)
    if match is None:
        return
    typed = match["quoted"] if match["quoted"] is not None else match["bare"] or ""
    for name in paths(typed):
        quoted = match["quoted"] is not None or re.search(r"\s", name)
        closed = quoted and not name.endswith("/")
        yield (f'"{name}' + ('"' if closed else "") if quoted else name), match.start() + 1 - len(before)
