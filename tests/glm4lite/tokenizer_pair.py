"""Transformers' tokenizer and ours over the same files."""

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from glm4lite import Tokenizer
from tests.glm4lite.served import NANO
from tests.glm4lite.small_tokenizer import SHARED, byte_backend, needs_shared

PAIRS = ["nano", "prefixed", pytest.param("glm4", marks=needs_shared)]
_ROOT = tempfile.TemporaryDirectory(prefix="tokenizers-")  # until the process ends


@functools.cache
def folder(name: str) -> Path:
    """The files of one of `PAIRS`."""
    if name == "nano":
        return NANO
    made = Path(_ROOT.name) / name
    made.mkdir()
    if name == "prefixed":
        write_prefixed(made)
        return made
    shutil.copy(SHARED / "tokenizer" / "tokenizer.json", made)
    config = json.loads((SHARED / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["auto_map"]  # names code, which AutoTokenizer asks to run
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@functools.cache
def opened(name: str) -> tuple[Any, Tokenizer]:
    """Transformers' tokenizer and ours; not to be changed."""
    return both(folder(name))


def both(path: Path) -> tuple[Any, Tokenizer]:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(path), Tokenizer.from_pretrained(path)


def write_prefixed(folder: Path) -> None:
    """As the fuller GLM-4 files: `[gMASK]<sop>` before a text, `</s>` behind it; a bos token, and a token that is added
    but not special.
    """
    backend = byte_backend()
    backend.add_tokens(["<tool>"])
    backend.add_special_tokens([tokenizers.AddedToken("</s>", lstrip=True)])
    ids = {name: backend.token_to_id(name) for name in ("[gMASK]", "<sop>", "</s>")}
    backend.post_processor = processors.TemplateProcessing(
        "[gMASK] <sop> $A </s>", "[gMASK] <sop> $A </s> $B:1 </s>:1", list(ids.items())
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<sop>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": True, "special": True},
        "pad_token": "<|endoftext|>",
        "image_token": "<|begin_of_image|>",
        "truncation_side": "left",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": True,
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def values(encoding: Any) -> dict[str, Any]:
    """What is in an encoding, with the type of each tensor."""
    return {
        name: (str(value.dtype), value.tolist()) if hasattr(value, "tolist") else value
        for name, value in dict(encoding).items()
    }
