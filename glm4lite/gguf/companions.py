"""The small files that a model's folder would hold, made of a GGUF file's metadata: tokenizer, template, config.json.

They lie in a folder of the user's, so that whatever reads a checkpoint's folder reads these.

    folder_with("tokenizer.json", Path("GLM-4-9B-Q4_K_M.gguf"))    # that folder
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import reprlib
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import tokenizers

from glm4lite.base.errors import CheckpointError
from glm4lite.base.files import CONFIG, TOKENIZER, names_in, some
from glm4lite.base.owned_folder import remove_tree
from glm4lite.base.user_folder import make_private, user_folder
from glm4lite.base.whole_file import write_whole
from glm4lite.gguf.header import SUFFIX, parts_of, read_headers
from glm4lite.gguf.model import model_config
from glm4lite.hub.sources import nano_folder

logger = logging.getLogger("glm4lite")

_VERSION = 3  # of what is made here; files of another are made anew
_TEMPLATE, _SETTINGS, _GENERATION = "chat_template.jinja", "tokenizer_config.json", "generation_config.json"
_SOURCE = "source.json"
_NEW_S = 60.0  # another process may just be writing it
_PRE = ("glm4", "chatglm-bpe")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How GLM-4's tokenizer.json cuts a text, which the file names "glm4" or "chatglm-bpe"."""

OWN_SPLIT = "glm4lite.tokenizer.split"
"""The key under which a file that glm4lite wrote has the pattern by which another tokenizer cuts a text: GGUF has names
alone, and none for what nobody else uses.
"""
MOST_SPLIT = 1 << 14  # characters
OWN_IGNORE_MERGES = "glm4lite.tokenizer.ignore_merges"
"""Beside it: whether a piece that is a token is that token, whatever its merges would make of it."""

_CONTROL, _USER, _UNUSED = 3, 4, 5  # ggml's types of tokens


def folder_with(name: str, found: Path) -> Path:
    """The folder of the small file `name` of what a model's name led to: a folder, or a GGUF file's companions, also
    where that file is the only model of a folder without a `name`.

    Raises:
        CheckpointError: the file is damaged, or of another model, or there are several.
    """
    file: Path | None = found
    if found.is_dir():
        file = None if os.path.lexists(found / name) else file_in(found)
    if file is None or not file.name.endswith(SUFFIX):
        return found
    header = read_headers(file)
    return companions_folder(file, header.metadata, model_config(file, header))


def file_in(folder: Path) -> Path | None:
    """The one model of a folder's GGUF files, None where there is none; CheckpointError where there are several."""
    files = [folder / name for name in names_in(folder) if name.endswith(SUFFIX) and not name.startswith("mmproj")]
    models = sorted({parts_of(file)[0] for file in files})
    if len(models) > 1:
        named = some([model.name for model in models])
        raise CheckpointError(f"{folder} holds several GGUF models; give one of its files ({named})")
    return models[0] if models else None


def companions_folder(path: Path, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
    """The folder of a file's companions, written where it is not there yet.

    Raises:
        CheckpointError: the metadata holds no tokenizer that can be read, or the folder cannot be written.
    """
    status = path.stat()
    identity = f"{_VERSION}\0{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    every = user_folder() / "gguf"
    folder = every / f"{path.stem[:80]}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if (folder / CONFIG).exists():  # the last that is written
        return folder
    files = _tokenizer_files(path, metadata)
    files[_SOURCE] = _json([str(path.resolve()), status.st_size, status.st_mtime_ns])
    files[_GENERATION] = _json({key: config[key] for key in ("eos_token_id", "pad_token_id")})
    try:
        _remove_orphans(every)
        make_private(folder)
        for name, content in files.items():
            write_whole(folder / name, content)
        write_whole(folder / CONFIG, _json(config))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from None
    return folder


def _remove_orphans(every: Path) -> None:
    """Removes companions of files that are not there any more, or are others now."""
    for folder in every.iterdir() if every.is_dir() else []:
        if not (folder / _SOURCE).exists() and time.time() - folder.stat().st_mtime < _NEW_S:
            continue
        try:
            path, size, changed = json.loads((folder / _SOURCE).read_bytes())
            status = Path(path).stat()
            there = (status.st_size, status.st_mtime_ns) == (size, changed)
        except (OSError, ValueError, TypeError):
            there = False
        if not there:
            remove_tree(folder)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _tokenizer_files(path: Path, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _PRE:
        what = f"{reprlib.repr(model)}, cut as {reprlib.repr(pre)}"
        raise CheckpointError(f"{path} has a tokenizer of the kind {what}; GLM-4's is 'gpt2', cut as 'glm4'")
    tokens, kinds, merges = (_texts(path, metadata, key) for key in ("tokens", "token_type", "merges"))
    if len(tokens) != len(kinds) or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path}: its {len(tokens)} tokens have {len(kinds)} types, or one is there twice")
    kind_of = dict(zip(tokens, kinds, strict=True))
    added = [
        {"id": number, "content": token, "special": kind_of[token] == _CONTROL}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, token in enumerate(tokens)
        if kind_of[token] in (_CONTROL, _USER)
    ]
    vocabulary = {
        token: number for number, token in enumerate(tokens) if kind_of[token] not in (_CONTROL, _USER, _UNUSED)
    }
    split = {"type": "Split", "pattern": {"Regex": _pattern(path, metadata)}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    settings = {"unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "dropout": None}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", **settings, "fuse_unk": False, "byte_fallback": False}
        | {"ignore_merges": metadata.get(OWN_IGNORE_MERGES) is True}
        | {"vocab": vocabulary, "merges": merges},
    }
    roles = {"eos_token": "<|user|>", "pad_token": "<|endoftext|>"}
    values = {key: token for key, token in roles.items() if token in kind_of}
    values |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    return {TOKENIZER: _json(tokenizer), _SETTINGS: _json(values)} | _template_file(path, metadata)


def _pattern(path: Path, metadata: Mapping[str, Any]) -> str:
    """The pattern that a text is cut by: GLM-4's, or what `OWN_SPLIT` says."""
    pattern = metadata.get(OWN_SPLIT, SPLIT)
    if isinstance(pattern, str) and 0 < len(pattern) <= MOST_SPLIT:
        with suppress(Exception):  # the library has no class of its own for it
            tokenizers.Regex(pattern)
            return pattern
    raise CheckpointError(f"{path}: {OWN_SPLIT} is {reprlib.repr(pattern)}, which is no pattern; export it again")


def _texts(path: Path, metadata: Mapping[str, Any], key: str) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    wanted = int if key == "token_type" else str
    if not isinstance(values, list) or not values or not all(isinstance(value, wanted) for value in values):
        raise CheckpointError(f"{path} has no tokenizer.ggml.{key}; use a file that holds its tokenizer")
    return values


def _template_file(path: Path, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The file's template; ours where it has one that cannot speak of tools, none where it has none (a base model)."""
    named = metadata.get("tokenizer.chat_template.tool_use")
    source = named if isinstance(named, str) else metadata.get("tokenizer.chat_template")
    if not isinstance(source, str) or not source.strip():
        return {}
    if "tools" not in source:
        logger.warning("%s has a chat template without tools; glm4lite's own of GLM-4 is used", path)
        return {_TEMPLATE: (nano_folder() / _TEMPLATE).read_bytes()}
    return {_TEMPLATE: source.encode("utf-8", "surrogatepass")}
