"""The names of a checkpoint's files, in one place."""

from collections.abc import Mapping

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARDS = "model-*-of-*.safetensors"

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)
"""The small files beside config.json and the weights; each may be missing."""

UNREADABLE: Mapping[str, str] = {
    ".bin": "pickle",
    ".pth": "pickle",
    ".pt": "pickle",
    ".ckpt": "pickle",
    ".gguf": "GGUF",
}
"""Weight files of other kinds, by suffix."""
