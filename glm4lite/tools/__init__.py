"""Tools a model may call: their schemas, running them, those built in, MCP's, Python's."""
