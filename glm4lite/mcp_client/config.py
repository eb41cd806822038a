"""`{"mcpServers": {name: {"command", "args", "env"} or {"url", "headers"}}}`, the file that MCP clients share."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm4lite.errors import ToolError, one_line

_NAME = re.compile(r"[\w.\- ]{1,48}")
_KEYS = {"command", "args", "env", "cwd", "url", "headers", "type", "disabled"}


@dataclass(frozen=True)
class ServerConfig:
    """A server to start (`command`) or to call (`url`)."""

    name: str
    command: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def read_config(paths: Iterable[str | Path]) -> list[ServerConfig]:
    """The servers of all files, in order; those with `"disabled": true` are left out.

    `${NAME}` in env and headers is that environment variable, so that a secret need not stand in the file. Raises
    ToolError naming file, server and key.
    """
    found = dict[str, ServerConfig]()
    for path in paths:
        for name, entry in _entries(Path(path).expanduser()).items():
            if name in found:
                raise ToolError(f"{path}: there are two MCP servers called {name!r}")
            if not (isinstance(entry, dict) and entry.get("disabled") is True):
                found[name] = _server(f"{path}: mcpServers[{name!r}]", name, entry)
    return list(found.values())


def _entries(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ToolError(f"--mcp: {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ToolError(f"--mcp: {path} is not JSON: {one_line(error)}") from error
    servers = data.get("mcpServers") if isinstance(data, dict) else None
    if not isinstance(servers, dict):
        raise ToolError(f"--mcp: {path} has no object 'mcpServers'")
    return servers


def _server(where: str, name: str, entry: object) -> ServerConfig:
    if not _NAME.fullmatch(name):
        raise ToolError(f"{where}: a server's name is 1 to 48 letters, digits, spaces, '_', '-' or '.'")
    if not isinstance(entry, dict):
        raise ToolError(f"{where} must be an object with 'command' or 'url'")
    if unknown := entry.keys() - _KEYS:
        raise ToolError(f"{where}: unknown key {min(unknown)!r} (known: {', '.join(sorted(_KEYS))})")
    command, url = _text(where, entry, "command"), _text(where, entry, "url")
    if (command is None) == (url is None):
        raise ToolError(f"{where} needs either 'command' or 'url'")
    if url is not None and not url.startswith(("http://", "https://")):
        raise ToolError(f"{where}.url is {url[:100]!r}; it starts with http:// or https://")
    args = entry.get("args", [])
    if not isinstance(args, list) or not all(isinstance(arg, str) for arg in args):
        raise ToolError(f"{where}.args must be a list of texts")
    env, headers = _texts(where, entry, "env"), _texts(where, entry, "headers")
    return ServerConfig(name, command, tuple(args), env, _text(where, entry, "cwd"), url, headers)


def _text(where: str, entry: Mapping[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is not None and (not isinstance(value, str) or not value or "\0" in value):
        raise ToolError(f"{where}.{key} must be a text")
    return value


def _texts(where: str, entry: Mapping[str, Any], key: str) -> dict[str, str]:
    values = entry.get(key, {})
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ToolError(f"{where}.{key} must be an object of texts")
    return {name: _expanded(f"{where}.{key}.{name}", value) for name, value in values.items()}


def _expanded(where: str, text: str) -> str:
    def variable(match: re.Match[str]) -> str:
        value = os.environ.get(match[1])
        if value is None:
            raise ToolError(f"{where} names the environment variable {match[1]}, which is not set")
        return value

    return re.sub(r"\$\{(\w+)\}", variable, text)
