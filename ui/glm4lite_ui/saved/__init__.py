"""Chats on the user's disk."""
