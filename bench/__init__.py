"""Scripts that measure, and what they share: `python -m bench.NAME`, in the repository's folder."""
