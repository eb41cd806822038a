"""A real MCP server, made with the same SDK: `python mcp_server.py stdio`, or `http PORT` on loopback."""

import os
import sys
import time

from mcp.server.mcpserver import Image, MCPServer
from mcp.types import ToolAnnotations

server = MCPServer("test", log_level="ERROR")
READS = ToolAnnotations(read_only_hint=True)


@server.tool(annotations=READS)
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool()
def environment(name: str) -> str:
    """An environment variable of the server."""
    return os.environ.get(name, "(not set)")


@server.tool(annotations=READS)
def process() -> int:
    """The server's process id."""
    return os.getpid()


@server.tool(annotations=READS)
def table() -> dict[str, int]:
    """A structured result."""
    return {"rows": 3}


@server.tool(annotations=READS)
def picture() -> Image:
    """An image."""
    return Image(data=b"\x89PNG", format="png")


@server.tool(annotations=READS)
def fail(reason: str) -> str:
    """Fails."""
    raise ValueError(reason)


@server.tool(annotations=READS)
async def hang() -> str:
    """Does not answer, and takes the whole server with it."""
    time.sleep(600)
    return "late"


@server.tool(annotations=READS)
def slow() -> str:
    """Takes long, while the server goes on answering."""
    time.sleep(2)
    return "late"


@server.tool(annotations=READS)
def die() -> str:
    """Ends the server."""
    os.write(2, b"Segmentation fault, nearly\n")
    os._exit(3)


@server.tool(annotations=READS)
def long() -> str:
    """A long text."""
    return "x" * 1_000_000


@server.tool(annotations=READS, structured_output=False)
def parts() -> list[str]:
    """Many parts."""
    return ["x"] * 1500


@server.tool()
def get_weather(city: str) -> str:
    """Current weather in a city."""
    return f"18 degrees and sunny in {city}"


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        server.run("stdio")
    else:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]), json_response=len(sys.argv) > 3)
