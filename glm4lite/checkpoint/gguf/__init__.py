"""GGUF files: the header, how blocks are decoded, and what a model's folder would hold beside its weights."""
