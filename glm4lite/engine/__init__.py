"""Ids in, ids out: decoding, sampling, kept prefixes, one thread that owns the model."""
