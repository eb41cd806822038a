"""A chat as the page draws it: turns, parts and blocks, as values of JSON.

Whatever somebody wrote is either text, which the page shows as text, or a list of blocks of HTML that came through
markdown.py's sanitizer. A turn that grows is compared with what a window has of it, and only the difference is sent.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Collection, Sequence
from itertools import zip_longest
from typing import Any

from glm4lite.base.sentences import Sentence
from glm4lite_ui.answering import Answer, Asking
from glm4lite_ui.chats import Chat, Part, Turn, to_json
from glm4lite_ui.markdown import Growing, blocks, code

SHOWN = 30  # turns that are drawn at first, and with every "Show earlier"
CODE_ARGUMENTS = ("code", "script", "source", "program")
Json = dict[str, Any]


class TurnView:
    """A turn as JSON, again and again while it grows."""

    def __init__(self) -> None:
        self._growing: tuple[Part, Growing] | None = None  # the last part, while it is being written

    def parts(self, turn: Turn, under_way: bool, written: Collection[Part] = ()) -> list[Json]:
        """`written`: calls that are being written, whose arguments are not whole yet."""
        shown = [part for part in list(turn.parts) if part.kind != "text" or part.text.strip()]
        return [self._part(part, under_way, any(part is one for one in written)) for part in shown]

    def _part(self, part: Part, under_way: bool, written: bool) -> Json:
        open_now = under_way and part.seconds is None
        head: Json = {"kind": part.kind, "open": open_now, "seconds": part.seconds}
        if part.kind == "call":
            head |= {
                "written": written,
                "name": part.name,
                "failed": part.error,
                "not_run": part.seconds is None and not under_way,
            }
            if written:
                return {"head": head, "blocks": [code(part.arguments)], "results": 0}
            result = [code(part.text)] if part.seconds is not None else []
            return {"head": head, "blocks": [*arguments_blocks(part.arguments), *result], "results": len(result)}
        if not open_now:
            return {"head": head, "blocks": list(blocks(part.text))}
        if self._growing is None or self._growing[0] is not part:
            self._growing = part, Growing()
        return {"head": head, "blocks": self._growing[1].blocks(part.text)}


@functools.lru_cache(256)
def arguments_blocks(arguments: str) -> tuple[str, ...]:
    """The arguments of a call: code as code, the rest as JSON."""
    try:
        given = json.loads(arguments)
    except ValueError:
        return (code(arguments),)
    if not isinstance(given, dict):
        return (code(json.dumps(given, ensure_ascii=False, indent=2), "json"),)
    programs = {name: value for name, value in given.items() if isinstance(value, str) and _is_code(name, value)}
    rest = {name: value for name, value in given.items() if name not in programs}
    shown = [code(value, "python" if name in CODE_ARGUMENTS else "") for name, value in programs.items()]
    if rest or not shown:
        shown.append(code(json.dumps(rest, ensure_ascii=False, indent=2), "json"))
    return tuple(shown)


def _is_code(name: str, value: str) -> bool:
    return name in CODE_ARGUMENTS or "\n" in value.strip()


def difference(had: Sequence[Json], now: Sequence[Json]) -> list[Json]:
    """What makes parts `had` those of `now`: of each that differs its head, and its blocks from the first one on."""
    changes = []
    for place, (old, new) in enumerate(zip_longest(had, now)):
        if new is None:
            changes.append({"part": place, "gone": True})
        elif old is None or old["head"]["kind"] != new["head"]["kind"]:
            changes.append({"part": place, "from": 0, **new})
        elif old != new:
            same = _same(old["blocks"], new["blocks"])
            changes.append({"part": place, **new, "from": same, "blocks": new["blocks"][same:]})
    return changes


def _same(old: Sequence[str], new: Sequence[str]) -> int:
    pairs = zip(old, new, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(old), len(new)))


def turn_json(chat: Chat, turn: Turn, answer: Answer | None, view: TurnView) -> Json:
    """Everything the page shows of one turn."""
    under_way = answer is not None and turn is answer.turn
    return {
        "user": turn.user,
        "files": [{name: value for name, value in to_json(file).items() if name != "text"} for file in turn.files],
        "parts": view.parts(turn, under_way, list(answer.writer.written.values()) if answer and under_way else ()),
        "error": None if under_way or not turn.error else turn.error.to_json(),
        "ending": None if under_way or turn.counts is None else turn.counts.finish_reason,
        "counts": None if under_way or turn.counts is None else vars(turn.counts),
        "dropped": turn.dropped,
        "under_way": under_way,
        "cut": turn.cut and not under_way,
        "versions": [version.id for version in chat.versions(turn)],
    }


def asking_json(asking: Asking | None) -> Json | None:
    """The call that waits for the user's word."""
    if asking is None:
        return None
    tool = asking.tool
    shown = list(arguments_blocks(asking.call.arguments))
    said = {"from": _said(tool.origin), "caution": _said(tool.caution)}
    return {"id": asking.id, "name": asking.call.name, "origin": tool.origin, **said, "blocks": shown}


def _said(text: str) -> Json | None:
    return Sentence.from_json(text).to_json() if text else None


def status_json(answer: Answer | None) -> Json:
    """What is being done, in a word and in numbers; the page puts it into its language."""
    if answer is None:
        return {"phase": "idle"}
    writer, last = answer.writer, answer.turn.parts[-1] if answer.turn.parts else None
    if answer.asking is not None:
        return {"phase": "asking"}
    if writer.progress is not None:
        return {"phase": "progress", **vars(writer.progress)}
    if last is not None and last.kind == "call" and last.seconds is None and not writer.written:
        return {"phase": "tool", "name": last.name}
    if writer.pieces < 2:
        return {"phase": "reading", "seconds": round(time.monotonic() - answer.started, 1)}
    speed = (writer.pieces - 1) / max(time.monotonic() - writer.first_piece, 1e-3)
    return {"phase": "thinking" if last and last.kind == "thinking" else "writing", "speed": round(speed, 1)}
