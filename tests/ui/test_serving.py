"""Who gets in: the page's routes over HTTP, as a foreign page or a rebinding name server would ask for them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from glm4lite.errors import Glm4liteError
from glm4lite_ui.chats import Chat, Turn
from tests.ui.conftest import Serve, Site


@pytest.fixture
def site(serve: Serve) -> Site:
    return serve()


@pytest.fixture
def client(site: Site) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.url, trust_env=False) as client:
        yield client


def test_the_page_may_load_and_reach_only_itself(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    for rule in ("default-src 'self'", "connect-src 'self'", "img-src 'self' data:", "frame-src 'none'"):
        assert rule in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "googleapis" not in answer.text


ROUTES = ["/", "/config", "/gradio_api/queue/data?session_hash=x", "/gradio_api/heartbeat/x", "/export/x.md"]


@pytest.mark.parametrize("path", ROUTES)
def test_a_rebound_name_is_refused_everywhere(client: httpx.Client, path: str) -> None:
    assert client.get(path, headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize("path", ["/gradio_api/run/predict", "/gradio_api/queue/join", "/gradio_api/cancel"])
def test_a_foreign_page_cannot_post(client: httpx.Client, path: str) -> None:
    for origin in ("http://evil.example", "null"):
        assert client.post(path, json={"data": []}, headers={"Origin": origin}).status_code == 403
    assert client.post(path, json={"data": []}, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_a_foreign_page_cannot_upload_or_listen(client: httpx.Client) -> None:
    files = {"files": ("a.txt", b"text")}
    refused = client.post("/gradio_api/upload", files=files, headers={"Origin": "http://evil.example"})
    assert refused.status_code == 403
    stream = client.get("/gradio_api/queue/data?session_hash=x", headers={"Sec-Fetch-Site": "cross-site"})
    assert stream.status_code == 403


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
        "/gradio_api/vibe-code/",
        "/monitoring",
        "/docs",
        "/export/..%2f..%2fetc%2fpasswd.md",
        "/export/0123456789abcdefx.md",
    ],
)
def test_no_file_and_no_page_of_gradios_own_is_served(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code in (400, 403, 404)
    assert "root:" not in answer.text


def test_direct_calls_of_the_pages_functions_by_name_are_not_there(client: httpx.Client) -> None:
    for path in (
        "/gradio_api/call/send",
        "/gradio_api/api/send",
        "/gradio_api/run/send",
        "/gradio_api/component_server",
    ):
        assert client.post(path, json={"data": []}).status_code in (404, 405)


def test_an_upload_is_limited_in_size_and_not_served_again(client: httpx.Client) -> None:
    assert client.post("/gradio_api/upload", files={"files": ("a.txt", b"x" * 3_000_000)}).status_code == 413
    kept = client.post("/gradio_api/upload", files={"files": ("a.txt", b"text")})
    assert kept.status_code == 200
    assert client.get(f"/gradio_api/file={kept.json()[0]}").status_code == 404


@pytest.mark.parametrize("kind", ["path", "address"])
def test_a_file_that_was_not_uploaded_cannot_be_attached(
    client: httpx.Client, site: Site, tmp_path: Path, kind: str
) -> None:
    """A path that somebody made up, in place of an upload's; Gradio itself checks it only outside a mounted app."""
    (tmp_path / "secret.txt").write_text("do not read")
    path = str(tmp_path / "secret.txt") if kind == "path" else f"{site.url}/health?secret.txt"
    named = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "secret.txt"}
    kept = client.post("/gradio_api/upload", files={"files": ("mine.txt", b"read this")}).json()[0]
    uploaded = {"path": kept, "meta": {"_type": "gradio.FileData"}, "orig_name": "mine.txt"}
    assert "mine.txt: " in weigh(client, uploaded)
    assert "secret" not in weigh(client, named)


def test_an_example_is_text_whatever_its_event_names(client: httpx.Client, site: Site, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("do not read")
    events = client.get("/config").json()["dependencies"]
    (number,) = [event["id"] for event in events if event["targets"][0][1] == "example_select"]
    value = {"text": "Hi", "files": [str(tmp_path / "secret.txt")]}
    body = {"data": ["0" * 16], "event_data": {"index": 0, "value": value}, "fn_index": number, "session_hash": "s"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    with client.stream("GET", "/gradio_api/queue/data?session_hash=s") as stream:
        next(line for line in stream.iter_lines() if "process_completed" in line)
    (chat,) = site.runtime.store.find()
    assert [(turn.user, turn.files) for turn in chat.turns] == [("Hi", [])]


def weigh(client: httpx.Client, file: dict[str, object]) -> str:
    """What the handler that counts an attachment's tokens says, called as the page calls it."""
    events = client.get("/config").json()["dependencies"]
    (number,) = [event["id"] for event in events if len(event["inputs"]) == 3 and event["targets"][0][1] == "change"]
    body = {"data": [{"text": "x", "files": [file]}, None, None], "fn_index": number, "session_hash": "s"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    with client.stream("GET", "/gradio_api/queue/data?session_hash=s") as stream:
        return next(line for line in stream.iter_lines() if "process_completed" in line)


def test_exports_are_downloads_with_a_safe_name(client: httpx.Client, site: Site) -> None:
    chat = Chat.of(Turn("Hi"), title='<b>/../"x"\r\nX: y')
    site.runtime.store.save(chat)
    answer = client.get(f"/export/{chat.id}.md")
    assert answer.status_code == 200
    assert answer.headers["content-disposition"] == "attachment; filename*=utf-8''b-x-X-y.md"
    assert answer.headers["content-type"].startswith("text/markdown")


def test_the_api_is_served_beside_the_page(client: httpx.Client, site: Site, tmp_path: Path) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "nano"
    assert client.get("/health").json()["status"] == "ok"
    assert client.get("/v1/nowhere").json()["error"]["message"] == "GET /v1/nowhere: Not Found"
    site.runtime.source = str(tmp_path)  # as after another model was loaded
    assert client.get("/v1/models").json()["data"][0]["id"] == tmp_path.name


def test_the_folder_of_uploads_is_gone_after_the_end(client: httpx.Client, site: Site) -> None:
    kept = Path(client.post("/gradio_api/upload", files={"files": ("a.txt", b"text")}).json()[0])
    assert kept.read_bytes() == b"text"
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert kept.is_relative_to(folder)
    site.close()
    assert not folder.exists()


def test_ending_with_an_open_page_is_quick_and_logs_nothing(
    client: httpx.Client, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    with client.stream("GET", "/gradio_api/heartbeat/x") as stream:
        assert next(stream.iter_lines()) is not None
        started = time.monotonic()
        site.close()
        assert time.monotonic() - started < 1.5
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


def test_without_a_place_for_uploads_nothing_is_served(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(Glm4liteError, match=r"uploads cannot be kept .* set TMPDIR to a folder you can write"):
        serve()
