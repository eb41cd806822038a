"""Checkpoint files: reading shards, planning what goes where, quantizing on the way, writing, downloading."""
