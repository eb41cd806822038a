"""Speculation without a second model: what followed the last few ids before is likely to follow them again.

Reading the weights takes most of a step, whether one row goes through them or eight. So ids that are guessed from the
prompt and from what was written so far (prompt lookup decoding, Saxena 2023) are computed together with the last one;
each is kept if it is what the model would have drawn there, which leaves the answer as it would be without. A guess
that was wrong costs the rows it took: how long one may be follows from how often guesses were right and from what so
many rows cost here, both measured on the way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from glm4lite.base.errors import ConfigError

MOST = 15  # ids of a draft: what pays beside them is less where memory is the bound, and nearly all where a disk is
_SHORTEST = 2  # ids that have to agree before what follows them is a guess
_LONGEST = 24  # more that agree make a guess no likelier
_REMEMBERED = 65_536  # ids of former answers that are looked through
_GAIN = 1.05  # a guess has to promise this much, since costs are noisy
_ROWS_COST = 0.2  # what another row is taken to cost, as a part of the first, until it was measured
_MEMORY = 0.9  # weight of what was known beside a new measurement
_TRUST = 4.0  # guesses that the first expectation counts for
_FADING = 64.0  # guesses after which older ones count less
_SETTLING = 4  # first measurements, of which the fastest counts: buffers are made, caches are cold


def longest_guess(how: str | int, auto: int = MOST) -> int:
    """What a user asks for as a number of ids: "off" is 0, "auto" is `auto`. Raises ConfigError."""
    if how in ("auto", "off"):
        return auto if how == "auto" else 0
    if not str(how).isascii() or not str(how).isdecimal() or not 1 <= int(how) <= MOST:
        raise ConfigError(f"speculate is {str(how)[:50]!r}; use auto, off, or a number from 1 to {MOST}")
    return int(how)


class Lookup:
    """Ids, and where each run of `_SHORTEST` of them ended last and before that."""

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self.ids: list[int] = []
        self._ends: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        for token in ids:
            self.ids.append(token)
            if len(self.ids) >= _SHORTEST:
                key = tuple(self.ids[-_SHORTEST:])
                self._ends[key] = (*self._ends.get(key, ())[-3:], len(self.ids))

    def find(self, last: Sequence[int], count: int) -> tuple[list[int], int]:
        """Up to `count` ids that followed where most of `last` stood before, and how many of those agreed there."""
        best: tuple[int, int] = (0, 0)
        for end in reversed(self._ends.get(tuple(last[-_SHORTEST:]), ())):
            if end < len(self.ids):
                best = max(best, (self._agreeing(last, end), end))
        agreed, end = best
        return (self.ids[end : end + count], agreed) if agreed else ([], 0)

    def _agreeing(self, last: Sequence[int], end: int) -> int:
        count, most = _SHORTEST, min(_LONGEST, len(last), end)
        while count < most and last[-count - 1] == self.ids[end - count - 1]:
            count += 1
        return count


class Costs:
    """Seconds of a step by its rows, measured."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._seen: dict[int, int] = {}

    def add(self, rows: int, seconds: float) -> None:
        seen = self._seen[rows] = self._seen.get(rows, 0) + 1
        old = self._seconds.get(rows, seconds)
        if seen <= _SETTLING:
            self._seconds[rows] = min(old, seconds)
        else:
            self._seconds[rows] = _MEMORY * old + (1 - _MEMORY) * min(seconds, 2 * old)  # one slow step says little

    def seconds(self, rows: int) -> float | None:
        """Of a step of so many rows, where one was measured."""
        return self._seconds.get(rows)

    def of(self, rows: int) -> float:
        """Relative to one row. What was not measured lies between its neighbours that were."""
        if 1 not in self._seconds:
            return 1 + _ROWS_COST * (rows - 1)
        one = self._seconds[1]
        below = max(known for known in self._seconds if known <= rows)
        above = min((known for known in self._seconds if known >= rows), default=None)
        if above is None:
            return self._seconds[below] / one + _ROWS_COST * (rows - below)
        share = (rows - below) / (above - below) if above > below else 0.0
        return (self._seconds[below] + share * (self._seconds[above] - self._seconds[below])) / one


class Odds:
    """How often a guessed id was right, by how many ids had agreed, or another reason to believe in it."""

    def __init__(self, kind: Callable[[int], int] | None = None) -> None:
        """`kind`: reasons of one kind count together; None: numbers of ids in powers of two."""
        self._counts: dict[int, list[float]] = {}
        self._kind = kind or _kind

    def add(self, agreed: int, right: bool) -> None:
        counts = self._counts.setdefault(self._kind(agreed), [_TRUST * 0.5, _TRUST])
        counts[0] += right
        counts[1] += 1
        if counts[1] > _FADING:
            counts[:] = [count * 0.5 for count in counts]

    def of(self, agreed: int) -> float:
        right, all_of_them = self._counts.get(self._kind(agreed), (0.5, 1.0))
        return right / all_of_them


def _kind(agreed: int) -> int:
    return agreed.bit_length() if agreed < _LONGEST else _LONGEST


class Speculation:
    """What an engine has learnt about guessing: costs, odds, and the last answers."""

    def __init__(self, most: int = MOST) -> None:
        """`most`: ids of the longest draft, 1 to MOST."""
        self.most = most
        self.costs, self.odds = Costs(), Odds()
        self._answers: deque[list[int]] = deque()
        self._former = Lookup()

    def find(self, last: Sequence[int], count: int) -> tuple[list[int], int]:
        """As Lookup.find, in former answers."""
        return self._former.find(last, count)

    def remember(self, answer: list[int]) -> None:
        """For the answers to come. Once there are too many ids the older half is forgotten."""
        self._answers.append(answer[-_REMEMBERED // 2 :])
        self._former.extend(self._answers[-1])
        if len(self._former.ids) > _REMEMBERED:
            while sum(map(len, self._answers)) > _REMEMBERED // 2:
                self._answers.popleft()
            self._former = Lookup([token for kept in self._answers for token in kept])

    def length(self, agreed: int, most: int, sequences: int = 1, rows: int = 1) -> int:
        """How many guessed ids to compute together with the certain ones, at most `most`; 0: it does not pay.

        `sequences`, `rows`: of the step without the guess; what a guess costs is paid by all in the step.
        """
        odds, alone = self.odds.of(agreed), self.costs.of(rows)
        best, gain = 0, _GAIN
        expected, chance = float(sequences), 1.0
        for count in range(1, most + 1):
            chance *= odds
            expected += chance
            gained = expected / sequences * alone / self.costs.of(rows + count)
            if gained > gain:
                best, gain = count, gained
        return best


class Drafts:
    """The guesses of one answer."""

    def __init__(self, speculation: Speculation, prompt: Sequence[int]) -> None:
        self._speculation = speculation
        self._lookup = Lookup(prompt)
        self._prompt = len(prompt)
        self._guess: tuple[list[int], int] = ([], 0)  # for the next id, whether it is computed or not
        self.drafted = self.accepted = 0  # ids

    def take(self, token: int) -> None:
        """Goes on with an id that was drawn."""
        guess, agreed = self._guess
        if guess:
            self._speculation.odds.add(agreed, guess[0] == token)
            self._guess = (guess[1:], agreed) if guess[0] == token else ([], 0)
        self._lookup.extend((token,))

    def next(self, room: int, sequences: int = 1, rows: int = 1) -> list[int]:
        """The ids to compute behind the last one, at most `room`; none where nothing is likely enough.

        `sequences`, `rows`: of the step they come into.
        """
        speculation, last = self._speculation, self._lookup.ids[-_LONGEST:]
        most = max(0, min(room, speculation.most))
        guess = max(
            (source.find(last, MOST) for source in (self._lookup, speculation)),
            key=lambda found: found[1],
        )
        self._guess = guess
        count = speculation.length(guess[1], min(most, len(guess[0])), sequences, rows) if guess[0] else 0
        self.drafted += count
        return guess[0][:count]

    def done(self) -> None:
        """The answer is at its end."""
        self._speculation.remember(self._lookup.ids[self._prompt :])
