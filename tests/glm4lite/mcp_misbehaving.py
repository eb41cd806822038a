"""Servers no SDK would make: `python mcp_misbehaving.py MODE`; the modes are the words compared with `mode` below."""

import json
import sys
import time

GOOD = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
BAD_TOOLS = [
    {"name": "good", "inputSchema": GOOD},
    {"name": "new\nline", "inputSchema": GOOD},
    {"name": "", "inputSchema": GOOD},
    {"name": "boolean", "inputSchema": {"type": "object", "properties": {"a": True}}},
    {"name": "required", "inputSchema": {"type": "object", "properties": {}, "required": ["b"]}},
    {"name": "huge", "inputSchema": {"type": "object", "description": "x" * 100_000}},
    {"name": "good", "description": "again", "inputSchema": GOOD},
    {"name": "n" * 100, "inputSchema": GOOD},
    {"name": "spaced out/<|user|>", "inputSchema": GOOD},
]
START = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": {"name": "x", "version": "1"}}
LISTS = {
    "bad-tools": {"tools": BAD_TOOLS},
    "bad-list": {"tools": [{"name": "array", "inputSchema": {"type": "array"}}]},
    "deep-list": {"tools": [{"name": "deep", "inputSchema": {}}]},
    "endless-list": {"tools": [{"name": "good", "inputSchema": GOOD}], "nextCursor": "more"},
}


def answer(request: dict[str, object], **content: object) -> None:
    deep = '{"a":' * 10_000 + "1" + "}" * 10_000  # json.dumps writes no such thing
    text = json.dumps({"jsonrpc": "2.0", "id": request["id"], **content})
    print(text.replace('"inputSchema": {}', f'"inputSchema": {deep}'), flush=True)


def flood(mode: str) -> None:
    notice = {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": "x"}}
    while True:
        sys.stdout.write("x" * 65536 if mode == "long-line" else json.dumps(notice) + "\n")


def main(mode: str) -> None:
    if mode == "silent":
        time.sleep(600)
    for line in sys.stdin:
        request = json.loads(line)
        if mode == "garbage":
            print("This is no JSON, you know.", flush=True)
        if "id" not in request:
            continue
        if request["method"] == "initialize":
            answer(request, result=START)
        elif request["method"] == "tools/list":
            answer(request, result=LISTS.get(mode, {"tools": BAD_TOOLS[:1]}))
        elif request["method"] == "tools/call" and mode in ("long-line", "notices"):
            flood(mode)
        elif request["method"] == "tools/call":
            answer(request, result={"content": [{"type": "text", "text": json.dumps(request["params"])}]})
        else:
            answer(request, error={"code": -32601, "message": "Method not found"})


main(sys.argv[1])
