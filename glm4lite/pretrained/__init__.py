"""The classes that Transformers documents for GLM-4: loading, saving and `generate` by its names."""
