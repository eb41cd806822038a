"""When an answer ends: the ids that stop it, and the texts that do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm4lite.config import Glm4Config
    from glm4lite.tokenizer import Tokenizer


def stop_ids(config: Glm4Config, generation_config: dict[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """The union of what config.json and generation_config.json name and the tokenizer's (GLM's own included).

    GLM-4 ends an answer with <|user|> and calls with <|observation|>; released configs name one or all of them.
    """
    given = generation_config.get("eos_token_id")
    listed = given if isinstance(given, list) else [given]
    ids = [*config.eos_token_ids, *listed, *tokenizer.stop_ids]
    return frozenset(token for token in ids if isinstance(token, int) and 0 <= token < config.vocab_size)


class StopStrings:
    """Cuts a stream of text at the first stop text; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The part of the text so far that is certainly before a stop text and was not given yet."""
        if self.found or not self._stops:
            return "" if self.found else text
        self._held += text
        places = [place for place in map(self._held.find, self._stops) if place >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        keep = max(self._partial(stop) for stop in self._stops)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given

    def finish(self) -> str:
        """What was held back; the answer ended without the rest of a stop text."""
        return "" if self.found else self._held

    def _partial(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
