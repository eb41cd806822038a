"""MCP servers in real processes, over stdio and HTTP: those that work, and those that hang, die, flood or lie."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glm4lite.base.errors import ToolError
from glm4lite.text.messages import ToolCall
from glm4lite.tools.mcp_client import connection
from glm4lite.tools.mcp_config import ServerConfig, read_config
from glm4lite.tools.mcp_servers import McpServers
from glm4lite.tools.running import MAX_RESULT_CHARACTERS, ToolResult, run_tool
from glm4lite.tools.tool import Tool
from glm4lite.tools.toolbox import Toolbox

HERE = Path(__file__).parent
GOOD, BAD = str(HERE / "mcp_server.py"), str(HERE / "mcp_misbehaving.py")


def stdio(script: str, *arguments: str, name: str = "test", **options: Any) -> ServerConfig:
    return ServerConfig(name, sys.executable, (script, *arguments), **options)


def by_name(servers: McpServers) -> dict[str, Tool]:
    return {tool.name: tool for tool in servers.tools()}


def use(tool: Tool, timeout_s: float = 10, cancel: threading.Event | None = None, /, **arguments: Any) -> ToolResult:
    return run_tool(tool, ToolCall("1", tool.name, json.dumps(arguments)), timeout_s, cancel, lambda *_: True)


def ended(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def http_url() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, GOOD, "http", str(port)])
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/mcp"
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def tools() -> Iterator[dict[str, Tool]]:
    with McpServers([stdio(GOOD, "stdio", env={"GIVEN": "yes"})]) as servers:
        yield by_name(servers)


def test_a_tool_is_offered_with_its_servers_name_and_schema(tools: dict[str, Tool]) -> None:
    schema = tools["add"].schema()["function"]
    assert schema["description"] == "Add two numbers."
    assert schema["parameters"]["type"] == "object"
    assert schema["parameters"]["properties"].keys() == {"a", "b"}
    assert use(tools["add"], a=2, b=3) == ToolResult("5", False)


def test_only_a_tool_that_says_it_reads_runs_unasked(tools: dict[str, Tool]) -> None:
    assert tools["environment"].needs_approval is True
    assert tools["add"].needs_approval is False


def test_results_that_are_no_text_are_told(tools: dict[str, Tool]) -> None:
    assert json.loads(use(tools["table"]).content) == {"rows": 3}
    assert use(tools["picture"]).content == "[image/png: not text, so it is left out]"


def test_a_tool_that_fails_is_an_error_of_that_call(tools: dict[str, Tool]) -> None:
    result = use(tools["fail"], reason="no such city")
    assert result.error
    assert result.content.startswith("Error: ")
    assert use(tools["add"], a=1, b=1).content == "2"


def test_wrong_arguments_do_not_reach_the_server(tools: dict[str, Tool]) -> None:
    assert "no argument 'c'" in use(tools["add"], a=1, b=1, c=1).content
    assert "needs the argument 'b'" in use(tools["add"], a=1).content


def test_a_long_result_is_cut(tools: dict[str, Tool]) -> None:
    assert use(tools["long"]).content == "x" * MAX_RESULT_CHARACTERS + "\n[cut: 984000 more characters]"
    assert use(tools["parts"]).content == "x\n" * 1000 + "[500 more parts are left out]"


def test_a_server_gets_its_own_environment_only(tools: dict[str, Tool], monkeypatch: pytest.MonkeyPatch) -> None:
    assert use(tools["environment"], name="GIVEN").content == "yes"
    monkeypatch.setenv("HF_TOKEN", "secret")
    with McpServers([stdio(GOOD, "stdio")]) as servers:
        assert use(by_name(servers)["environment"], name="HF_TOKEN").content == "(not set)"


def test_a_server_that_dies_is_an_error_of_that_call_and_comes_back(tools: dict[str, Tool]) -> None:
    result = use(tools["die"])
    assert result.error
    assert "'test'" in result.content
    assert "status 3: Segmentation fault, nearly" in result.content
    assert use(tools["add"], a=1, b=1).content == "2"


@pytest.mark.parametrize("end", ["timeout", "stop"])
def test_a_server_that_hangs_does_not_hang_the_chat_and_is_started_anew(
    tools: dict[str, Tool], end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_CHECK_LIMIT_S", 0.3)
    before = int(use(tools["process"]).content)
    cancel = threading.Event()
    if end == "stop":
        threading.Timer(0.2, cancel.set).start()
    started = time.monotonic()
    result = use(tools["hang"], 0.4, cancel)
    assert result.error
    assert time.monotonic() - started < 60  # it hangs for ten minutes
    assert ("stopped by the user" in result.content) == (end == "stop")
    assert use(tools["add"], a=1, b=1).content == "2"
    assert ended(before)


def test_a_slow_call_that_was_given_up_leaves_the_server_running(tools: dict[str, Tool]) -> None:
    before = use(tools["process"]).content
    assert use(tools["slow"], 0.2).error
    assert use(tools["process"]).content == before


@pytest.mark.parametrize(("mode", "reason"), [("long-line", "16 MiB"), ("notices", "10000 messages")])
def test_a_server_that_floods_is_ended(mode: str, reason: str) -> None:
    with McpServers([stdio(BAD, mode)]) as servers:
        (tool,) = servers.tools()
        result = use(tool, 20, city="Oslo")
        assert result.error
        assert reason in result.content


def test_tools_that_cannot_be_offered_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "glm4lite"), McpServers([stdio(BAD, "bad-tools")]) as servers:
        found = by_name(servers)
        long = next(name for name in found if name.startswith("nnn"))
        assert found.keys() == {"good", "boolean", "spaced_out___user__", long}
        assert len(long) == 64
        assert json.loads(use(found[long], city="Oslo").content)["name"] == "n" * 100
    left_out = " ".join(record.getMessage() for record in caplog.records if record.name == "glm4lite")
    for reason in ("new\\nline", "the name ''", "required", "more than", "second tool"):
        assert reason in left_out, left_out


def test_lines_that_are_no_messages_are_passed_over() -> None:
    with McpServers([stdio(BAD, "garbage")]) as servers:
        (tool,) = servers.tools()
        assert not use(tool, city="Oslo").error


def test_a_list_of_tools_has_an_end_which_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "glm4lite"), McpServers([stdio(BAD, "endless-list")]) as servers:
        assert len(servers.tools()) == 1
    assert "of its tools only 50 are offered" in caplog.text


def test_an_answer_too_deep_to_be_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "START_LIMIT_S", 3.0)
    with McpServers([stdio(BAD, "deep-list")]) as servers, pytest.raises(ToolError, match="recursion limit"):
        servers.tools()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ServerConfig("x", "no-such-program-at-all"), "no program 'no-such-program-at-all'"),
        (ServerConfig("x", sys.executable, ("-c", "import sys; sys.exit('no token given')")), "no token given"),
        (ServerConfig("x", url="http://127.0.0.1:9/mcp"), "'x': "),
        (ServerConfig("x", sys.executable, (BAD, "silent")), "did not answer within 1 s"),
    ],
    ids=["missing", "ends", "refused", "silent"],
)
def test_a_server_that_cannot_be_connected_is_one_line(
    config: ServerConfig, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "silent" in config.args:
        monkeypatch.setattr(connection, "START_LIMIT_S", 1.0)
    with pytest.raises(ToolError) as caught:
        McpServers([config])
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_that_is_not_mcp_is_one_line() -> None:
    with McpServers([stdio(BAD, "bad-list")]) as servers, pytest.raises(ToolError, match="inputSchema"):
        servers.tools()


def test_closing_ends_the_servers_and_their_tools_say_so() -> None:
    with McpServers([stdio(GOOD, "stdio")]) as servers:
        found = by_name(servers)
        pid = int(use(found["process"]).content)
        use(found["hang"], 0.1)
        started = time.monotonic()
    assert time.monotonic() - started < 60
    assert ended(pid)
    assert "closed" in use(found["add"], a=1, b=1).content


def test_the_end_of_the_program_ends_the_servers() -> None:
    code = (
        "import sys\nfrom tests.glm4lite.test_mcp import *\n"
        "servers = McpServers([stdio(GOOD, 'stdio')])\n"
        "print(use(by_name(servers)['process']).content, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended(int(done.stdout))


def test_http_works_the_same(http_url: str) -> None:
    with McpServers([ServerConfig("web", url=http_url)]) as servers:
        found = by_name(servers)
        assert use(found["add"], a=2, b=3).content == "5"
        assert found["environment"].needs_approval is True
        assert use(found["fail"], reason="x").error


def test_several_servers_are_connected_at_once(http_url: str) -> None:
    configs = [stdio(GOOD, "stdio", name="one"), ServerConfig("two", url=http_url)]
    with McpServers(configs) as servers:
        found = by_name(servers)
        assert use(found["one__add"], a=1, b=2).content == use(found["two__add"], a=1, b=2).content == "3"


def test_a_name_that_is_taken_gets_the_servers_name_before_it() -> None:
    with McpServers([stdio(GOOD, "stdio", name="other")]) as servers:
        found = {tool.name: tool for tool in servers.tools(taken={"add", "calculator"})}
    assert "add" not in found
    assert found["other__add"].full_name == "other__add (MCP server other)"
    assert found["table"].full_name == "table (MCP server other)"


def test_http_headers_are_sent_and_an_answer_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                seen.append(peer.recv(65536).decode())
                head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
                try:
                    peer.sendall(head.encode())
                    while True:
                        peer.sendall(bytes(1 << 20))
                except OSError:
                    continue

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"
        with pytest.raises(ToolError):
            McpServers([ServerConfig("x", url=url, headers={"Authorization": "Bearer abc"})])
    assert "authorization: bearer abc" in seen[0].lower()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "no object 'mcpServers'"),
        ('{"mcpServers": {"a": 5}}', "must be an object"),
        ('{"mcpServers": {"a": {}}}', "either 'command' or 'url'"),
        ('{"mcpServers": {"a": {"command": "x", "disabled": "true"}}}', "disabled must be true or false"),
        ('{"mcpServers": {"a": {"command": "x", "enabled": 0}}}', "enabled must be true or false"),
        ('{"mcpServers": {"a": {"command": "x", "url": "http://x"}}}', "either 'command' or 'url'"),
        ('{"mcpServers": {"a": {"command": 5}}}', "command must be a text"),
        ('{"mcpServers": {"a": {"command": "x", "args": "y"}}}', "args must be a list"),
        ('{"mcpServers": {"a": {"command": "x", "env": {"A": 1}}}}', "env must be an object of texts"),
        ('{"mcpServers": {"a": {"command": "x", "env": {"A": "${NOT_SET_HERE}"}}}}', "NOT_SET_HERE"),
        ('{"mcpServers": {"a": {"url": "file:///etc/passwd"}}}', "http://"),
        ('{"mcpServers": {"a": {"command": "x", "comand": "y"}}}', "unknown key 'comand'; is it 'command'?"),
        ('{"mcpServers": {"a": {"commnad": "x"}}}', "unknown key 'commnad'; is it 'command'?"),
        ('{"mcpServers": {"a": {"command": "x", "ENV": {}}}}', "unknown key 'ENV'; is it 'env'?"),
        ('{"mcpServers": {"a": {"endpoint": "http://x"}}}', "(its keys: endpoint)"),
        ('{"mcpServers": {"a": {"url": "http://x", "type": "sse"}}}', "type is 'sse'; with a url it is 'http'"),
        ('{"mcpServers": {"a": {"command": "x", "transport": "http"}}}', "with a command it is 'stdio'"),
        ('{"mcpServers": {"a": {"command": "x"}, "a": {"command": "y"}}}', "the key 'a' stands twice"),
        ('{"mcpServers": {"a": {"command": "x"},}} // mine', "comments and trailing commas are not JSON"),
        ('{"mcpServers": {"a": {"command": "\\ud800"}}}', "command must be a text"),
        ('{"mcpServers": {"a": {"command": "x", "args": ["\\u0000"]}}}', "args must be a list of texts"),
        ('{"mcpServers": {"a": {"command": "x", "env": {"A": "${input:key}"}}}}', "${input:key}"),
        ("[" * 100_000, "is not JSON"),
        ('{"mcpServers": {"a": ' + "9" * 5000 + "}}", "is not JSON"),
        (" " * ((1 << 20) + 1), "more than 1 MiB"),
        ('{"mcpServers": {"a\\nb": {"command": "x"}}}', "name is"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_place(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(content)
    with pytest.raises(ToolError) as caught:
        read_config([file])
    assert reason in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("root", ["mcpServers", "servers", "context_servers"])
def test_keys_of_other_clients_are_passed_over_with_one_remark(
    root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = {"autoApprove": ["*"], "alwaysAllow": ["erase"], "timeout": 60, "disabledTools": [], "description": "x"}
    entry = {"command": "x", "transport": "stdio", "type": "stdio", "enabled": True, **foreign}
    file = tmp_path / "mcp.json"
    servers = {"one": entry, "two": entry | {"envFile": ".env"}, "off": {"enabled": False}}
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({root: servers, "inputs": []}).encode())
    with caplog.at_level(logging.WARNING, "glm4lite"):
        assert read_config([file]) == [ServerConfig("one", "x"), ServerConfig("two", "x")]
    (record,) = caplog.records
    assert record.getMessage().endswith(": alwaysAllow, autoApprove, description, disabledTools, envFile, timeout")


def read_entry(folder: Path, entry: dict[str, Any], name: str = "x") -> list[ServerConfig]:
    file = folder / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {name: entry}}))
    return read_config([file])


@pytest.mark.parametrize(
    "name", ["github.com/modelcontextprotocol/servers/tree/main/src/filesystem", "@modelcontextprotocol/fs", "a: b"]
)
def test_a_server_may_be_called_as_other_clients_call_it(name: str, tmp_path: Path) -> None:
    assert [config.name for config in read_entry(tmp_path, {"command": "x"}, name)] == [name]


@pytest.mark.parametrize("key", ["url", "httpUrl", "serverUrl"])
def test_an_address_may_stand_under_other_clients_keys(key: str, tmp_path: Path) -> None:
    (config,) = read_entry(tmp_path, {key: "https://a.example/mcp", "command": None, "headers": None})
    assert (config.url, config.command, config.headers) == ("https://a.example/mcp", None, {})


def test_null_says_as_much_as_a_key_that_is_not_there(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("args", "env", "cwd", "url", "headers", "type", "transport"))
    assert read_entry(tmp_path, {"command": "x", **nothing}) == [ServerConfig("x", "x")]


@pytest.mark.parametrize("entry", [{"disabled": True}, {"enabled": False}, {"isActive": False}])
def test_a_server_that_is_switched_off_is_left_out(entry: dict[str, Any], tmp_path: Path) -> None:
    assert read_entry(tmp_path, {"command": "x", **entry}) == []


def test_a_tool_that_another_client_approves_still_asks(tmp_path: Path) -> None:
    entry = {"command": sys.executable, "args": [GOOD, "stdio"], "autoApprove": ["environment"], "trust": True}
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"test": entry}}))
    with Toolbox(mcp=[tmp_path / "mcp.json"]) as box:
        (tool,) = (tool for tool in box.tools if tool.name == "environment")
        assert tool.needs_approval is True


def test_variables_are_filled_in_as_other_clients_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "k")
    environment = {"A": "${KEY}", "B": "${env:KEY}", "C": "${NOT_SET_HERE:-d}", "D": "$KEY $x"}
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"a": {"command": "x", "env": environment}}}))
    (found,) = read_config([file])
    assert found.env == {"A": "k", "B": "k", "C": "d", "D": "$KEY $x"}


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"no\.json cannot be read"):
        read_config([tmp_path / "no.json"])


def test_a_file_is_read_as_other_clients_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "k")
    entry = {"command": sys.executable, "args": [GOOD, "stdio"], "env": {"GIVEN": "${KEY}!"}}
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"my server": entry, "off": {"command": "none", "disabled": True}}}))
    with Toolbox(mcp=[file], approval="all") as box:
        found = {tool.name: tool for tool in box.tools}
        assert "calculator" in found
        tool = found["environment"]
        assert run_tool(tool, ToolCall("1", tool.name, '{"name": "GIVEN"}')).content == "k!"


def test_a_server_is_known_by_what_is_started_or_called() -> None:
    plain = ServerConfig("x", "program", ("a", "b"), {"A": "1"})
    same = ServerConfig("another name", "program", ("a", "b"), {"A": "1"}, headers={"Authorization": "a token"})
    assert plain.digest == same.digest
    others = [
        ServerConfig("x", "program", ("a b",), {"A": "1"}),
        ServerConfig("x", "program", ("a", "b")),
        ServerConfig("x", "program", ("a", "b"), {"A": "1"}, cwd="/tmp"),
        ServerConfig("x", url="http://a.example/"),
    ]
    assert len({plain.digest, *(other.digest for other in others)}) == 5


def test_connecting_ends_when_nobody_wants_it_any_more() -> None:
    cancel = threading.Event()
    threading.Timer(0.5, cancel.set).start()
    started = time.monotonic()
    with pytest.raises(ToolError):
        McpServers([stdio(BAD, "silent")], cancel)
    assert time.monotonic() - started < 8


def test_tools_are_asked_for_once_and_named_beside_those_that_are_there() -> None:
    with McpServers([stdio(GOOD, "stdio")]) as servers:
        assert "add" in by_name(servers)
        pid = int(use(by_name(servers)["process"]).content)
        os.kill(pid, 9)
        assert {"test__add", "process"} <= {tool.name for tool in servers.tools({"add"})}
