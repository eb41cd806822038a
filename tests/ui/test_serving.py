"""Who gets in: the page's routes over HTTP, as a foreign page or a rebinding name server would ask for them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from glm4lite.base.sentences import Sentence
from glm4lite_ui.chats import Chat, Turn
from tests.ui.conftest import Serve, Site


@pytest.fixture(scope="module")
def asking(empty_site: Site) -> Iterator[httpx.Client]:
    """Of the page that all tests share which change nothing."""
    with httpx.Client(base_url=empty_site.url, trust_env=False) as client:
        yield client


@pytest.fixture
def site(serve: Serve) -> Site:
    return serve()


@pytest.fixture
def client(site: Site) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.url, trust_env=False) as client:
        yield client


def test_the_page_may_load_and_reach_only_itself(asking: httpx.Client) -> None:
    answer = asking.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    for rule in ("default-src 'self'", "connect-src 'self'", "img-src 'self' data:", "frame-src 'none'"):
        assert rule in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "googleapis" not in answer.text


ROUTES = ["/", "/config", "/page/events?window=x", "/page/chats", "/page/static/page.js", "/export/x.md"]


@pytest.mark.parametrize("path", ROUTES)
def test_a_rebound_name_is_refused_everywhere(asking: httpx.Client, path: str) -> None:
    assert asking.get(path, headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize("path", ["/page/show", "/page/chats/0123456789abcdef/send", "/page/model/load", "/page/ack"])
def test_a_foreign_page_cannot_post(asking: httpx.Client, path: str) -> None:
    for origin in ("http://evil.example", "null"):
        assert asking.post(path, json={"data": []}, headers={"Origin": origin}).status_code == 403
    assert asking.post(path, json={"data": []}, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_a_foreign_page_cannot_upload_listen_or_send_a_form(asking: httpx.Client, empty_site: Site) -> None:
    refused = asking.post("/page/files?name=a.txt", content=b"text", headers={"Origin": "http://evil.example"})
    assert refused.status_code == 403
    stream = asking.get("/page/events?window=x", headers={"Sec-Fetch-Site": "cross-site"})
    assert stream.status_code == 403
    form = {"Content-Type": "text/plain"}  # what a page may send without asking first; a browser adds its Origin
    sent = asking.post("/page/chats/0123456789abcdef/send", content=b'{"text": "Hi"}', headers=form)
    assert sent.status_code == 422
    assert empty_site.runtime.store.summaries() == []


def test_no_answer_of_the_pages_routes_is_a_page_or_may_be_shared(asking: httpx.Client) -> None:
    for path in ("/page/chats", "/page/model", "/page/static/page.js", "/page/chats/x/turns/y"):
        answer = asking.get(path)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("/page/chats/..%2f..%2fx/send", {"text": "Hi"}, ""),
        ("/page/chats/x/send", {"text": "Hi"}, "is not the name of a chat"),
        ("/page/chats/0123456789abcdef/send", {"text": " "}, "the message is empty"),
        ("/page/chats/0123456789abcdef/send", {"text": 5}, "text cannot be used: "),
        ("/page/chats/0123456789abcdef/set", {"top_p": 7}, "top_p must be a number between 0 and 1, found 7"),
        ("/page/chats/0123456789abcdef/turns/abc/regenerate", {}, "this turn is not there any more"),
        ("/page/model/load", {"source": " "}, "name a model"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    asking: httpx.Client, empty_site: Site, path: str, body: dict[str, object], problem: str
) -> None:
    answer = asking.post(path, json=body)
    assert answer.status_code in (404, 409, 422)
    if problem:
        assert problem in Sentence.from_json(answer.json()["error"])
    assert "Traceback" not in answer.text
    assert empty_site.runtime.store.summaries() == []


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/static/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/assets/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/svelte/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/gradio_api/proxy=http://evil.example/",
        "/gradio_api/openapi.json",
        "/gradio_api/info",
        "/gradio_api/runs",
        "/gradio_api/queue/data?session_hash=x",
        "/gradio_api/heartbeat/x",
        "/gradio_api/startup-events",
        "/gradio_api/app_id",
        "/page/static/..%2fserving.py",
        "/page/static/../serving.py",
        "/gradio_api/vibe-code/",
        "/monitoring",
        "/docs",
        "/export/..%2f..%2fetc%2fpasswd.md",
        "/export/0123456789abcdefx.md",
    ],
)
def test_no_file_and_no_page_of_gradios_own_is_served(asking: httpx.Client, path: str) -> None:
    answer = asking.get(path)
    assert answer.status_code in (400, 403, 404)
    assert "root:" not in answer.text


def test_none_of_gradios_own_calls_is_there(asking: httpx.Client) -> None:
    for path in ("call/send", "api/send", "run/predict", "component_server", "queue/join", "upload", "cancel", "reset"):
        assert asking.post(f"/gradio_api/{path}", json={"data": []}).status_code in (404, 405)


def test_a_file_is_read_and_kept_nowhere(client: httpx.Client, site: Site) -> None:
    read = client.post("/page/files?name=../../a.txt", content="text 中".encode())
    assert (read.json()["text"], read.json()["tokens"] > 0) == ("text 中", True)
    assert client.post("/page/files?name=a", content=b"x" * (65 << 20)).status_code == 409
    assert [path for path in site.runtime.store.folder.rglob("*") if path.is_file()] == []


def test_exports_are_downloads_with_a_safe_name(client: httpx.Client, site: Site) -> None:
    chat = Chat.of(Turn("Hi"), title='<b>/../"x"\r\nX: y')
    site.runtime.store.save(chat)
    answer = client.get(f"/export/{chat.id}.md")
    assert answer.status_code == 200
    assert answer.headers["content-disposition"] == "attachment; filename*=utf-8''b-x-X-y.md"
    assert answer.headers["content-type"].startswith("text/markdown")


def test_all_chats_are_one_archive(client: httpx.Client, site: Site) -> None:
    for question in ("Hi", "你好"):
        site.runtime.store.save(Chat.of(Turn(question), title=question))
    answer = client.get("/export/all.zip")
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-disposition"].startswith("attachment; filename=glm4lite-chats-")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
        assert sorted(name.split("-")[0] for name in packed.namelist()) == ["json/Hi", "json/你好", "md/Hi", "md/你好"]
        assert packed.testzip() is None


def test_an_exported_archive_is_imported(client: httpx.Client, site: Site) -> None:
    chat = Chat.of(Turn("Hi"), title="Hi")
    site.runtime.store.save(chat)
    archive = client.get("/export/all.zip").content
    site.runtime.store.delete(chat.id)
    answer = client.post("/page/import?name=chats.zip", content=archive)
    assert answer.json() == {"said": [{"said": "Imported 1 chat."}], "chats": [chat.id], "skipped": [], "left_out": {}}
    again = client.post("/page/import?name=chats.zip", content=archive).json()
    assert again["skipped"] == [["Hi", "it is here already"]]
    refused = client.post("/page/import?name=../a%0Ab.txt", content=b"no")
    assert refused.status_code == 409
    assert Sentence.from_json(refused.json()["error"]).startswith("ab.txt cannot be imported: it is no JSON")
    elsewhere = client.post("/page/import?name=a", content=archive, headers={"Origin": "http://example.com"})
    assert elsewhere.status_code == 403


def test_an_import_that_is_too_large_is_refused_while_it_comes(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm4lite_ui.transfer.LARGEST", 1 << 20)
    answer = client.post("/page/import?name=a.json", content=b"[" + b" " * (2 << 20))
    assert "a.json cannot be imported: it is larger than 1 MiB" in Sentence.from_json(answer.json()["error"])


def test_the_api_is_served_beside_the_page(client: httpx.Client, site: Site, tmp_path: Path) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "nano"
    assert client.get("/health").json()["status"] == "ok"
    assert client.get("/v1/nowhere").json()["error"]["message"] == "GET /v1/nowhere: Not Found"
    site.runtime.source = str(tmp_path)  # as after another model was loaded
    assert client.get("/v1/models").json()["data"][0]["id"] == tmp_path.name


def test_a_window_that_was_closed_holds_no_connection(asking: httpx.Client, empty_site: Site) -> None:
    open_before = len(empty_site.server.server_state.connections)
    with httpx.Client() as other, other.stream("GET", f"{empty_site.url}/page/events?window=gone") as stream:
        assert "hello" in next(stream.iter_text())  # and nothing more, for no answer goes on
    deadline = time.monotonic() + 5
    while len(empty_site.server.server_state.connections) > open_before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(empty_site.server.server_state.connections) <= open_before


def test_ending_with_an_open_page_is_quick_and_logs_nothing(
    client: httpx.Client, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    with client.stream("GET", "/page/events?window=x") as stream:
        assert next(stream.iter_lines()) is not None
        started = time.monotonic()
        site.close()
        assert time.monotonic() - started < 8  # uvicorn alone would wait for the stream without end
    assert not caplog.records


STRANGE = {
    "ALL_PROXY": "socks5://127.0.0.1:9", "http_proxy": "::nonsense[", "Https_Proxy": "socks4://127.0.0.1:9",
    "no_proxy": "[::1/8,*", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": "x", "GRADIO_NUM_PORTS": "x",
    "GRADIO_SHARE": "True", "GRADIO_ROOT_PATH": "/elsewhere", "GRADIO_ANALYTICS_ENABLED": "True",
    "GRADIO_MCP_SERVER": "1",
    "GRADIO_ALLOWED_PATHS": "/", "GRADIO_TEMP_DIR": "/proc/nowhere", "GRADIO_SSR_MODE": "True",
    "GRADIO_NUM_WORKERS": "x", "LC_ALL": "C", "PYTHONUTF8": "0",
}  # fmt: skip


def test_nothing_in_the_environment_stops_the_page_or_opens_it(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | STRANGE
    environment["XDG_DATA_HOME"] = str(tmp_path)  # not the MCP servers of who runs this
    command = [sys.executable, "-m", "glm4lite", "ui", "--port", "0", "--chats", str(tmp_path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if not line.startswith("nano is"))
        try:
            assert "Open http://127.0.0.1:" in said
            with httpx.Client(base_url=said.split()[1], trust_env=False) as client:
                assert client.get("/").status_code == 200
                config = client.get("/config").json()
                assert client.get("/gradio_api/file=/etc/hostname").status_code == 404
            assert config["root"] == said.split()[1]
            assert config["analytics_enabled"] is False
        finally:
            process.terminate()


def test_proxies_are_there_again_for_downloads(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    serve()
    assert os.environ["HTTPS_PROXY"] == "http://127.0.0.1:9"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system tells no process's time in /proc")
def test_the_first_line_comes_before_what_is_slow_and_an_idle_page_computes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "glm4lite", "ui", "--port", "0", "--chats", str(tmp_path)]
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path)}  # not the MCP servers of who runs this
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = list[str]()
        try:
            while not lines or "Open http://" not in lines[-1]:
                lines.append(process.stderr.readline())
            (first,) = [place for place, line in enumerate(lines) if line.startswith("nano is")]
            slow = [line.rsplit("|")[-1].strip() in ("torch", "gradio", "numpy") for line in lines]
            assert any(slow)
            assert not any(slow[:first])
            url = lines[-1].split()[1]
            with httpx.Client(base_url=url, trust_env=False) as client, client.stream("GET", "/page/events?window=x"):
                time.sleep(1)
                before = cpu_seconds(process.pid)
                time.sleep(4)
                assert cpu_seconds(process.pid) - before < 0.05
        finally:
            process.terminate()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
