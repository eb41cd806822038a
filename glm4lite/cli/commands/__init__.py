"""One file a command: its options, and which parts of glm4lite it calls."""
