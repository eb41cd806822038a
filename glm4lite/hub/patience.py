"""How often, and after which pauses, a server is asked again that failed in a way that may pass."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from glm4lite.hub.client import RefusedError, httpx

logger = logging.getLogger("glm4lite")

Answer = TypeVar("Answer")

_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_OUTDATED = frozenset({401, 403, 404, 410})  # of a storage that a signed link led to: the Hub gives a new one
_LONGEST_PAUSE = 300.0
_SAID = 3.0  # seconds of a pause that is not explained


@dataclass(frozen=True)
class Patience:
    """How often a stretch is asked for again where nothing of it comes, and seconds: the first pause (each one after it
    is twice as long, up to `longest`), and the silence after which a connection is given up."""

    attempts: int = 6
    first: float = 1.0
    longest: float = 30.0
    silence: float = 20.0

    def pause(self, failures: int, error: Exception) -> float | None:
        """Seconds to wait before asking again; None where that is no use."""
        if failures > self.attempts or not _may_pass(error):
            return None
        grown: float = min(self.longest, self.first * 2 ** (failures - 1))
        grown *= random.uniform(0.5, 1.0)  # so that not all connections come back at once
        return max(grown, min(_retry_after(error), _LONGEST_PAUSE))


QUESTIONS = Patience(attempts=3, first=0.3, longest=2.0)
"""Of listings and of questions about single files, for which somebody waits."""


def asked(ask: Callable[[], Answer]) -> Answer:
    """The answer to a question, asked again where the server is busy or broke off.

    One that cannot be reached, or is silent, is not waited for: what the cache has is taken then.
    """
    failures = 0
    while True:
        try:
            return ask()
        except (RefusedError, httpx.NetworkError, httpx.RemoteProtocolError) as error:
            failures += 1
            pause = None if isinstance(error, httpx.ConnectError) else QUESTIONS.pause(failures, error)
            if pause is None:
                raise
            if pause > _SAID:
                logger.warning("%s asks to be asked again in %.0f seconds", error.request.url.host, pause)
            time.sleep(pause)


class BrokenOff(Exception):
    """An answer that ended early, or was no part where parts were sent before: it is asked for again."""


def _may_pass(error: Exception) -> bool:
    """Whether asking again may help."""
    if isinstance(error, RefusedError):
        status = error.response.status_code
        return status in _BUSY or (bool(error.response.history) and status in _OUTDATED)
    if isinstance(error, httpx.TransportError):
        return not isinstance(error, httpx.UnsupportedProtocol | httpx.ProxyError) and "CERTIFICATE" not in str(error)
    return isinstance(error, BrokenOff)


def _retry_after(error: Exception) -> float:
    value = error.response.headers.get("Retry-After", "") if isinstance(error, RefusedError) else ""
    return float(value) if re.fullmatch(r"\d{1,6}", value, re.ASCII) else 0.0
