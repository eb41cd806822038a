"""MCP servers (modelcontextprotocol.io) through the official SDK: their configuration, transports and connections."""
