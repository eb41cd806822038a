"""MCP servers (modelcontextprotocol.io) through the official SDK: their transports and connections."""

from glm4lite.base.extras import require

require("using MCP servers", "mcp", extra="mcp")
