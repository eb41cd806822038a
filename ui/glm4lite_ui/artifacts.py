"""HTML and SVG that the model wrote, shown in a frame that can do nothing but draw.

The frame has an origin of its own (`sandbox` without allow-same-origin) and a policy without network; leaving to
another address is refused by the page's own policy (serving.py: frame-src). One thing remains: before Chromium asks
the policy about a navigation it may look up the address and connect to it, without sending anything.

Scripts run only after a click that says what they can do: no policy that browsers know stops WebRTC, over which a
script may send what the preview holds.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

from glm4lite_ui.chats import Chat, Turn

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
    "media-src data: blob:; base-uri 'none'; form-action 'none'"
)
_FENCE = re.compile(r"^```[ \t]*(html|svg|xml)[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE | re.IGNORECASE)

_TITLE = re.compile(r"<title[^>]*>([^<]{1,200})</title>", re.IGNORECASE)
_SCRIPT = re.compile(r"<script|\bon\w+\s*=|javascript:", re.IGNORECASE)


@dataclass(frozen=True)
class Artifact:
    """A piece of an answer that a browser can draw; `kind` is "HTML" or "SVG"."""

    kind: str
    source: str

    def name(self) -> str:
        """Its title where it has one, else what it is."""
        titled = _TITLE.search(self.source)
        words = " ".join(html.unescape(titled[1]).split())[:60] if titled else ""
        return words or {"HTML": "page", "SVG": "picture"}[self.kind]

    def document(self) -> str:
        """A whole page; the policy stands before anything that the model wrote."""
        policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        body = self.source if self.kind == "HTML" else f"<body style='margin:0'>{self.source}"
        return f'<!doctype html><meta charset="utf-8">{policy}{body}'


def artifacts(turn: Turn) -> list[Artifact]:
    """What an answer holds in fences called html or svg (or xml with an <svg> in it)."""
    text = "".join(part.text for part in turn.parts if part.kind == "text")
    found = []
    for language, source in _FENCE.findall(text):
        is_svg = "<svg" in source[:500].lower() and "<html" not in source[:500].lower()
        if language.lower() == "html" or is_svg:
            found.append(Artifact("SVG" if is_svg else "HTML", source))
    return found


def artifacts_of(chat: Chat) -> list[dict[str, object]]:
    """Those of all turns shown, as JSON: what they are, their source, the document that draws it."""
    found = [artifact for turn in chat.turns for artifact in artifacts(turn)]
    return [
        {
            "kind": artifact.kind,
            "name": artifact.name(),
            "source": artifact.source,
            "document": artifact.document(),
            "scripts": bool(_SCRIPT.search(artifact.source)),
        }
        for artifact in found
    ]
