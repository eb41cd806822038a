"""Bytes on disk to tensors and back: shards, formats, load plan, calibration, writing."""
