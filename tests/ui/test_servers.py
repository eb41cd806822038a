"""MCP servers that are added on the page: real servers in processes of their own, from the form to the model's call."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from glm4lite.base.errors import Glm4liteError, ToolError
from glm4lite.base.sentences import Sentence
from glm4lite.text.messages import ToolCall
from glm4lite.tools.mcp_client import connection
from glm4lite.tools.mcp_config import ServerConfig
from glm4lite.tools.running import run_tool
from glm4lite_ui.chats import Settings
from glm4lite_ui.saved.servers import ServerFile
from glm4lite_ui.servers import Servers, entry_of
from tests.commands import forked
from tests.glm4lite.test_mcp import BAD, GOOD, ended
from tests.ui.acts import ask, wait_for_end
from tests.ui.conftest import Serve, Site

Visit = Callable[..., Any]
PLAIN = str(Path(__file__).with_name("plain_server.py"))
WEATHER = "How is the weather in Lisbon?"


def line(script: str, *arguments: str) -> str:
    """A server's command line."""
    return shlex.join([sys.executable, script, *arguments])


def entry(script: str, *arguments: str, **more: Any) -> dict[str, Any]:
    return {"command": sys.executable, "args": [script, *arguments], **more}


def open_form(page: Any) -> None:
    if not page.is_visible("#settings"):
        page.click("#open-settings")
    page.wait_for_selector("#tools fieldset")
    if not page.is_visible("#server-name"):
        page.click("#add-server summary")


def add(page: Any, name: str, command: str, **more: str) -> None:
    """Fills in the form and sends it."""
    open_form(page)
    fill(page, name, command, **more)


def fill(page: Any, name: str, command: str, **more: str) -> None:
    """The same where it is open."""
    for field, text in {"name": name, "command": command, **more}.items():
        page.fill(f"#server-{field}", text)
    page.click("#add-server button[type=submit]")


def wait_for_server(page: Any, name: str, state: str = "connected") -> Any:
    """Its part of the sheet, as soon as it says so."""
    page.wait_for_selector(f'[data-origin="MCP server {name}"][data-state={state}]', state="attached")
    return page.locator(f'[data-origin="MCP server {name}"]')


def kept(site: Site) -> dict[str, Any]:
    """What the file holds."""
    return ServerFile(site.runtime.toolset.servers.file.path).entries()


def pid_of(site: Site, name: str) -> int:
    """Of a server that is connected, or will be in a moment."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        (server,) = (one for one in site.runtime.toolset.servers.all() if one.config.name == name)
        for tool in (one for one in server.tools if one.name.endswith("process")):
            return int(run_tool(tool, ToolCall("1", tool.name, "{}"), 10).content)
        time.sleep(0.02)
    raise AssertionError(f"{name} has no tools: {server.state}")


def write(folder: Path, servers: dict[str, Any]) -> Path:
    path = folder / "kept" / "mcp.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"mcpServers": servers}))
    return path


def test_a_server_is_added_called_kept_over_a_restart_and_removed(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    first = serve(folder=tmp_path / "kept")
    page = visit(first.url)
    open_form(page)
    assert "runs with your rights" in page.inner_text("#add-server")
    add(page, "weather", line(GOOD, "stdio"), env="GIVEN=secret")
    page.wait_for_selector(".toast >> text=weather is connected: 12 tools.")
    part = wait_for_server(page, "weather")
    assert "get_weather" in part.inner_text()
    assert "GIVEN=…" in part.inner_text()
    assert "secret" not in page.inner_text("#settings")
    assert page.evaluate("document.activeElement.textContent") == "Add an MCP server"
    assert kept(first) == {"weather": entry(GOOD, "stdio", env={"GIVEN": "secret"})}
    assert first.runtime.toolset.servers.file.path.stat().st_mode & 0o777 == 0o600
    page.keyboard.press("Escape")
    ask(page, WEATHER)
    page.wait_for_selector("#asking >> text=Run get_weather of MCP server weather?")
    page.wait_for_timeout(500)
    page.click("#asking button:text-is('Approve')")
    page.wait_for_selector("text=18 degrees and sunny in Lisbon")
    wait_for_end(page)
    page.context.close()
    first.close()

    second = serve(folder=tmp_path / "kept")
    page = visit(second.url)
    page.click("#open-settings")
    part = wait_for_server(page, "weather")
    pid = pid_of(second, "weather")
    page.on("dialog", lambda dialog: dialog.accept())
    part.get_by_text("Remove").click()
    part.wait_for(state="detached")
    assert ended(pid)
    assert kept(second) == {}
    assert [tool.name for tool in second.runtime.toolset.tools()] == ["calculator", "current_time", "unit_convert"]


REFUSED = {
    "no-such-program --at-all": "there is no program 'no-such-program'",
    shlex.join([sys.executable, "-c", "import sys; sys.exit('no token given')"]): "no token given",
    line(BAD, "silent"): "did not answer within 1 s",
    line(BAD, "bad-list"): "inputSchema",
    "'unclosed": "the command line: No closing quotation",
    " ": "needs a command line or an address",
}


def test_a_server_that_cannot_be_added_is_said_in_the_form_and_not_kept(
    serve: Serve, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = serve()
    page = visit(site.url)
    open_form(page)
    for command, problem in REFUSED.items():
        monkeypatch.setattr(connection, "START_LIMIT_S", 1.0 if "silent" in command else 30.0)
        fill(page, "new", command)
        page.wait_for_selector(f'#add-problem:has-text("{problem}")')
        assert page.input_value("#server-command") == command  # to be mended
        assert page.is_enabled("#add-server button[type=submit]")
        page.wait_for_selector('[data-origin="MCP server new"]', state="detached")
        assert not site.runtime.toolset.servers.file.path.exists()
        assert site.runtime.toolset.servers.all() == []
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs each answer that is a refusal


def test_a_server_that_hangs_while_it_is_added_is_shown_and_can_be_given_up(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    add(page, "slow", line(BAD, "silent"))
    page.wait_for_selector("text=Connecting to slow…")
    wait_for_server(page, "slow", "connecting")
    (server,) = site.runtime.toolset.servers.all()
    pid = started(server)
    page.click("#add-server button:text-is('Cancel')")
    page.wait_for_selector("#add-problem >> text=slow")
    assert ended(pid)
    page.wait_for_selector('[data-origin="MCP server slow"]', state="detached")
    assert page.is_enabled("#add-server button[type=submit]")
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs each answer that is a refusal


def started(server: Any) -> int:
    """The process of a server that is being connected."""
    children = Path(f"/proc/{os.getpid()}/task")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for task in children.iterdir():
            for pid in (task / "children").read_text().split():
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if server.config.args[-1].encode() in command:
                    return int(pid)
        time.sleep(0.02)
    raise AssertionError("no process was started")


def test_servers_with_tools_of_one_name_stand_beside_each_other(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    add(page, "one", line(PLAIN))
    wait_for_server(page, "one")
    add(page, "one", line(PLAIN))
    page.wait_for_selector("#add-problem >> text=there is an MCP server called 'one' already")
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs each answer that is a refusal
    add(page, "two", line(PLAIN))
    part = wait_for_server(page, "two")
    assert "two__add" in part.inner_text()
    assert page.locator('[data-origin="MCP server one"] strong >> text="add"').count() == 1
    pids = {pid_of(site, "one"), pid_of(site, "two")}
    assert len(pids) == 2
    add(page, "odd", line(BAD, "bad-tools"))
    part = wait_for_server(page, "odd")
    assert "a second tool 'good' is left out" in part.inner_text()
    assert page.evaluate(
        "document.querySelector('#settings').scrollWidth <= document.querySelector('#settings').clientWidth"
    )


def test_a_server_that_failed_at_the_start_is_listed_and_restarted_from_the_file(
    serve: Serve, visit: Visit, tmp_path: Path
) -> None:
    file = write(tmp_path / "chats", {"good": entry(PLAIN), "gone": {"command": "no-such-program"}})
    site = serve()
    page = visit(site.url)
    page.click("#open-settings")
    wait_for_server(page, "good")  # which the other did not hold up
    part = wait_for_server(page, "gone", "failed")
    assert "there is no program 'no-such-program'" in part.inner_text()
    file.write_text(json.dumps({"mcpServers": {"good": entry(PLAIN), "gone": entry(BAD, "garbage")}}))
    part.get_by_text("Restart").click()
    wait_for_server(page, "gone")
    before = pid_of(site, "good")
    page.locator('[data-origin="MCP server good"]').get_by_text("Restart").click()
    assert ended(before)
    assert pid_of(site, "good") != before
    wait_for_server(page, "good")


def test_a_server_is_added_by_its_address(serve: Serve, visit: Visit) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, GOOD, "http", str(port)]) as process:
        try:
            wait_for_port(port)
            site = serve()
            page = visit(site.url)
            open_form(page)
            page.select_option("#server-kind", "url")
            assert not page.is_visible("#server-command")
            page.fill("#server-name", "web")
            page.fill("#server-url", f"http://127.0.0.1:{port}/mcp")
            page.fill("#server-headers", "Authorization: Bearer abc")
            page.click("#add-server button[type=submit]")
            part = wait_for_server(page, "web")
            assert "abc" not in part.inner_text()
            assert kept(site) == {
                "web": {"url": f"http://127.0.0.1:{port}/mcp", "headers": {"Authorization": "Bearer abc"}}
            }
        finally:
            process.kill()


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)


def test_a_new_servers_tools_are_on_in_the_chat_it_was_added_in(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    ask(page, "Hi")
    wait_for_end(page)
    page.click("#open-settings")
    page.get_by_role("checkbox", name="calculator").uncheck()
    page.wait_for_timeout(600)
    add(page, "weather", line(PLAIN))
    wait_for_server(page, "weather")
    page.wait_for_timeout(800)
    tools = site.runtime.store.find()[0].settings.tools
    assert tools is not None
    assert "get_weather" in tools
    assert "calculator" not in tools


def test_what_is_off_stays_off_while_a_server_is_away(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    write(tmp_path / "chats", {"gone": {"command": "no-such-program"}})
    site = serve()
    page = visit(site.url)
    ask(page, "Hi")
    wait_for_end(page)
    (chat,) = site.runtime.store.find()
    site.runtime.set(chat.id, Settings(tools=["current_time", "unit_convert", "of_the_one_that_is_away"]))
    page.click("#open-settings")
    wait_for_server(page, "gone", "failed")
    page.get_by_role("checkbox", name="calculator").check()
    page.wait_for_timeout(800)
    tools = site.runtime.store.find()[0].settings.tools
    assert tools is not None  # all that are there are on, and those of the other one are still chosen
    assert sorted(tools) == ["calculator", "current_time", "of_the_one_that_is_away", "unit_convert"]


# The file


def test_a_variable_stays_in_the_file_and_is_filled_in_for_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "t0k3n")
    servers = Servers(ServerFile(tmp_path / "mcp.json"), (), tuple)
    try:
        servers.add("x", entry_of({"command": line(PLAIN), "env": "GIVEN=${MY_TOKEN}\n\nB = 2"}))
        (tool,) = (tool for tool in servers.all()[0].tools if tool.name == "environment")
        call = ToolCall("1", tool.name, '{"name": "GIVEN"}')
        assert run_tool(tool, call, 10, approve=lambda *_: True).content == "t0k3n"
        assert "t0k3n" not in (tmp_path / "mcp.json").read_text()
    finally:
        servers.close()


@pytest.mark.parametrize("key", ["env", "headers"])
def test_a_line_that_is_no_pair_is_named(key: str) -> None:
    with pytest.raises(ToolError, match="'nonsense' is not of the form"):
        entry_of({"command": "x", "url": "http://x", key: "nonsense"})


def test_the_file_keeps_what_else_stands_in_it_and_a_crash_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "mcp.json"
    path.parent.mkdir()
    path.write_text('{"inputs": [1], "servers": {"old": {"command": "x", "autoApprove": ["*"]}}}')
    file = ServerFile(path)
    file.put("new", {"command": "y"})
    whole = json.loads(path.read_text())
    assert whole == {
        "inputs": [1],
        "servers": {"old": {"command": "x", "autoApprove": ["*"]}, "new": {"command": "y"}},
    }

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glm4lite_ui.saved.store.os.fsync", full)
    with pytest.raises(Glm4liteError, match="the MCP server could not be saved: No space left"):
        file.remove("old")
    assert json.loads(path.read_text()) == whole
    assert [one.name for one in path.parent.iterdir()] == ["mcp.json"]


def test_a_server_that_cannot_be_kept_is_ended(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    servers = Servers(ServerFile(tmp_path / "file" / "mcp.json"), (), tuple)
    before = threading.active_count()
    with pytest.raises(Glm4liteError, match="no MCP server can be kept here"):
        servers.add("x", entry(PLAIN))
    assert servers.all() == []
    assert threading.active_count() <= before


def test_a_damaged_file_is_said_and_not_written_over(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    path = write(tmp_path / "chats", {})
    path.write_text("{ not JSON")
    site = serve()
    page = visit(site.url)
    page.click("#open-settings")
    page.wait_for_selector("#tool-groups >> text=mcp.json is not JSON")
    add(page, "x", line(PLAIN))
    page.wait_for_selector("#add-problem >> text=mcp.json is not JSON")
    assert path.read_text() == "{ not JSON"
    assert site.runtime.toolset.servers.all() == []
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs each answer that is a refusal


def test_a_server_of_the_command_line_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"weather": entry(PLAIN)}}))
    servers = Servers(ServerFile(tmp_path / "mcp.json"), ["weather"], tuple)
    servers.start()
    deadline = time.monotonic() + 10
    while servers.all()[0].state == "connecting" and time.monotonic() < deadline:
        time.sleep(0.01)
    (server,) = servers.all()
    assert (server.state, server.problem) == ("failed", "--mcp names a server of the same name")
    with pytest.raises(ToolError, match="already"):
        servers.add("weather", entry(PLAIN))
    assert server.config == ServerConfig("weather")  # nothing was started


@pytest.mark.skipif(sys.platform != "linux", reason="the user's folder is named otherwise")
@pytest.mark.parametrize("switch", [(), pytest.param(("--servers-from-elsewhere",), marks=pytest.mark.slow)])
def test_the_command_connects_what_lies_in_the_users_folder(tmp_path: Path, switch: tuple[str, ...]) -> None:
    file = ServerFile(tmp_path / "glm4lite" / "mcp.json")
    file.put("weather", entry(PLAIN))
    command = [*forked(), "ui", "--port", "0", "--chats", str(tmp_path / "chats"), *switch]
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            url = next(line for line in process.stderr if "Open http" in line).split()[1]
            with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
                deadline, state = time.monotonic() + 30, ""
                while state != "connected" and time.monotonic() < deadline:
                    time.sleep(0.1)
                    (group,) = (one for one in client.get("/page/tools").json()["groups"] if one["name"] == "weather")
                    state = group["state"]
                assert "get_weather" in [tool["name"] for tool in group["tools"]]
                headers = {"Origin": url, "X-Forwarded-For": "203.0.113.9"}
                removed = client.delete("/page/servers?name=weather", headers=headers)
                assert removed.status_code == (200 if switch else 409)
        finally:
            process.terminate()
    assert list(file.entries()) == ([] if switch else ["weather"])


# Who may add one: it is a program that runs with the user's rights


@pytest.fixture
def client(serve: Serve) -> Iterator[tuple[Site, httpx.Client]]:
    site = serve()
    with httpx.Client(base_url=site.url, trust_env=False, timeout=30) as client:
        yield site, client


def post(client: httpx.Client, site: Site, **headers: str) -> httpx.Response:
    body = {"name": "x", "fields": {"command": line(PLAIN)}}
    return client.post("/page/servers", json=body, headers={"Origin": site.url} | headers)


def test_the_user_of_this_machine_may_add_a_server(client: tuple[Site, httpx.Client]) -> None:
    site, asking = client
    assert asking.get("/page/tools").json()["refused"] == ""
    assert post(asking, site).status_code == 200
    assert asking.delete("/page/servers?name=x", headers={"Origin": site.url}).status_code == 200


def test_who_comes_through_a_proxy_may_not(client: tuple[Site, httpx.Client]) -> None:
    site, asking = client
    for header in ("X-Forwarded-For", "Forwarded", "X-Forwarded-Host", "Via", "CF-Connecting-IP"):
        answer = post(asking, site, **{header: "203.0.113.9"})
        assert answer.status_code == 409, header
        assert "on this machine only (a proxy asks)" in Sentence.from_json(answer.json()["error"])
        assert asking.get("/page/tools", headers={header: "x"}).json()["refused"], header
        assert site.runtime.toolset.servers.all() == []
        headers = {"Origin": site.url, header: "203.0.113.9"}
        for word, status in (("allow", 409), ("", 409), ("ask", 200)):
            said = {"origin": "", "tool": "calculator", "word": word}
            assert asking.post("/page/tools/trust", json=said, headers=headers).status_code == status, header


def test_command_lines_are_told_on_this_machine_only(client: tuple[Site, httpx.Client]) -> None:
    site, asking = client
    assert post(asking, site).status_code == 200
    assert "plain_server.py" in asking.get("/page/tools").text
    assert "plain_server.py" not in asking.get("/page/tools", headers={"X-Forwarded-For": "203.0.113.9"}).text


def test_a_program_that_does_not_say_where_its_page_is_from_may_not(client: tuple[Site, httpx.Client]) -> None:
    """As a tool of the model's that fetches what it is told to."""
    site, asking = client
    body = {"name": "x", "fields": {"command": line(PLAIN)}}
    for answer in (
        asking.post("/page/servers", json=body),
        asking.delete("/page/servers?name=x"),
        asking.post("/page/servers/restart", json={"name": "x"}),
        asking.post("/page/tools/trust", json={"origin": "", "tool": "calculator", "word": "allow"}),
    ):
        assert answer.status_code == 409
        assert "no page that asks" in Sentence.from_json(answer.json()["error"])
    foreign = asking.post("/page/servers", json=body, headers={"Origin": "http://evil.example"})
    assert foreign.status_code == 403
    assert site.runtime.toolset.servers.all() == []


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or not Path("/proc/net/tcp").exists(),
    reason="only root can ask as another user, and only Linux tells whose a connection is",
)
@pytest.mark.parametrize(("user", "status"), [(65534, 409), pytest.param(0, 200, marks=pytest.mark.slow)])
def test_another_user_of_this_machine_may_not(client: tuple[Site, httpx.Client], user: int, status: int) -> None:
    site, _ = client
    body = json.dumps({"name": "x", "fields": {"command": line(PLAIN)}})
    script = (
        "import encodings.idna, http.client, os, sys\nos.setuid(int(sys.argv[1]))\n"
        "asking = http.client.HTTPConnection(sys.argv[2], timeout=30)\n"
        "headers = {'Origin': 'http://' + sys.argv[2], 'Content-Type': 'application/json'}\n"
        "asking.request('POST', '/page/servers', sys.argv[3], headers)\n"
        "answer = asking.getresponse()\nprint(answer.status, answer.read().decode())\n"
    )
    arguments = [str(user), site.url.removeprefix("http://"), body]
    said = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    assert said.stdout.startswith(f"{status} "), said
    assert ("another user of this machine asks" in said.stdout) == (status == 409)
    assert len(site.runtime.toolset.servers.all()) == (status == 200)


def test_a_switch_at_the_start_allows_it_to_everyone(client: tuple[Site, httpx.Client]) -> None:
    site, asking = client
    site.runtime.servers_from_elsewhere = True
    assert post(asking, site, **{"X-Forwarded-For": "203.0.113.9"}).status_code == 200


def test_the_page_says_that_servers_cannot_be_added_from_elsewhere(serve: Serve, visit: Visit) -> None:
    page = visit(serve().url, extra_http_headers={"X-Forwarded-For": "203.0.113.9"})
    page.click("#open-settings")
    page.click("#add-server summary")
    page.wait_for_selector("text=only on the machine where glm4lite runs")
    assert not page.is_visible("#server-name")


def test_no_chat_that_is_imported_brings_a_server_or_a_permission(client: tuple[Site, httpx.Client]) -> None:
    site, asking = client
    chat = {"format": 2, "id": "0123456789abcdef", "title": "Hi", "tree": [], "settings": {"always": ["python"]}}
    chat |= {"mcpServers": {"x": entry(PLAIN)}}
    answer = asking.post("/page/import?name=chat.json", content=json.dumps(chat).encode())
    assert answer.status_code == 200, answer.text
    assert site.runtime.store.load("0123456789abcdef").settings.always == []
    assert site.runtime.toolset.servers.all() == []
    assert not site.runtime.toolset.servers.file.path.exists()
