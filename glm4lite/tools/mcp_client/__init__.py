"""MCP servers (modelcontextprotocol.io) through the official SDK: their configuration, transports and connections."""

from glm4lite.base.extras import require

require("using MCP servers", "mcp", extra="mcp")
