"""GGUF files: the header, and what a model's folder would hold beside its weights."""
