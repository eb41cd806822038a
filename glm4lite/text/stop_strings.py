"""Stop texts: where a stream of text ends."""

from __future__ import annotations

from collections.abc import Sequence


def partial_end(text: str, marker: str) -> str:
    """The longest end of `text` that is a beginning of `marker`, though not all of it."""
    sizes = range(min(len(marker) - 1, len(text)), 0, -1)
    return next((marker[:size] for size in sizes if text.endswith(marker[:size])), "")


class StopStrings:
    """Cuts a stream of text at the first stop text; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None  # the stop text that came

    def feed(self, text: str) -> str:
        """The part of the text so far that is certainly before a stop text and was not given yet."""
        if self.found is not None or not self._stops:
            return text if self.found is None else ""
        self._held += text
        ends = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if ends:  # the stop text that is whole first, so that the cut does not depend on how the text came
            end, place = min(ends)
            self.found = self._held[place:end]
            return self._held[:place]
        kept = max((partial_end(self._held, stop) for stop in self._stops), key=len)
        given, self._held = self._held.removesuffix(kept), kept
        return given

    def finish(self) -> str:
        """What was held back; the answer, or this part of it, ended without the rest of a stop text."""
        held, self._held = self._held if self.found is None else "", ""
        return held
