"""The names of a checkpoint's files, in one place, and what all of its readers share: JSON objects, lists of names."""

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm4lite.errors import CheckpointError, ConfigError, Glm4liteError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARDS = "model-*-of-*.safetensors"

COMPANIONS = (
    "generation_config.json",
    TOKENIZER,
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

_SHOWN_NAMES = 3
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # what Windows takes for no file
_SHOWN_CHARACTERS = 100


def read_json(path: Path, error: type[Glm4liteError] = ConfigError, optional: bool = False) -> dict[str, Any]:
    """A JSON object from a file; {} where an `optional` file does not exist.

    Raises:
        Glm4liteError: of the type `error`: the file is missing, is not UTF-8 JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if optional:
            return {}
        raise error(f"{path} is missing; a checkpoint folder needs it, download it again") from None
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from None
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not valid JSON ({cause}); download it again") from None
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, found {type(value).__name__}; download it again")
    return value


def read_index(path: Path) -> dict[str, frozenset[str]]:
    """What an index says: file name -> names of the tensors in it.

    Raises:
        CheckpointError: it is damaged, or names what is no .safetensors file of its own folder.
    """
    weight_map = read_json(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map (tensor name -> file name); download it again")
    expected: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _stays_in_folder(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} puts {some([tensor])} in {reprlib.repr(file)}; only .safetensors files of the same folder "
                "are read, download the index again"
            )
        expected.setdefault(file, set()).add(tensor)
    return {file: frozenset(names) for file, names in sorted(expected.items())}


def _stays_in_folder(name: str) -> bool:
    """Whether it is the plain name of a file, on every system."""
    return name.isprintable() and not set(name) & set('/\\:*?"<>|') and _DEVICES.fullmatch(name) is None


def some(names: Sequence[str]) -> str:
    """At most three names and how many more. They are a stranger's: cut where long, and without control characters."""
    shown = ", ".join(_shown(name) for name in names[:_SHOWN_NAMES])
    return shown + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "")


def _shown(name: str) -> str:
    cut = name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}..."
    return "".join(character if character.isprintable() else "\ufffd" for character in cut)
