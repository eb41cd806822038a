"""`{"mcpServers": {name: {"command", "args", "env"} or {"url", "headers"}}}`, the file that MCP clients share."""

import difflib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm4lite.base.errors import ToolError, one_line
from glm4lite.base.files import decoded
from glm4lite.base.sentences import Sentence

logger = logging.getLogger("glm4lite")

MAX_FILE = 1 << 20  # bytes
_LONGEST_NAME = 100
_ROOTS = ("mcpServers", "servers", "context_servers")  # of most clients, of VS Code, of Zed
_URLS = ("url", "httpUrl", "serverUrl")  # of most clients, of Gemini, of Windsurf
_SWITCHES = {"disabled": True, "enabled": False, "isActive": False}  # what each is where a server is left out
_KEYS = {"command", "args", "env", "cwd", "headers", "type", "transport", *_URLS, *_SWITCHES}
_BY_COMMAND = {"stdio", "local"}
_BY_URL = {"http", "streamable-http", "streamable_http", "streamableHttp", "remote"}


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

    @property
    def origin(self) -> str:
        """What its tools say of where they come from."""
        return Sentence("MCP server {name}", name=self.name)

    @property
    def digest(self) -> str:
        """Of what is started or called: one that is started otherwise is another server, whatever it is called.

        Headers are left out: they say who asks, and change with each token.
        """
        meant = [self.command, list(self.args), sorted(self.env.items()), self.cwd, self.url]
        return hashlib.sha256(json.dumps(meant).encode()).hexdigest()


def read_config(paths: Iterable[str | Path]) -> list[ServerConfig]:
    """The servers of all files, in order; those that are switched off are left out.

    `${NAME}` in env and headers is that environment variable, so that a secret need not stand in the file. Keys of
    other clients are passed over with one warning a file: what they approve, and what they limit, does not hold here.
    Raises ToolError naming file, server and key.
    """
    found = dict[str, ServerConfig]()
    for path in paths:
        foreign = set[str]()
        data, root = read_document(Path(path).expanduser())
        for name, entry in data[root].items():
            if name in found:
                raise ToolError(f"{path}: there are two MCP servers called {name!r}")
            config = server_config(f"{path}: ", name, entry)
            if config is not None:
                found[name] = config
                foreign |= entry.keys() - _KEYS
        if foreign:
            named = one_line(", ".join(sorted(foreign)))[:300]
            logger.warning("%s: keys of other clients are passed over, also what they allow or limit: %s", path, named)
    return list(found.values())


def server_config(where: str, name: str, entry: object) -> ServerConfig | None:
    """The server that an entry describes, None where it is switched off; `where` is what an error begins with."""
    where = f"{where}the server {name[:_LONGEST_NAME]!r}"
    if not isinstance(entry, dict):
        raise ToolError(f"{where} must be an object with 'command' or 'url'")
    return None if _is_off(where, entry) else _server(where, name, entry)


def read_document(path: Path) -> tuple[dict[str, Any], str]:
    """The JSON object of a file, and the key under which its servers stand. Raises ToolError naming the file."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:
        raise ToolError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(content) > MAX_FILE:
        raise ToolError(f"{path} has more than {MAX_FILE >> 20} MiB; it is no list of MCP servers")
    try:
        data = json.loads(decoded(content), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        comments = "; comments and trailing commas are not JSON" if re.search(rb"//|/\*|,\s*[}\]]", content) else ""
        raise ToolError(f"{path} is not JSON: {one_line(error)}{comments}") from error
    roots = [root for root in _ROOTS if isinstance(data, dict) and isinstance(data.get(root), dict)]
    if not roots:
        raise ToolError(f"{path} has no object 'mcpServers'")
    return data, roots[0]


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:100]!r} stands twice in one object")
    return found


def _is_off(where: str, entry: Mapping[str, Any]) -> bool:
    for key in _SWITCHES:
        if not isinstance(_present(entry, key, True), bool):
            raise ToolError(f"{where}: {key} must be true or false")
    return any(entry.get(key) is off for key, off in _SWITCHES.items())


def _server(where: str, name: str, entry: Mapping[str, Any]) -> ServerConfig:
    if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
        raise ToolError(f"{where}: a server's name is 1 to {_LONGEST_NAME} printable characters")
    _refuse_misspelt(where, entry)
    command = _text(where, entry, "command")
    url = next((found for key in _URLS if (found := _text(where, entry, key)) is not None), None)
    if (command is None) == (url is None):
        keys = one_line(", ".join(sorted(entry)))[:200] or "none"
        raise ToolError(f"{where} needs either 'command' or 'url' (its keys: {keys})")
    _check_transport(where, entry, by_url=url is not None)
    if url is not None and not url.startswith(("http://", "https://")):
        raise ToolError(f"{where}: url is {url[:100]!r}; it starts with http:// or https://")
    args = _present(entry, "args", [])
    if not isinstance(args, list) or not all(_is_text(arg) for arg in args):
        raise ToolError(f"{where}: args must be a list of texts")
    env, headers = _texts(where, entry, "env"), _texts(where, entry, "headers")
    return ServerConfig(name, command, tuple(args), env, _text(where, entry, "cwd"), url, headers)


def _refuse_misspelt(where: str, entry: Mapping[str, Any]) -> None:
    """A key that is nearly one of ours is a slip of the hand; any other is another client's."""
    for key in sorted(entry.keys() - _KEYS):
        near = difflib.get_close_matches(key.lower(), _KEYS, 1, 0.8)
        if near:
            raise ToolError(f"{where}: unknown key {key[:100]!r}; is it {near[0]!r}?")


def _check_transport(where: str, entry: Mapping[str, Any], by_url: bool) -> None:
    has, fitting, kinds = ("url", "http", _BY_URL) if by_url else ("command", "stdio", _BY_COMMAND)
    for key in ("type", "transport"):
        kind = _text(where, entry, key)
        if kind is not None and kind not in kinds:
            raise ToolError(f"{where}: {key} is {kind[:100]!r}; with a {has} it is {fitting!r}")


def _is_text(value: object) -> bool:
    """A text that a program can be started with: no NUL, and no half of a character, which JSON can escape."""
    return isinstance(value, str) and "\0" not in value and value.encode("utf-8", "replace").decode() == value


def _present(entry: Mapping[str, Any], key: str, default: Any) -> Any:
    """What a key holds; programs that write such files give null to what is not set."""
    value = entry.get(key)
    return default if value is None else value


def _text(where: str, entry: Mapping[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is not None and (not value or not _is_text(value)):
        raise ToolError(f"{where}: {key} must be a text")
    return value


def _texts(where: str, entry: Mapping[str, Any], key: str) -> dict[str, str]:
    values = _present(entry, key, {})
    if not isinstance(values, dict) or not all(map(_is_text, [*values, *values.values()])):
        raise ToolError(f"{where}: {key} must be an object of texts")
    return {name: _expanded(f"{where}: {key}.{name}", value) for name, value in values.items()}


def _expanded(where: str, text: str) -> str:
    """`${NAME}`, `${env:NAME}` and `${NAME:-default}` as other clients read them."""

    def variable(match: re.Match[str]) -> str:
        found = re.fullmatch(r"(?:env:)?(\w+)(?::-(.*))?", match[1])
        if found is None:
            raise ToolError(f"{where} holds {match[0][:100]!r}; only environment variables are filled in: ${{NAME}}")
        value = os.environ.get(found[1], found[2])
        if value is None:
            raise ToolError(f"{where} names the environment variable {found[1]}, which is not set")
        return value

    return re.sub(r"\$\{([^}]*)\}", variable, text)
