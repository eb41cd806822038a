"""Other programs' exports of chats in our own form; runs apart (glm4lite/untrusted).

Read are our own JSON (one chat, or the archive of all), ChatGPT's export (conversations.json, or the archive with it),
Open WebUI's (a list of chats, each with a history), and lists of messages in OpenAI's form.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

from glm4lite.base.errors import said_by
from glm4lite.base.sentences import Sentence
from glm4lite.untrusted.documents import Refused
from glm4lite_ui.chats import FORMAT, NEW_TITLE, Chat, Settings, Turn, read_chat
from glm4lite_ui.saved.shared import from_data
from glm4lite_ui.untrusted.messages import (
    MOST_TURNS,
    Skipped,
    from_chatgpt,
    from_list,
    from_open_webui,
    object_of,
    put_turns,
    text_of,
)

LARGEST_JSON = 256 << 20  # bytes of one file, unpacked
LARGEST_TOTAL = 1 << 30  # bytes of all of them
MOST_FILES = 20_000  # of an archive
_TERMINAL = "glm4lite conversation"  # of an earlier version; now it saves in the page's form
LARGEST_CHAT = 16 << 20  # bytes of a chat in our form


def read_chats(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """`{"chat": …}`, `{"skipped": title, "why": …}` and, last, `{"left_out": {what: how many}}`."""
    left_out, found = Counter[str](), False
    for name, text in _texts(file):
        for item in _items(text, name):
            found = True
            title = _title(item)
            try:
                chat = _chat(item, left_out).to_json()
                if len(json.dumps(chat, ensure_ascii=False)) > LARGEST_CHAT:
                    raise Skipped("it is larger than {size} MiB", size=LARGEST_CHAT >> 20)
                yield {"chat": chat}
            except Skipped as skipped:
                yield {"skipped": title, "why": said_by(skipped).to_json()}
            except (MemoryError, RecursionError):
                yield {"skipped": title, "why": Sentence("it is too large or nested too deeply").to_json()}
    if not found:
        raise Refused("it holds no chats")
    yield {"left_out": dict(left_out)}


def _texts(file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """The JSON files in it, or itself."""
    begins = file.read(4)
    file.seek(0)
    if begins[:2] != b"PK":
        yield "", _decoded(file.read(LARGEST_JSON + 1), "")
        return
    with zipfile.ZipFile(file) as archive:
        members = [one for one in archive.infolist() if one.filename.endswith(".json") and not one.is_dir()]
        # ChatGPT's archive holds other JSON beside the chats, which no user would miss.
        theirs = [one for one in members if re.search(r"(^|/)conversations[^/]*\.json$", one.filename)]
        if len(members) > MOST_FILES:
            raise Refused("it holds {count} files; at most {most} are read", count=len(members), most=MOST_FILES)
        left = LARGEST_TOTAL
        for member in theirs or members:
            with archive.open(member) as opened:
                data = opened.read(min(LARGEST_JSON, left) + 1)
            left -= len(data)
            if left < 0:
                raise Refused("it takes more than {size} GiB when it is unpacked", size=LARGEST_TOTAL >> 30)
            yield member.filename, _decoded(data, member.filename)


def _decoded(data: bytes, name: str) -> str:
    if len(data) > LARGEST_JSON:
        raise _about(name, Sentence("it takes more than {size} MiB", size=LARGEST_JSON >> 20))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _about(name, Sentence("it is no JSON in UTF-8")) from None


def _items(text: str, name: str) -> Iterator[Any]:
    """The chats of a file, one at a time: the items of a list, or one behind the other."""
    place, decoder = _next(text, 0), json.JSONDecoder()
    listed = text[place : place + 1] == "["
    place = _next(text, place + 1) if listed else place
    while place < len(text) and text[place] != "]":
        try:
            item, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            deep, damaged = (
                Sentence("it is nested too deeply"),
                Sentence("it is no JSON at character {place}", place=place),
            )
            raise _about(name, deep if isinstance(error, RecursionError) else damaged) from None
        yield item
        place = _next(text, place)
        if listed and text[place : place + 1] == ",":
            place = _next(text, place + 1)
    if listed and place >= len(text):
        raise _about(name, Sentence("it ends in the middle of its chats"))


def _about(name: str, why: Sentence) -> Refused:
    """Of a file in an archive, under its name."""
    return Refused("{name}: {why}", name=name, why=why) if name else Refused(why)


def _next(text: str, place: int) -> int:
    found = re.compile(r"[^ \t\r\n]").search(text, place)
    return found.start() if found else len(text)


def _chat(item: Any, left_out: Counter[str]) -> Chat:
    if not isinstance(item, dict):
        raise Skipped("it is no chat")
    if item.get("format") == _TERMINAL:
        return _own(_of_terminal(item))
    if "format" in item:
        return _own(item)
    inner = object_of(item, "chat") or item
    if isinstance(item.get("mapping"), dict):
        source = from_chatgpt(item, left_out)
    elif isinstance(history := object_of(inner, "history").get("messages"), dict):
        source = from_open_webui(inner, history, left_out)
    elif isinstance(messages := inner.get("messages"), list):
        source = from_list(messages, left_out)
    else:
        raise Skipped("it is in no form that is known here")
    chat = Chat(title=_title(item), settings=Settings(system=source.system))
    _put_times(chat, item, inner)
    chat.pinned = item.get("pinned") is True
    put_turns(chat, source, left_out)
    chat.id = _same_id(item, chat)
    if chat.title == NEW_TITLE:
        chat.name_after_first_turn()
    return read_chat(json.loads(json.dumps(chat.to_json()).encode("utf-8", "replace")))


def _of_terminal(item: dict[str, Any]) -> dict[str, Any]:
    """What an earlier terminal saved, in the form that both have now."""
    messages = item.get("messages")
    said = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    system = next((text_of(message, "content") for message in said if message.get("role") == "system"), "")
    asked = next((text_of(message, "content") for message in said if message.get("role") == "user"), "")
    made = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
    settings = object_of(item, "settings") | {"system": system}
    chat = Chat.of(Turn(asked), id=made)
    chat.name_after_first_turn()
    return {"format": FORMAT, "id": made, "title": chat.title, "settings": settings, "messages": messages}


def _own(item: dict[str, Any]) -> Chat:
    try:
        if len(item.get("tree") or item.get("turns") or ()) > MOST_TURNS:
            raise Skipped("it has more than {count} turns", count=MOST_TURNS)
        chat = from_data(item)
        json.dumps(chat.to_json(), ensure_ascii=False).encode()
    except (ValueError, TypeError) as error:
        raise Skipped("it cannot be read: {why}", why=said_by(error)) from None
    if not re.fullmatch(r"[0-9a-f]{16}", chat.id):
        raise Skipped("its id is none of glm4lite's")
    chat.settings.always.clear()  # what another file says was allowed was not allowed here
    return chat


def _put_times(chat: Chat, *described: dict[str, Any]) -> None:
    def first(*names: str) -> float | None:
        for one in described:
            for name in names:
                value = one.get(name)
                if isinstance(value, int | float) and 0 < value < 1e14:
                    return value / 1000 if value > 1e11 else float(value)  # some count milliseconds
        return None

    chat.created = first("create_time", "created_at", "timestamp") or time.time()
    chat.updated = first("update_time", "updated_at") or chat.created


def _title(item: Any) -> str:
    title = text_of(item, "title") or text_of(object_of(item, "chat"), "title")
    clean = " ".join(title.encode("utf-8", "replace").decode().split())
    return clean[:120] or NEW_TITLE


def _same_id(item: dict[str, Any], chat: Chat) -> str:
    """The same at each import of a chat, so that it is not there twice."""
    own = text_of(item, "conversation_id") or text_of(item, "id")
    said = own or json.dumps([chat.title, [(turn.user, [part.text for part in turn.parts]) for turn in chat.tree]])
    return hashlib.sha256(said.encode("utf-8", "replace")).hexdigest()[:16]
