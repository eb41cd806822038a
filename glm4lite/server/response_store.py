"""ResponseStore: the last responses, so that a request can go on from one by its id. Nothing is written to a disk.

They are held as JSON text, since Python's objects for it take many times the memory, by what they consist of.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from glm4lite.server.errors import ApiError, encode
from glm4lite.server.replies import JSON

HELD_BYTES = 64 << 20  # of all responses together
MOST_RESPONSES = 10_000


@dataclass(frozen=True)
class Kept:
    """A response, and the items of its conversation that the one before it, `previous`, does not hold."""

    id: str
    previous: str | None
    items: bytes = field(repr=False)
    response: bytes = field(repr=False)
    output_ids: tuple[str, ...] = ()

    @classmethod
    def of(cls, response: JSON, items: bytes) -> Kept:
        """A complete response to these items (a list as JSON)."""
        output_ids = tuple(item["id"] for item in response["output"])
        return cls(response["id"], response["previous_response_id"], items, encode(response), output_ids)

    @property
    def size(self) -> int:
        return len(self.items) + len(self.response)

    def whole(self) -> JSON:
        """The response."""
        response: JSON = json.loads(self.response)
        return response

    def turns(self) -> list[JSON]:
        """What it adds to a conversation."""
        turns: list[JSON] = json.loads(self.items)
        return turns + self.whole()["output"]


class ResponseStore:
    """What was used longest ago goes first. Any thread may ask."""

    def __init__(self, most: int = MOST_RESPONSES, size: int = HELD_BYTES) -> None:
        self._most, self._size = most, size
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, kept: Kept) -> None:
        """Adds a response; not one that is larger than the store, or goes on from one that is not here any more."""
        with self._lock:
            if kept.size > self._size or (kept.previous is not None and kept.previous not in self._kept):
                return
            self._kept[kept.id] = kept
            self._held += kept.size
            self._chain(kept.id, "")
            while self._held > self._size or len(self._kept) > self._most:
                self._drop(next(iter(self._kept)))

    def response(self, response_id: str) -> JSON:
        """Raises ApiError, 404."""
        with self._lock:
            kept = self._chain(response_id, "response_id")[-1]
        return kept.whole()

    def conversation(self, response_id: str) -> list[JSON]:
        """All items up to that response and with its output. Raises ApiError, 404."""
        with self._lock:
            chain = self._chain(response_id, "previous_response_id")
        return [item for kept in chain for item in kept.turns()]

    def item(self, item_id: str) -> JSON | None:
        """An output item by its id."""
        with self._lock:
            kept = next((one for one in reversed(self._kept.values()) if item_id in one.output_ids), None)
        output: list[Any] = kept.whole()["output"] if kept is not None else []
        return next((item for item in output if item["id"] == item_id), None)

    def forget(self, response_id: str) -> None:
        """Raises ApiError, 404. What goes on from it cannot be gone on from any more either."""
        with self._lock:
            self._chain(response_id, "response_id")
            self._drop(response_id)

    def _chain(self, response_id: str, param: str) -> list[Kept]:
        """The response and all before it, the first one first. They are used now, the first one last: it goes last."""
        chain, name = list[Kept](), response_id or None
        while name is not None:
            kept = self._kept.get(name)
            if kept is None:
                lost = f"{param}: no response {response_id[:100]!r} is kept; it may be too long ago, or was not stored"
                raise ApiError(lost, 404, param=param, code="previous_response_not_found")
            self._kept.move_to_end(name)
            chain.append(kept)
            name = kept.previous
        if not chain:
            raise ApiError(f"{param}: is empty", 404, param=param)
        return chain[::-1]

    def _drop(self, response_id: str) -> None:
        self._held -= self._kept.pop(response_id).size
