"""`glm4lite chat` as a conversation: what is typed, the commands in it, what is kept of it."""
