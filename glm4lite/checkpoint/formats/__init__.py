"""Checkpoints of other tools, each shown as one of plain or of our tensors."""
