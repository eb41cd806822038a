"""The MCP servers that a user added on the page: a file of the form that `--mcp` and other clients read.

It may hold secrets, so it is readable for its user alone; it is written whole or not at all, and keeps what else stands
in it. `${NAME}` stays as it was written and is filled in when a server is started.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm4lite.base.errors import ToolError
from glm4lite.base.sentences import Sentence
from glm4lite.base.user_folder import make_private
from glm4lite.tools.mcp_config import MAX_FILE, read_document
from glm4lite_ui.saved.store import write_kept


class ServerFile:
    """Any window may change it; each change is on the disk at once."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()

    def entries(self) -> dict[str, Any]:
        """What stands under each server's name, in the file's order. ToolError where the file cannot be read."""
        data, root = self._read()
        return dict(data[root])

    def put(self, name: str, entry: dict[str, Any]) -> None:
        """Keeps a server, in place of one of this name. Raises Glm4liteError; the file is then as it was."""
        self._change(lambda servers: servers | {name: entry})

    def remove(self, name: str) -> None:
        self._change(lambda servers: {other: entry for other, entry in servers.items() if other != name})

    def _read(self) -> tuple[dict[str, Any], str]:
        if not self.path.exists():
            return {"mcpServers": {}}, "mcpServers"
        return read_document(self.path)

    def _change(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        with self._lock:
            data, root = self._read()
            text = json.dumps(data | {root: change(data[root])}, ensure_ascii=False, indent=2).encode()
            if len(text) > MAX_FILE:
                raise ToolError("{file} would have more than {size} MiB", file=self.path, size=MAX_FILE >> 20)
            path = self.path.resolve()  # a link stays one
            try:
                make_private(path.parent)
            except OSError as error:
                raise ToolError(
                    "{folder}: no MCP server can be kept here: {problem}", folder=path.parent, problem=error.strerror
                ) from None
            write_kept(path, text, Sentence("the MCP server"))
