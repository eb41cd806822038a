"""What the built-in tools do: arithmetic, time zones, units. Their declarations are in tools.py."""
