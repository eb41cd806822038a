"""The names of a checkpoint's files, in one place, and what all of its readers share: JSON objects, lists of names."""

import codecs
import errno
import json
import math
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from glm4lite.base.errors import CheckpointError, ConfigError, Glm4liteError
from glm4lite.base.magic import START_BYTES, dangling, mistaken_for

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
}
"""Weight files of other kinds, by suffix."""

HEAD = "lm_head.weight"

COMPUTED = re.compile(r".*rotary.*\.(?:(?:original_)?inv_freq|(?:cos|sin)_cached)|transformer\.rotary_pos_emb\..*")
"""The names of buffers that are computed, in old and new files."""

MAX_JSON_BYTES = 16 << 20
"""What a file or header of JSON may take; those of the largest known models have a tenth."""

MAX_DEPTH = 50
"""How deeply lists and objects may lie in each other."""

_MAX_DIGITS = 1000
_SHOWN_NAMES = 3
_MOST_ENTRIES = 10_000  # of a folder that is looked through
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # what Windows takes for no file
_SHOWN_CHARACTERS = 100


def open_file(path: Path) -> BinaryIO:
    """Opens a file to be read; OSError also for a pipe or a device, of which an archive may hold one: no read ends."""
    flags = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def read_json(path: Path, error: type[Glm4liteError] = ConfigError, optional: bool = False) -> dict[str, Any]:
    """A JSON object from a file, as `parse_json` reads it; {} where an `optional` file does not exist.

    Raises:
        Glm4liteError: of the type `error`: the file is missing, is not JSON, or holds something else.
    """
    try:
        with open_file(path) as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        link = dangling(path)
        if link is not None:
            raise error(f"{path} is {link}") from None
        if optional:
            return {}
        raise error(f"{path} is missing; a checkpoint folder needs it, download it again") from None
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from None
    try:
        value = parse_json(data)
    except ValueError as cause:
        what = mistaken_for(data[:START_BYTES])
        raise error(f"{path} is {what or f'not valid JSON ({cause}); correct it or download it again'}") from None
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


def may_be_missing(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether a model does without a shard of these tensors: all that it should hold is a tied head, or computed."""
    tied = config.get("tie_word_embeddings") is True
    return bool(names) and all(COMPUTED.fullmatch(name) or (tied and name == HEAD) for name in names)


def _stays_in_folder(name: str) -> bool:
    """Whether it is the plain name of a file, on every system."""
    return name.isprintable() and not set(name) & set('/\\:*?"<>|') and _DEVICES.fullmatch(name) is None


def decoded(data: bytes) -> str:
    """A text file: UTF-8, or UTF-16 where its mark says so, as PowerShell writes; the mark is no part of the text.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")


def parse_json(data: bytes) -> Any:
    """JSON that a stranger wrote, as `decoded` reads text.

    Objects hold what `check_values` lets pass. A key that appears twice in one is refused: readers differ in which they
    take.

    Raises:
        ValueError: with the reason in one line.
    """
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(decoded(data), object_pairs_hook=_unique, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    for key, item in value.items() if isinstance(value, dict) else ():
        check_values(key, item)
    return value


def check_values(key: str, value: Any) -> None:
    """What lies under a key of JSON is no deeper than MAX_DEPTH, and no NaN or infinity, which Python's reader takes.

    Without recursion, because the nesting is a stranger's. Raises ValueError naming the key.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if any(isinstance(item, float) and not math.isfinite(item) for item in level):
            path, number = next(leaf for leaf in _leaves(key, value) if leaf[1] != leaf[1] or leaf[1] in _INFINITIES)
            raise ValueError(f"{path} must be a finite number, found {number}")
        level = [inner for item in level for inner in _items(item)]
        if not level:
            return
    raise ValueError(f"{key} is nested too deeply: more than {MAX_DEPTH} lists or objects in each other")


_INFINITIES = (math.inf, -math.inf)


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything below a key."""
    waiting = [(key, value)]
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, dict | list):
            named = item.items() if isinstance(item, dict) else enumerate(item)
            waiting += [(f"{path}.{name}", inner) for name, inner in named]
        else:
            yield path, item


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"{reprlib.repr(counts.most_common(1)[0][0])} appears twice")
    return found


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:  # before Python's own limit, whose message speaks of Python
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def some(names: Sequence[str]) -> str:
    """At most three names and how many more. They are a stranger's: cut where long, and without control characters."""
    shown = ", ".join(_shown(name) for name in names[:_SHOWN_NAMES])
    return shown + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "")


def _shown(name: str) -> str:
    cut = name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}..."
    return "".join(character if character.isprintable() else "\ufffd" for character in cut)


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in islice(entries, _MOST_ENTRIES))
    except OSError:
        return []
