"""ResponseStore: the last responses, so that a request can go on from one by its id. Nothing is written to a disk."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from glm4lite.server.errors import ApiError

JSON = dict[str, Any]
HELD_BYTES = 64 << 20  # of all responses together, as JSON
MOST_RESPONSES = 10_000


@dataclass(frozen=True)
class Kept:
    """A response, and what of its conversation the one before it does not hold; `size` in bytes."""

    response: JSON
    items: list[JSON]
    previous: str | None
    size: int


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
        """Adds a response; one that is too large for the store is not kept."""
        with self._lock:
            if kept.size > self._size or (kept.previous is not None and kept.previous not in self._kept):
                return
            self._kept[kept.response["id"]] = kept
            self._held += kept.size
            self._chain(kept.response["id"], "")
            while self._held > self._size or len(self._kept) > self._most:
                self._drop(next(iter(self._kept)))

    def response(self, response_id: str) -> JSON:
        """Raises ApiError, 404."""
        with self._lock:
            return self._chain(response_id, "response_id")[-1].response

    def conversation(self, response_id: str) -> list[JSON]:
        """All items up to that response and with its output. Raises ApiError, 404."""
        with self._lock:
            chain = self._chain(response_id, "previous_response_id")
        return [item for kept in chain for item in (*kept.items, *kept.response["output"])]

    def item(self, item_id: str) -> JSON | None:
        """An output item by its id."""
        with self._lock:
            kept = reversed(self._kept.values())
            return next((item for one in kept for item in one.response["output"] if item["id"] == item_id), None)

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
