"""What research may fetch, from where, and what it makes of the answers of strangers: pages, searches, MCP servers."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from glm4lite.research.fetching import Fetcher, Named, is_public
from glm4lite.research.mcp import McpSource, mcp_sources
from glm4lite.research.source import Hit, SourceError
from glm4lite.research.web import Web
from glm4lite.tools.running import ToolResult
from glm4lite.tools.tool import Tool
from tests.glm4lite.web_site import Answer, WebSite, found, html, redirect
from tests.ui.files import pdf


@pytest.fixture(autouse=True)
def no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in these tests leaves the machine: no names are resolved but localhost and addresses."""
    real = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        if re.fullmatch(r"(?i)localhost\.?|[\d.:a-fx]+", str(host)):
            return real(host, *arguments, **options)
        raise socket.gaierror(-2, "no names in this test")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize(
    "number",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12::1",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a00:1",
        "2002:7f00:1::",
        "2002:c0a8:101::",
        "2001:db8::1",
        "nonsense",
        "",
    ],
)
def test_addresses_of_this_machine_and_its_networks_are_not_public(number: str) -> None:
    assert not is_public(number)


@pytest.mark.parametrize(
    "number", ["8.8.8.8", "93.184.215.14", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_of_the_internet_are_public(number: str) -> None:
    assert is_public(number)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:{port}/", "an address of this machine"),
        ("http://localhost:{port}/", "an address of this machine"),
        ("http://127.1:{port}/", ""),
        ("http://2130706433:{port}/", ""),
        ("http://0x7f.0.0.1:{port}/", ""),
        ("http://[::1]:{port}/", ""),
        ("http://[::ffff:127.0.0.1]:{port}/", ""),
        ("http://0.0.0.0:{port}/", ""),
        ("http://localhost.:{port}/", ""),
        ("http://LOCALHOST:{port}/", ""),
        ("http://①②⑦.0.0.1:{port}/", ""),
        ("file:///etc/passwd", "only http and https"),
        ("ftp://example.org/", "only http and https"),
        ("gopher://127.0.0.1:{port}/", "only http and https"),
        ("data:text/html,x", "only http and https"),
        ("http://user@127.0.0.1:{port}/", "holds a user's name"),
        ("http://example.org:25/", "port 25 is none of web pages"),
        ("http:///x", ""),
        ("http://", ""),
        ("//127.0.0.1:{port}/", ""),
        ("http://a b/", ""),
        ("\0", ""),
        ("", ""),
        ("http://" + "a" * 5000, "more than 4000 characters"),
        ("http://169.254.169.254/latest/meta-data/", "169.254.169.254"),
        ("http://127.0.0.1:{port}\\@example.org/", ""),
        ("http://example.org@127.0.0.1:{port}/", "a user's name"),
    ],
)
def test_nothing_of_this_machine_is_opened(url: str, said: str) -> None:
    with WebSite({"/": html("Secret", "swordfish")}) as site:
        with pytest.raises(SourceError) as refused:
            Fetcher(public=True, seconds=5).fetch(url.format(port=site.port))
        assert said in str(refused.value)
        assert "\n" not in str(refused.value)
        assert site.asked == []


def test_a_host_that_was_named_is_opened_by_its_name_and_port_alone() -> None:
    with WebSite({"/": html("Page", "Text")}) as site, WebSite({"/": html("Other", "Text")}) as other:
        fetcher = Fetcher(True, [Named.of(site.host)])
        assert b"Text" in fetcher.fetch(f"{site.url}/").data
        for url in (f"{other.url}/", f"http://localhost:{site.port}/"):
            with pytest.raises(SourceError, match="did not name it"):
                fetcher.fetch(url)
        closed = Fetcher(False, [Named.of(site.url)])
        assert closed.fetch(f"{site.url}/").whole
        with pytest.raises(SourceError, match=r"example\.org.* only hosts that the user named"):
            closed.fetch("https://example.org/")


def test_each_redirect_is_looked_at_anew() -> None:
    with WebSite({"/secret": html("Secret", "swordfish")}) as inner, WebSite() as site:
        fetcher = Fetcher(True, [Named.of(site.host)], seconds=5)
        site.pages |= {
            "/in": redirect(f"{inner.url}/secret"), "/file": redirect("file:///etc/passwd"), "/loop": redirect("/loop"),
            "/twice": redirect("/once", 307), "/once": redirect("../end"), "/end": html("End", "here"),
            "/bad": redirect("http://[::bad/"), "/user": redirect(f"http://me:pw@{site.host}/end"),
        }  # fmt: skip
        for path, said in {
            "/in": "did not name it",
            "/file": "only http and https",
            "/loop": "redirects more than 5 times",
            "/bad": "no address",
            "/user": "a user's name",
        }.items():
            with pytest.raises(SourceError, match=said):
                fetcher.fetch(site.url + path)
        assert inner.asked == []
        assert fetcher.fetch(f"{site.url}/twice").url == f"{site.url}/end"


def test_a_name_that_means_another_host_a_moment_later_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check and connection see one resolution; an attacker's name server would answer a second question otherwise."""
    real, asked, connected = socket.getaddrinfo, list[str](), list[Any]()

    def resolve(host: str, port: int, *arguments: Any, **options: Any) -> Any:
        if host != "rebinding.example":
            return real(host, port, *arguments, **options)
        asked.append(host)
        number = "93.184.215.14" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port))]

    def connect(address: Any, *_: Any, **__: Any) -> socket.socket:
        connected.append(address[0])
        raise ConnectionRefusedError("no network in this test")

    with WebSite({"/": html("Secret", "swordfish")}) as site:
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(socket, "create_connection", connect)
        with pytest.raises(SourceError, match="cannot be read"):
            Fetcher(True).fetch(f"http://rebinding.example:{site.port}/")
        assert (asked, connected) == (["rebinding.example"], ["93.184.215.14"])
        with pytest.raises(SourceError, match=r"an address of this machine or its network \(127\.0\.0\.1\)"):
            Fetcher(True).fetch(f"http://rebinding.example:{site.port}/")
        assert connected == ["93.184.215.14"]


def test_a_host_of_several_addresses_is_reached_at_the_one_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def resolve(host: str, port: int, *arguments: Any, **options: Any) -> Any:
        if host != "localhost":
            return real(host, port, *arguments, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port)) for number in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with WebSite({"/": html("Page", "Text")}) as site:
        assert b"Text" in Fetcher(False, [Named("localhost")]).fetch(f"http://localhost:{site.port}/").data


def test_time_and_size_are_bounded_whatever_a_server_does() -> None:
    with WebSite() as site:
        site.pages |= {
            "/silent": Answer(site.silence()), "/drops": Answer(site.drops()), "/flood": Answer(site.flood(1 << 30)),
            "/headers": Answer(b"x", headers={f"X-{number}": "y" * 8000 for number in range(50)}),
            "/packed": Answer(b"\x1f\x8b", headers={"Content-Encoding": "gzip"}), "/gone": Answer(status=410),
        }  # fmt: skip
        fetcher = Fetcher(False, [Named.of(site.host)], seconds=0.6)
        started = time.monotonic()
        for path in ("/silent", "/drops"):
            with pytest.raises(SourceError, match=r"does not answer within 0\.6 s"):
                fetcher.fetch(site.url + path)
        assert time.monotonic() - started < 30
        for path, said in {"/headers": "cannot be read", "/packed": "not to pack", "/gone": "answers with 410"}.items():
            with pytest.raises(SourceError, match=said):
                fetcher.fetch(site.url + path)
        flooded = Fetcher(False, [Named.of(site.host)], seconds=30).fetch(f"{site.url}/flood", most=1 << 20)
        assert (len(flooded.data), flooded.whole) == (1 << 20, False)


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with WebSite({"/": html("Page", "Text")}) as site, WebSite() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert b"Text" in Fetcher(False, [Named.of(site.host)]).fetch(f"{site.url}/").data
        assert proxy.asked == []


@pytest.mark.parametrize("text", ["", "http://", "a b", "[", ":80"])
def test_what_is_no_host_cannot_be_named(text: str) -> None:
    with pytest.raises(SourceError, match="is no host"):
        Named.of(text)


def test_a_host_is_named_with_its_port() -> None:
    named = [Named.of(text) for text in ("Wiki.Example", "wiki.example:80", "http://wiki.example", "[::1]:8080")]
    assert named == [Named("wiki.example"), *[Named("wiki.example", 80)] * 2, Named("::1", 8080)]


# --- the web


def web(site: WebSite, **options: Any) -> Web:
    return Web(f"{site.url}/", allow=[site.host], **options)


def test_a_search_gives_results_and_their_pages_are_text() -> None:
    with WebSite() as site:
        site.pages |= {
            "/search": lambda query: found(
                {"title": "Tides\n explained", "url": f"{site.url}/tides", "content": f"About {query['q'][0]}"},
                {"title": None, "url": "https://example.org/", "content": 7},
            ),
            "/tides": html("Tides", "The moon", "pulls"),
        }
        source = web(site)
        assert source.search("sea & moon", 5) == [
            Hit("Tides explained", f"{site.url}/tides", "About sea & moon"),
            Hit("https://example.org/", "https://example.org/"),
        ]
        assert "format=json" in site.asked[0]
        assert len(source.search("x", 1)) == 1
        page = source.open(f"{site.url}/tides")
        assert page is not None
        assert (page.title, page.text) == ("Tides", "The moon\npulls")
        assert source.open("doc:docs/a.md") is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(b"<html>no JSON"), "sent no JSON"),
        (Answer(b'{"results": {}}'), "no list of results"),
        (Answer(b"[1]"), "no list of results"),
        (Answer(b"null"), "no list of results"),
        (Answer(b""), "sent no JSON"),
        (Answer(b'{"results": ' + b"[" * 100_000), "sent no JSON"),
        (Answer(b"\xff\xfe\xff"), "sent no JSON"),
        (Answer(status=403), "search.formats in its settings.yml"),
        (Answer(status=500), "answers with 500"),
        (redirect("http://127.0.0.1:1/"), "only hosts that the user named"),
        (redirect("https://example.org/"), "user named"),
    ],
)
def test_a_search_server_that_lies_is_a_sentence(answer: Answer, said: str) -> None:
    with WebSite({"/search": answer}) as site:
        with pytest.raises(SourceError) as refused:
            web(site, seconds=10).search("x", 5)
        assert said in str(refused.value)
        assert "\n" not in str(refused.value)


def test_results_of_wrong_types_are_left_out() -> None:
    wrong: list[Any] = [
        None,
        7,
        "text",
        [],
        {},
        {"url": 5},
        {"url": "javascript:alert(1)"},
        {"url": "file:///etc/passwd"},
        {"url": "https://x.example/" + "a" * 5000},
        {"url": "https://a.example/\u202e"},
        {"url": "https://right.example/", "title": ["x"]},
    ]
    with WebSite({"/search": found(*wrong)}) as site:
        assert web(site).search("x", 50) == [Hit("https://right.example/", "https://right.example/")]


def test_a_search_server_that_hangs_or_floods_is_given_up() -> None:
    with WebSite() as site:
        site.pages |= {"/search": Answer(site.silence(), "application/json")}
        with pytest.raises(SourceError, match=r"the search failed: .* does not answer within 0\.5 s"):
            web(site, seconds=0.5).search("x", 5)
        site.pages |= {"/search": Answer(site.flood(1 << 30), "application/json")}
        with pytest.raises(SourceError, match="sent more than 4 MiB"):
            web(site, seconds=60).search("x", 5)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (Answer("<meta charset=gbk><p>珊瑚礁".encode("gbk"), "text/html"), "珊瑚礁"),
        (Answer("<meta http-equiv=a content='text/html; charset=gb2312'><p>镕".encode("gbk"), "text/html"), "镕"),
        (Answer("<meta charset=shift_jis><p>珊瑚".encode("cp932"), "text/html"), "珊瑚"),
        (Answer("<meta charset=punycode><p>über".encode(), "text/html; charset=idna"), "über"),
        (Answer("<p>珊瑚礁，没有说明编码的网页。".encode(), "text/html"), "珊瑚礁，没有说明编码的网页。"),
        (Answer("<p>珊瑚礁".encode("gb18030"), "text/html; charset=GB18030"), "珊瑚礁"),
        (Answer("<p>über".encode("latin-1"), 'text/html; Charset="iso-8859-1"'), "über"),
        (Answer(b"<p>plain", "text/html; charset=no-such"), "plain"),
        (Answer(b"a < b", "text/plain"), "a < b"),
        (Answer(pdf("Abyssal plains"), "application/octet-stream"), "Abyssal plains"),
        (Answer(b'{"a": 1}', "application/json"), '{"a": 1}'),
        (Answer(b"<main><p>Right</main><footer>Imprint</footer><p>Outside", "text/html"), "Right"),
        (Answer(b"<div>" * 5_000 + b"deep", "text/html"), "deep"),
        (Answer(b"<p>a<p hidden>b</p><table><tr><td>1<td>2", "text/html"), None),
    ],
)
def test_pages_become_text(answer: Answer, text: str | None) -> None:
    with WebSite({"/": answer}) as site:
        page = web(site).open(f"{site.url}/")
        assert page is not None
        assert text is None or page.text.strip() == text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(b"\x89PNG", "image/png"), "image/png, which is no text"),
        (Answer(b"<script>x</script>"), "holds no text"),
        (Answer(b"%PDF-1.4 nothing", "application/pdf"), "it is damaged"),
        (Answer(status=404), "answers with 404"),
        (Answer(b""), "holds no text"),
    ],
)
def test_a_page_without_text_is_a_sentence(answer: Answer, said: str) -> None:
    with WebSite({"/": answer}) as site, pytest.raises(SourceError, match=said):
        web(site).open(f"{site.url}/")


@pytest.mark.parametrize("search", ["", "127.0.0.1:8888", "ftp://x", "http://me:pw@x/", "http://", "http://[x"])
def test_what_is_no_search_server_is_refused(search: str) -> None:
    with pytest.raises(SourceError, match=r"--search .*: give a SearXNG server"):
        Web(search)


# --- MCP servers


def server(
    answers: dict[str, Callable[[str], Any]], reads: bool = True, origin: str = "MCP server notes"
) -> list[Tool]:
    """The tools of an MCP server, as the client gives them."""
    made = []
    for name, answer in answers.items():
        schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}

        def call(answer: Callable[[str], Any] = answer, **arguments: Any) -> ToolResult:
            said = answer(arguments["text"])
            return said if isinstance(said, ToolResult) else ToolResult(said, False)

        made.append(Tool(name, name, schema, call, needs_approval=not reads, origin=origin))
    return made


def test_an_mcp_server_is_searched_and_its_results_are_fetched() -> None:
    results = json.dumps({"results": [{"id": "7", "title": "Tides", "url": "https://notes.example/7"}, 3]})
    whole = json.dumps({"id": "7", "title": "Tides!", "text": "The moon pulls."})
    (source,) = mcp_sources(server({"search": lambda _: results, "fetch": lambda key: whole if key == "7" else "{}"}))
    (hit,) = source.search("moon", 5)
    assert (hit.title, hit.link) == ("Tides", "https://notes.example/7")
    page = source.open(hit.url)
    assert page is not None
    assert (page.title, page.text, page.link) == ("Tides!", "The moon pulls.", "https://notes.example/7")
    assert source.open("https://notes.example/7") is None
    with pytest.raises(SourceError, match="notes gave no such result"):
        source.open("mcp:notes/0123")


def test_an_mcp_server_that_answers_in_text_is_quoted() -> None:
    (source,) = mcp_sources(server({"search": lambda query: f"All about {query}."}))
    (hit,) = source.search("moon", 5)
    page = source.open(hit.url)
    assert page is not None
    assert page.text == "All about moon."
    assert McpSource("MCP server x", server({"search": lambda _: ""})).search("moon", 5) == []


@pytest.mark.parametrize(
    "answer", ["null", "7", "[[[]]]", '{"results": 5}', '{"results": [{"id": {}}]}', '{"results": [{}]}']
)
def test_an_mcp_server_that_lies_is_no_error(answer: str) -> None:
    (source,) = mcp_sources(server({"search": lambda _: answer, "fetch": lambda _: answer}))
    for hit in source.search("moon", 5):
        with suppress(SourceError):
            source.open(hit.url)


def test_an_mcp_server_that_cannot_search_or_may_write_is_refused() -> None:
    with pytest.raises(SourceError, match="'notes' has no tool called search"):
        mcp_sources(server({"add": str}))
    with pytest.raises(SourceError, match="may write, as far as it says"):
        mcp_sources(server({"search": str}, reads=False))
    (source,) = mcp_sources(server({"search": lambda _: ToolResult("Error: no", True)}))
    with pytest.raises(SourceError, match=r"search \(MCP server notes\): Error: no"):
        source.search("moon", 5)
    two = [*server({"search": str}), *server({"notes__search": str}, origin="MCP server b")]
    assert [source.name for source in mcp_sources(two)] == ["b", "notes"]
