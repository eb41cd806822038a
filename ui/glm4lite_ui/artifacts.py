"""HTML and SVG that the model wrote, shown in a frame that can do nothing but draw.

The frame has an origin of its own (`sandbox` without allow-same-origin) and a policy without network; leaving to
another address is refused by the page's own policy (serving.py: frame-src). One thing remains: before Chromium asks
the policy about a navigation it may look up the address and connect to it, without sending anything.

Scripts run only after a click that says what they can do: no policy that browsers know stops WebRTC, over which a
script may send what the preview holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from glm4lite_ui.chats import Turn
from glm4lite_ui.markup import text_html

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
    "media-src data: blob:; base-uri 'none'; form-action 'none'"
)
_FENCE = re.compile(r"^```[ \t]*(html|svg|xml)[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE | re.IGNORECASE)

_SCRIPT = re.compile(r"<script|\bon\w+\s*=|javascript:", re.IGNORECASE)
RUN_SCRIPTS = (
    '<p class="g-scripts"><button type="button" class="g-run">Run its scripts</button> '
    "They see nothing of this page, but may send over WebRTC what the preview holds.</p>"
)

# A frame exists only while its preview is open, and is made anew each time.
PREVIEW_JS = """
element.addEventListener('toggle', event => {
  const details = event.target, box = details.querySelector('.g-frame');
  if (!box) return;
  box.replaceChildren();
  if (details.open) draw(box, '');
}, true);
element.addEventListener('click', event => {
  const button = event.target.closest('.g-run');
  if (button) draw(button.closest('.g-preview').querySelector('.g-frame'), 'allow-scripts');
});
function draw(box, allowed) {
  const frame = document.createElement('iframe');
  frame.setAttribute('sandbox', allowed);
  frame.setAttribute('referrerpolicy', 'no-referrer');
  frame.title = 'Preview';
  frame.srcdoc = box.dataset.document;
  box.replaceChildren(frame);
}
"""


@dataclass(frozen=True)
class Artifact:
    """A piece of an answer that a browser can draw; `kind` is "HTML" or "SVG"."""

    kind: str
    source: str

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


def previews(turns: Sequence[Turn]) -> str:
    """A closed preview per artifact of the last answer that holds any."""
    return "".join(map(_preview, next(filter(None, map(artifacts, reversed(turns))), [])))


def _preview(artifact: Artifact) -> str:
    size = f"{len(artifact.source):,} characters"
    run = RUN_SCRIPTS if _SCRIPT.search(artifact.source) else ""
    return (
        f'<details class="g-preview"><summary>Preview {artifact.kind} ({size})</summary>{run}'
        f'<div class="g-frame" data-document="{text_html(artifact.document())}"></div></details>'
    )
