"""What a GGUF file says of the model, its tokenizer and its ends of turn, as llama.cpp's converter says it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glm4lite.base.errors import CheckpointError, ConfigError
from glm4lite.base.files import TOKENIZER, read_json
from glm4lite.checkpoint.prepare import Prepared
from glm4lite.engine.stop_ids import stop_ids
from glm4lite.gguf.companions import MOST_SPLIT, OWN_IGNORE_MERGES, OWN_SPLIT, SPLIT
from glm4lite.gguf.header import SUFFIX
from glm4lite.gguf.model import ARCHITECTURES
from glm4lite.model.config import Glm4Config
from glm4lite.text.template import read_sources
from glm4lite.text.tokenizer import Tokenizer

logger = logging.getLogger("glm4lite")

_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5  # ggml's types of tokens
_ENDS = (("eos", "<|endoftext|>"), ("eot", "<|user|>"), ("eom", "<|observation|>"))
"""llama.cpp ends an answer at any of these three; the last is for calls that want a result."""
_CUTS = {"glm4": "glm4", "chatglm": "chatglm-bpe"}
_QUANTIZATION_VERSION = 2
_YARN_KEYS = {"rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"}


def check(prepared: Prepared[Any]) -> None:
    """Raises Glm4liteError where the file could not say what the model is."""
    rope = prepared.config.rope_parameters
    more = sorted(key for key, value in rope.items() if key not in _YARN_KEYS and value is not None)
    if more:
        raise ConfigError(f"rope_scaling has {', '.join(more)}, which a GGUF file cannot say; export to hf")
    if not (prepared.checkpoint.folder / TOKENIZER).exists():
        raise CheckpointError(f"{prepared.checkpoint.folder} has no {TOKENIZER}, which a GGUF file holds; add it")


def describe(prepared: Prepared[Any], file_type: int) -> tuple[str, Callable[[Any], None]]:
    """general.architecture, and what puts all other metadata into a `gguf.GGUFWriter`."""
    config, checkpoint = prepared.config, prepared.checkpoint
    architecture = next(name for name, model_type in ARCHITECTURES.items() if model_type == config.model_type)
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    stops = stop_ids(config, checkpoint.generation_config, tokenizer)
    written = tokenizer.written()
    tokens, own = _tokens(tokenizer, written, config.vocab_size), _own_split(written["pre_tokenizer"])
    templates = read_sources(
        checkpoint.folder, read_json(checkpoint.folder / "tokenizer_config.json", CheckpointError, optional=True)
    )[0]

    def add(writer: Any) -> None:
        writer.add_name(model_name(checkpoint.origin))
        writer.add_file_type(file_type)
        writer.add_quantization_version(_QUANTIZATION_VERSION)
        _add_model(writer, config)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_CUTS[architecture])
        if own is not None:
            writer.add_string(OWN_SPLIT, own)
        if written["model"].get("ignore_merges"):
            writer.add_bool(OWN_IGNORE_MERGES, True)
        writer.add_token_list([token for token, _ in tokens])
        writer.add_token_types([kind for _, kind in tokens])
        writer.add_token_merges(
            [pair if isinstance(pair, str) else " ".join(pair) for pair in written["model"]["merges"]]
        )
        for end, token in _ends(tokenizer, stops):
            getattr(writer, f"add_{end}_token_id")(token)
        if tokenizer.pad_token_id is not None:
            writer.add_pad_token_id(tokenizer.pad_token_id)
        writer.add_add_bos_token(False)  # the template writes [gMASK]<sop>
        if templates:
            named = [{"name": key, "template": source} for key, source in templates.items()]
            writer.add_chat_template(named[0]["template"] if len(named) == 1 else named)

    return architecture, add


def _add_model(writer: Any, config: Glm4Config) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rope_theta)
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(importlib.import_module("gguf").RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def model_name(origin: Path) -> str:
    """The model's, of a file, a folder, or a repository in the Hub's cache."""
    if origin.suffix == SUFFIX:
        return origin.stem
    folder = origin.resolve()
    return folder.parents[1].name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name


def _tokens(tokenizer: Tokenizer, written: Mapping[str, Any], rows: int) -> list[tuple[str, int]]:
    """(token, its type) for every row of the embedding."""
    model = written["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or not tokenizer.byte_level:
        raise CheckpointError("the tokenizer is no byte-level BPE, which GLM-4's is; a GGUF file cannot hold it")
    found = {number: (token, _NORMAL) for token, number in model["vocab"].items()}
    for token in written["added_tokens"]:
        found[token["id"]] = (token["content"], _CONTROL if token["special"] else _USER)
    if max(found) >= rows:
        raise CheckpointError(f"the tokenizer has {max(found) + 1} tokens and the embedding {rows} rows")
    return [found.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(rows)]


def _own_split(cuts: Any) -> str | None:
    """The pattern by which the tokenizer cuts a text, None where it is GLM-4's; what others make of it is said."""
    parts = cuts.get("pretokenizers", [cuts]) if isinstance(cuts, dict) else []
    split = [part for part in parts if part.get("type") == "Split"]
    alike = {"behavior": "Isolated", "invert": False}
    simple = len(split) == 1 and {part.get("type") for part in parts} == {"Split", "ByteLevel"}
    pattern = split[0].get("pattern", {}).get("Regex") if simple and alike.items() <= split[0].items() else None
    if pattern == SPLIT:
        return None
    own: str | None = pattern if isinstance(pattern, str) and len(pattern) <= MOST_SPLIT else None
    here = "glm4lite itself will, too" if own is None else "glm4lite alone finds its own way in the file"
    logger.warning(
        "the tokenizer cuts texts in a way that GGUF has no name for: GLM-4's is named, by which llama.cpp and other "
        "engines will give most texts other ids, and the model answers worse there; %s",
        here,
    )
    return own


def _ends(tokenizer: Tokenizer, stops: frozenset[int]) -> list[tuple[str, int]]:
    """(llama.cpp's name, id) of up to three tokens that end an answer, GLM-4's by their names."""
    by_name = {end: tokenizer.special[token] for end, token in _ENDS if tokenizer.special.get(token) in stops}
    rest = sorted(stops - set(by_name.values()))
    for end, _ in _ENDS:
        if end not in by_name and rest:
            by_name[end] = rest.pop(0)
    if rest:
        logger.warning("a GGUF file names three tokens that end an answer; %s are left out", rest)
    return sorted(by_name.items())
