"""Files over HTTP: by ranges, several at once, gone on with where a run ended, verified before they get their names.

Whatever ends a run, the next one asks for no byte again that was
noted (glm4lite/hub/arriving.py). A connection that breaks or stalls, and a server that has too much to do, is asked
again after a pause that grows, from the byte it came to. What must not be mixed is refused: an answer of another
length, entity tag or commit than the first.
"""

from __future__ import annotations

import errno
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from glm4lite.base.errors import HubError, one_line
from glm4lite.hub.arriving import PART, Arriving, Stretch, written_at
from glm4lite.hub.client import RefusedError, httpx, raise_for_status
from glm4lite.hub.connections import Connections, Counter, Stopped
from glm4lite.hub.digests import Damage, digest_of
from glm4lite.hub.patience import BrokenOff, Patience

logger = logging.getLogger("glm4lite")

CONNECTIONS = 8
REPEATS = 2
"""Of a file that arrived damaged."""

_POLL_SECONDS = 0.1
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)


@dataclass(frozen=True)
class Wanted:
    """A file to fetch.

    name, whose: of the file and of the repo, for messages. target: where it will lie. size: 0 where it is not known.
    digests: those that it may have. commit: what the server's X-Repo-Commit has to be. lock: a file that is locked
    while somebody fetches this one. anew: also where it is there. synced: not for what is dropped in a moment.
    """

    name: str
    whose: str
    url: str
    headers: Mapping[str, str]
    target: Path
    size: int = 0
    digests: frozenset[str] = frozenset()
    commit: str | None = None
    lock: Path | None = None
    anew: bool = False
    synced: bool = True


@dataclass
class _File:
    """A file that is being fetched."""

    wanted: Wanted
    arriving: Arriving
    lock: FileLock | None = None
    damaged: list[Damage] = field(default_factory=list)


class Transfer:
    """Fetches files, and hands each to `arrived` when it is whole and verified.

    Example::

        Transfer(client, files, counter, lambda wanted, arriving: arriving.publish(wanted.target)).run()
    """

    def __init__(
        self,
        client: httpx.Client,
        wanted: Iterable[Wanted],
        counter: Counter,
        arrived: Callable[[Wanted, Arriving], None],
        patience: Patience = Patience(),
        part: int = PART,
    ) -> None:
        self._client, self._counter, self._arrived, self._patience = client, counter, arrived, patience
        self._waiting, self._part = list(wanted), part
        counter.total += sum(one.size for one in self._waiting)
        self._open: list[_File] = []
        self._opening = 0
        self._room: int | None = None
        self._connections = Connections(self._work, 0, counter)  # nobody began yet
        self._changed = threading.Condition()
        self._placing = threading.Lock()

    def run(self) -> Exception | None:
        """Returns when all files have arrived; else what went wrong first."""
        self.start()
        return self.wait()

    def start(self, room: int | None = None) -> None:
        """Begins, beside what the caller does; room: of each file no more bytes are taken until `wait` is called."""
        self._room = room
        count = min(CONNECTIONS, sum(1 + one.size // self._part for one in self._waiting))
        self._connections = Connections(self._work, count, self._counter)

    def wait(self) -> Exception | None:
        """As `run`, of what was started."""
        self._room = None
        try:
            return self._connections.wait()
        finally:
            self._release()

    def stop(self) -> None:
        """Ends what was started; the next run goes on with it."""
        self._connections.stop()
        self._release()

    def _release(self) -> None:
        for file in self._open:
            if file.lock is not None:
                file.lock.release()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            file, stretch = job
            self._fetch(file, stretch)
            self._settle(file)

    def _next(self) -> tuple[_File, Stretch] | None:
        """What a connection does now; None where nothing is left for it."""
        while True:
            self._counter.poll()
            with self._changed:
                for file in self._open:
                    stretch = file.arriving.take(self._room)
                    if stretch is not None:
                        return file, stretch
                if not self._waiting:
                    if not self._open and not self._opening:
                        return None
                    self._changed.wait(_POLL_SECONDS)
                    continue
                wanted = self._waiting.pop(0)
                self._opening += 1
            try:
                opened = self._opened(wanted)
                with self._changed:
                    self._open += [opened] if opened is not None else []
            finally:
                with self._changed:
                    self._opening -= 1
                    self._changed.notify_all()
            if opened is not None:
                self._settle(opened)

    def _opened(self, wanted: Wanted) -> _File | None:
        """A file with what an earlier run left of it; None where another program has brought it meanwhile."""
        lock = _locked(wanted, self._counter)
        try:
            if not wanted.anew and wanted.target.exists():
                self._counter.add(wanted.size)
                if lock is not None:
                    with self._placing:
                        self._arrived(wanted, self._arriving(wanted))
                    lock.release()
                return None
            file = _File(wanted, self._arriving(wanted), lock)
            self._counter.add(file.arriving.open())
            self._counter.total += file.arriving.size - wanted.size
            file.arriving.hash_on(self._counter.poll)
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return file

    def _arriving(self, wanted: Wanted) -> Arriving:
        return Arriving(wanted.target, wanted.size, wanted.digests, self._part, wanted.synced)

    def _settle(self, file: _File) -> None:
        """Puts a complete file in its place, or begins again where it is not what it should be."""
        file.arriving.hash_on(self._counter.poll)
        with self._changed:
            if file not in self._open or not file.arriving.complete:
                self._changed.notify_all()
                return
            self._open.remove(file)
            self._opening += 1
        wanted = file.wanted
        try:
            damage = file.arriving.damage(self._counter.poll)
            if damage is None:
                with self._placing:
                    self._arrived(wanted, file.arriving)
            else:
                self._again(file, damage)
        finally:
            with self._changed:
                self._opening -= 1
                if file not in self._open and file.lock is not None:
                    file.lock.release()
                self._changed.notify_all()

    def _again(self, file: _File, damage: Damage) -> None:
        wanted = file.wanted
        file.damaged.append(damage)
        file.arriving.discard()
        if len(file.damaged) > REPEATS:
            raise HubError(
                f"{wanted.whose}: {wanted.name} arrives damaged from {host_address(wanted.url)} each time ({damage}); "
                "run it again later, or set HF_ENDPOINT to another mirror"
            )
        logger.warning("%s of %s arrived damaged (%s); it is downloaded again", wanted.name, wanted.whose, damage)
        self._counter.add(-file.arriving.size)
        self._counter.total -= file.arriving.size - wanted.size
        file.arriving = self._arriving(wanted)
        file.arriving.open()
        with self._changed:
            self._open.append(file)

    def _fetch(self, file: _File, stretch: Stretch) -> None:
        """Brings a stretch, with patience; what has arrived of it is noted whatever happens."""
        failures, furthest, ended = 0, stretch.at, False
        try:
            while not ended:
                try:
                    ended = self._receive(file, stretch)
                except (httpx.HTTPError, httpx.StreamError, RefusedError, BrokenOff) as error:
                    failures = 1 if stretch.at > furthest else failures + 1
                    furthest = max(furthest, stretch.at)
                    pause = self._patience.pause(failures, error)
                    if pause is None:
                        if isinstance(error, BrokenOff):
                            raise HubError(f"{file.wanted.whose}: {file.wanted.name} {error}; run it again") from None
                        raise
                    if self._counter.stopped.wait(pause):
                        raise Stopped from None
        finally:
            file.arriving.note(stretch, ended)

    def _receive(self, file: _File, stretch: Stretch) -> bool:
        """One request, and its answer as far as it comes; False where it has to be asked for from the beginning."""
        wanted, arriving = file.wanted, file.arriving
        headers = {**wanted.headers, "Accept-Encoding": "identity"}
        whole = stretch.at == 0 and stretch.stop in (None, arriving.size)
        if not whole:
            headers["Range"] = f"bytes={stretch.at}-{'' if stretch.stop is None else stretch.stop - 1}"
        with self._client.stream(
            "GET", wanted.url, headers=headers, timeout=self._patience.silence, follow_redirects=True
        ) as response:
            raise_for_status(response)
            tag = _tag(wanted, response)
            size = _size(wanted, response, stretch)
            if arriving.differs(size, tag):
                self._counter.add(-self._replaced(file, stretch))
                return False
            if response.status_code != 206 and not whole:
                if arriving.ranged:
                    raise BrokenOff("is sent whole where a part was asked for")
                self._counter.add(-arriving.begin_again(stretch))
            known, began = arriving.size, stretch.at
            arriving.settle(size, tag, ranged=response.status_code == 206)
            self._counter.total += arriving.size - known
            if stretch.stop is None and size is not None:
                stretch.stop = size
            with written_at(arriving.path, began) as out:
                for piece in response.iter_bytes():
                    self._counter.poll()
                    if stretch.stop is not None and stretch.at + len(piece) > stretch.stop:
                        raise BrokenOff("arrives longer than it should be")
                    _write(out.write, piece, arriving.path)
                    stretch.at += len(piece)
                    self._counter.add(len(piece))
        if stretch.stop is not None and stretch.at < stretch.stop:
            raise BrokenOff("arrives shorter than it should be")
        return True

    def _replaced(self, file: _File, stretch: Stretch) -> int:
        """The server has another file than the one that was begun; how many bytes are of no use any more.

        Raises:
            HubError: it was begun in this run.
        """
        wanted, arriving = file.wanted, file.arriving
        if arriving.ranged is not None:
            arriving.discard()
            raise HubError(f"{wanted.whose}: {wanted.name} was changed while it was downloaded; run it again")
        what = f"{wanted.name} of {wanted.whose}"
        logger.warning("%s was changed since its download began: it is downloaded from its beginning", what)
        lost = arriving.begin_again(stretch)
        self._counter.total -= arriving.size - wanted.size
        arriving.validator, arriving.size = "", wanted.size
        stretch.stop = min(self._part, wanted.size) if wanted.size else None
        return lost


def _tag(wanted: Wanted, response: httpx.Response) -> str:
    """The entity tag of an answer of the commit and, as far as it tells, of the file that were asked for.

    Raises:
        HubError: it is of another one.
    """
    hops = [*response.history, response]
    if hops[0].url.scheme == "https" and any(one.url.scheme != "https" for one in hops):
        raise HubError(
            f"{wanted.whose}: {host_address(wanted.url)} leads to an address without https; use another mirror"
        )
    commit = hops[0].headers.get("X-Repo-Commit")
    if wanted.commit and commit and commit != wanted.commit:
        said = f"{wanted.whose}: {wanted.name} comes from another revision ({one_line(commit)[:40]})"
        raise HubError(f"{said} than {wanted.commit}, which was asked for; run it again")
    tag = entity_tag(hops)
    told = digest_of(tag)
    kind = next((one.partition(":")[0] for one in told), None)
    if any(one.partition(":")[0] == kind for one in wanted.digests) and not told & wanted.digests:
        raise HubError(
            f"{wanted.whose}: {wanted.name} is another file ({one_line(tag)[:64]}) than "
            f"{host_address(wanted.url)} lists; "
            "run it again later, or set HF_ENDPOINT to another mirror"
        )
    return tag


def entity_tag(hops: Sequence[httpx.Response]) -> str:
    """By which two answers are of the same file: of the first of a chain of redirects that has one."""
    for name in ("X-Linked-ETag", "ETag", "Last-Modified"):
        for hop in hops:
            value: str = hop.headers.get(name, "")
            if value:
                return value.removeprefix("W/").strip('"')
    return ""


def _size(wanted: Wanted, response: httpx.Response, stretch: Stretch) -> int | None:
    """The file's size as an answer tells it, None where it does not.

    Raises:
        HubError: another than the listing's, or the answer is a web page.
        BrokenOff: it is another part than was asked for.
    """
    encoded = response.headers.get("Content-Encoding", "identity") != "identity"
    length = response.headers.get("Content-Length", "")
    if response.status_code == 206:
        part = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if part is None or encoded or int(part[1]) != stretch.at or int(part[2]) >= int(part[3]):
            raise BrokenOff("is sent in other parts than were asked for")
        size = int(part[3])
    elif encoded or not re.fullmatch(r"\d{1,19}", length, re.ASCII):
        return None
    else:
        size = int(length)
    if size == wanted.size or (not wanted.size and not _is_page(wanted, response)):
        return size
    where = host_address(wanted.url)
    if _is_page(wanted, response):
        raise HubError(
            f"{wanted.whose}: {where} answers with a web page where {wanted.name} should be; if this network asks for "
            "a login in a browser, do that first, else check the address"
        )
    raise HubError(
        f"{wanted.whose}: {wanted.name} has {size} bytes at {where}, but {wanted.size} in its listing; "
        "run it again later, or set HF_ENDPOINT to another mirror"
    )


def _is_page(wanted: Wanted, response: httpx.Response) -> bool:
    return "text/html" in response.headers.get("Content-Type", "") and not wanted.name.endswith((".html", ".htm"))


def _locked(wanted: Wanted, counter: Counter) -> FileLock | None:
    """The lock of a file; what another program fetches is waited for. None where the disk has no locks."""
    if wanted.lock is None:
        return None
    wanted.lock.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(wanted.lock, timeout=0, thread_local=False)
    while True:
        try:
            lock.acquire()
            return lock
        except Timeout:
            if not counter.waited:
                logger.warning("%s is being downloaded by another process: waiting for it", wanted.whose)
            counter.waited = True
            if counter.stopped.wait(_POLL_SECONDS):
                raise Stopped from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
                raise
            return None


def _write(write: Callable[[memoryview], int | None], piece: bytes, path: Path) -> None:
    left = memoryview(piece)
    try:
        while left:
            left = left[write(left) or 0 :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def host_address(url: str) -> str:
    """Scheme and host of an address: what follows may hold a signature."""
    with suppress(ValueError, httpx.InvalidURL):
        address = httpx.URL(url)
        return f"{address.scheme}://{address.netloc.decode('ascii', 'replace').rpartition('@')[2]}"
    return url.partition("?")[0]
