"""An MCP server of the standard library alone, which starts at once: `python plain_server.py`, over stdio.

The SDK takes a second of the processor to be imported, for each server that a test of the page starts. Its own server
(tests/glm4lite/mcp_server.py) is talked to where the protocol is what is tested.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

START = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": {"name": "x", "version": "1"}}


def described(name: str, about: str, reads: bool, /, **fields: str) -> dict[str, Any]:
    properties = {field: {"type": kind} for field, kind in fields.items()}
    schema = {"type": "object", "properties": properties, "required": list(fields)}
    return {"name": name, "description": about, "inputSchema": schema, "annotations": {"readOnlyHint": reads}}


TOOLS = [
    described("add", "Add two numbers.", True, a="integer", b="integer"),
    described("environment", "An environment variable of the server.", False, name="string"),
    described("process", "The server's process id.", True),
    described("get_weather", "Current weather in a city.", False, city="string"),
]
RUN: dict[str, Callable[..., str]] = {
    "add": lambda a, b: str(a + b),
    "environment": lambda name: os.environ.get(name, "(not set)"),
    "process": lambda: str(os.getpid()),
    "get_weather": lambda city: f"18 degrees and sunny in {city}",
}


def answered(method: str, params: dict[str, Any]) -> dict[str, Any]:
    if method == "initialize":
        return {"result": START}
    if method == "tools/list":
        return {"result": {"tools": TOOLS}}
    if method == "tools/call":
        text = RUN[params["name"]](**params.get("arguments") or {})
        return {"result": {"content": [{"type": "text", "text": text}]}}
    return {"error": {"code": -32601, "message": "Method not found"}}


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        if "id" in request:
            answer = answered(request["method"], request.get("params", {}))
            print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **answer}), flush=True)
