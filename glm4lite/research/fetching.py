"""From which addresses anything is fetched, how much, and how long that may take.

What a model wants to open, a page, a search server or a redirect may have told it, so an address is nobody's word:

* http and https alone, no user names in it, and ports from 1024 on beside 80 and 443;
* only public hosts, and those that the user named, which may lie anywhere (`127.0.0.1:8888`, `wiki.example`);
* a name is resolved where the connection is made, and the connection goes to the number that was checked, so that a
  name cannot mean another host a moment later (DNS rebinding). TLS still asks for the name;
* each redirect is a new address, looked at as the first;
* no proxy of the environment is used: it would resolve names itself.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import httpcore2
import httpx2

from glm4lite.base.errors import one_line
from glm4lite.research.source import SourceError
from glm4lite.tools.running import abandoned

LARGEST = 16 << 20
"""Bytes of an answer. What comes behind them is not read."""

_MOST_REDIRECTS = 5
_MOST_ADDRESSES = 4  # of one name; localhost is ::1 first, where many servers do not listen
_SECONDS = 20.0  # for all of it: names, redirects, the last byte
_LONGEST_URL = 4000
_REDIRECTS = (301, 302, 303, 307, 308)
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")  # IPv4 addresses in IPv6, of long ago
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Fetched:
    """An answer: the address it came from at last, its type (`text/html`), charset ("": not said), and the bytes.

    `whole` is False where there were more than were read.
    """

    url: str
    type: str
    charset: str
    data: bytes
    whole: bool


@dataclass(frozen=True)
class Named:
    """A host that the user named, with its port, or with any where that is None."""

    host: str
    port: int | None = None

    @classmethod
    def of(cls, text: str) -> Named:
        """`HOST`, `HOST:PORT` or the beginning of an address. Raises SourceError."""
        try:
            url = httpx2.URL(text if "://" in text else f"http://{text}")
            explicit = url.port or (_port(url) if "://" in text or text.endswith(":80") else None)
        except (httpx2.InvalidURL, ValueError, TypeError) as error:
            raise SourceError(f"{one_line(text, 200)!r} is no host: {one_line(error, 200)}") from None
        if not _HOST.fullmatch(_host(url)):
            raise SourceError(f"{one_line(text, 200)!r} is no host; name one such as wiki.example or 127.0.0.1:8080")
        return cls(_host(url), explicit)


class Fetcher:
    """Fetches from public hosts, unless `public` is False, and from the named ones."""

    def __init__(self, public: bool, named: Iterable[Named] = (), seconds: float = _SECONDS) -> None:
        self.public, self.named, self.seconds = public, frozenset(named), seconds

    def fetch(
        self, url: str, accept: str = "text/html, text/plain, application/pdf;q=0.9", most: int = LARGEST
    ) -> Fetched:
        """GETs what is at an address, at most `most` bytes. Raises SourceError: one line that says why not."""
        deadline, at = time.monotonic() + self.seconds, _parsed(url)
        for _ in range(_MOST_REDIRECTS + 1):
            self._check(at)
            answer = self._ask(at, accept, most, deadline)
            if isinstance(answer, Fetched):
                return answer
            try:
                at = _parsed(str(at.join(answer)))
            except (httpx2.InvalidURL, ValueError) as error:
                raise SourceError(f"{_shown(at)} redirects to what is no address: {one_line(error, 200)}") from None
        raise SourceError(f"{one_line(url, 200)} redirects more than {_MOST_REDIRECTS} times")

    def _check(self, url: httpx2.URL) -> None:
        """What can be told without asking for the name."""
        port = _port(url)
        if self._is_named(_host(url), port):
            return
        if not self.public:
            raise SourceError(f"{_shown(url)} may not be opened: only hosts that the user named may")
        if port not in (80, 443) and port < 1024:
            raise SourceError(f"{_shown(url)} may not be opened: port {port} is none of web pages")

    def _is_named(self, host: str, port: int) -> bool:
        return Named(host) in self.named or Named(host, port) in self.named

    def addresses(self, host: str, port: int) -> list[str]:
        """The numbers that a connection to a host may go to, in turn; raises SourceError where it may go nowhere."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise SourceError(f"{host} was not found ({getattr(error, 'strerror', None) or one_line(error)})") from None
        numbers = [str(entry[4][0]) for entry in found]
        allowed = numbers if self._is_named(host, port) else [number for number in numbers if is_public(number)]
        if not allowed:
            raise SourceError(
                f"{host} may not be opened: it is an address of this machine or its network ({numbers[0]}), and the "
                "user did not name it"
            )
        return list(dict.fromkeys(allowed))[:_MOST_ADDRESSES]

    def _ask(self, url: httpx2.URL, accept: str, most: int, deadline: float) -> Fetched | str:
        """The answer, or the address it redirects to."""
        agent = f"glm4lite/{version('glm4lite')}"
        headers = [("Accept", accept), ("Accept-Encoding", "identity"), ("User-Agent", agent)]
        left = max(deadline - time.monotonic(), 0.01)
        waits = dict.fromkeys(("connect", "read", "write", "pool"), left)
        try:
            with (
                httpcore2.ConnectionPool(network_backend=_Pinned(self, deadline)) as pool,
                pool.stream("GET", str(url), headers=headers, extensions={"timeout": waits}) as answer,
            ):
                said = httpx2.Headers(answer.headers)
                if answer.status in _REDIRECTS and "location" in said:
                    return str(said["location"])[:_LONGEST_URL]
                if answer.status != 200:
                    raise SourceError(f"{_shown(url)} answers with {answer.status}")
                if said.get("content-encoding", "identity") != "identity":
                    raise SourceError(f"{_shown(url)} sends what it was asked not to pack")
                data = bytearray()
                for piece in answer.iter_stream():
                    data += piece
                    if len(data) > most:
                        break
                    if abandoned().is_set():
                        raise SourceError(f"{_shown(url)}: nobody waits for it any more")
        except httpcore2.TimeoutException:
            raise SourceError(f"{_shown(url)} does not answer within {self.seconds:g} s") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.UnsupportedProtocol, OSError) as error:
            reason = one_line(error, 300) or type(error).__name__
            raise SourceError(f"{_shown(url)} cannot be read ({reason})") from None
        kind, _, rest = said.get("content-type", "").partition(";")
        charset = next((part.partition("=")[2] for part in rest.split(";") if part.strip().startswith("charset=")), "")
        return Fetched(str(url), kind.strip().lower(), charset.strip("\"' "), bytes(data[:most]), len(data) <= most)


class _Pinned(httpcore2.NetworkBackend):
    """Connects to the number that was checked, and lets nothing last beyond the deadline."""

    def __init__(self, fetcher: Fetcher, deadline: float) -> None:
        self._fetcher, self._deadline = fetcher, deadline

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore2.NetworkStream:
        *others, last = self._fetcher.addresses(host, port)
        for number in others:
            with suppress(httpcore2.ConnectError, httpcore2.ConnectTimeout):
                return self._connected(number, port, _left(self._deadline) / 2)
        return self._connected(last, port, _left(self._deadline))

    def _connected(self, number: str, port: int, seconds: float) -> httpcore2.NetworkStream:
        return _Timed(httpcore2.SyncBackend().connect_tcp(number, port, seconds), self._deadline)


class _Timed(httpcore2.NetworkStream):
    """A connection whose parts together end in time: a server may send a byte a second for ever."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, *arguments: Any, **options: Any) -> httpcore2.NetworkStream:
        secured = self._stream.start_tls(*arguments, **{**options, "timeout": _left(self._deadline)})
        return _Timed(secured, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def is_public(number: str) -> bool:
    """Whether an address is one of the internet's: not of this machine, a network around it, or several hosts.

    One that leads to an IPv4 address (mapped, NAT64, 6to4, Teredo) is what that is.
    """
    try:
        address: Address = ipaddress.ip_address(number.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner is None and (address in _NAT64 or address in _COMPATIBLE):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore2.ReadTimeout
    return left


def _parsed(url: str) -> httpx2.URL:
    try:
        if len(url) > _LONGEST_URL:
            raise ValueError(f"it has more than {_LONGEST_URL} characters")
        parsed = httpx2.URL(url)
        host = _host(parsed)
    except (httpx2.InvalidURL, ValueError, TypeError) as error:
        raise SourceError(f"{one_line(url, 200)!r} is no address: {one_line(error, 200)}") from None
    if parsed.scheme not in ("http", "https"):
        raise SourceError(f"{one_line(url, 200)!r} may not be opened: only http and https are")
    if not _HOST.fullmatch(host):
        raise SourceError(f"{one_line(url, 200)!r} is no address: it has no host")
    if parsed.userinfo:
        raise SourceError(f"{parsed.scheme}://{host} may not be opened: its address holds a user's name")
    return parsed.copy_with(fragment=None)


def _host(url: httpx2.URL) -> str:
    """As it is asked for: in ASCII, without the dot that a name may end with."""
    return url.raw_host.decode("ascii").strip("[]").rstrip(".").lower()


def _port(url: httpx2.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


def _shown(url: httpx2.URL) -> str:
    return one_line(str(url), 200)
