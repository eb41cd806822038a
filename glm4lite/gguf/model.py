"""What a GGUF file says of the model: config.json's values from its metadata, and its tensors under GLM-4's names."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glm4lite.base.errors import CheckpointError
from glm4lite.base.stored_tensor import StoredTensor
from glm4lite.gguf.header import Header

ARCHITECTURES: Mapping[str, str] = {"glm4": "glm4", "chatglm": "glm"}
"""general.architecture -> model_type."""

_NAMES: Mapping[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PARTS: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_self_attn_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_mlp_layernorm",
}
_BY_NAME = {new: old.removesuffix(".weight") for old, new in _NAMES.items()}
_BY_PART = {new: old for old, new in _PARTS.items()} | {"mlp.gate_up_proj": "ffn_up"}
_FUSED_QKV, _GATE, _UP = "attn_qkv", "ffn_gate", "ffn_up"
_STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")
_HF_EPS, _HF_CONTEXT = 1.5625e-07, 131072  # of glm-4-9b-chat-hf


def model_config(path: Path, header: Header) -> dict[str, Any]:
    """As config.json would say it.

    Where a -hf checkpoint was converted as "chatglm", the converter looked for older keys and wrote what it takes if
    there are none: the width for the context, and another epsilon. That shows, and glm-4-9b-chat-hf's are taken then.

    Raises:
        CheckpointError: it is another model, or a value is missing.
    """
    metadata = _Metadata(path, header.metadata)
    architecture = str(header.metadata.get("general.architecture", "no known kind"))
    if architecture not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise CheckpointError(f"{path} is a model of {reprlib.repr(architecture)}; glm4lite runs {known}")
    heads, hidden = metadata.count("attention.head_count"), metadata.count("embedding_length")
    head_dim = metadata.count("attention.key_length", max(1, hidden // heads))
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path} has no token_embd.weight; download it again")
    context, eps = metadata.count("context_length"), metadata.number("attention.layer_norm_rms_epsilon")
    if architecture == "chatglm" and context == hidden:
        context, eps = _HF_CONTEXT, _HF_EPS
    ahead = metadata.count("nextn_predict_layers", 0)
    values = {
        "model_type": ARCHITECTURES[architecture],
        "architectures": [{"glm4": "Glm4ForCausalLM", "chatglm": "GlmForCausalLM"}[architecture]],
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": metadata.count("block_count") - ahead,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        "partial_rotary_factor": metadata.count("rope.dimension_count", head_dim // 2) / head_dim,
        "attention_bias": any(f"blk.0.{name}.bias" in header.tensors for name in ("attn_q", _FUSED_QKV)),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    if ahead:
        values["num_nextn_predict_layers"] = ahead
    return values | _scaling(metadata) | _stop_ids(header.metadata)


def _scaling(metadata: _Metadata) -> dict[str, Any]:
    kind = metadata.of_model("rope.scaling.type")
    if kind in (None, "none"):
        return {}
    if kind != "yarn":
        raise CheckpointError(f"{metadata.path} scales its positions by {reprlib.repr(kind)}; only yarn can be read")
    original = metadata.count("rope.scaling.original_context_length")
    factor = metadata.number("rope.scaling.factor")
    return {"rope_scaling": {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}}


def _stop_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Every token that ends a turn: most files name one or two, and GLM-4 has three."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    found = [tokens.index(token) for token in _STOPS if token in tokens]
    for key in ("eos_token_id", "eot_token_id", "eom_token_id"):
        value = metadata.get(f"tokenizer.ggml.{key}")
        if type(value) is int and value not in found:
            found.append(value)
    padding = metadata.get("tokenizer.ggml.padding_token_id")
    return {"eos_token_id": found or None, "pad_token_id": padding if type(padding) is int else None}


def ggml_name(name: str) -> str:
    """What a file calls a tensor of the model.

    >>> ggml_name("model.layers.3.self_attn.q_proj.bias")
    'blk.3.attn_q.bias'
    """
    if name in _BY_NAME:
        return f"{_BY_NAME[name]}.weight"
    _, _, layer, part = name.split(".", 3)
    module, _, leaf = part.rpartition(".")
    return f"blk.{layer}.{_BY_PART[module]}.{leaf}"


class _Metadata:
    """The values of the model itself, each checked."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self._values = path, values
        self._prefix = values.get("general.architecture")

    def of_model(self, key: str) -> Any:
        return self._values.get(f"{self._prefix}.{key}")

    def count(self, key: str, default: int | None = None) -> int:
        value = self.of_model(key)
        value = default if value is None else value
        if type(value) is not int or not (0 < value < 1 << 31 or value == default):
            raise self._wrong(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.of_model(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self._wrong(key, value)
        return float(value)

    def _wrong(self, key: str, value: Any) -> CheckpointError:
        what = "is missing" if value is None else f"is {reprlib.repr(value)}"
        return CheckpointError(f"{self.path}: {self._prefix}.{key} {what}; download it again")


def renamed(path: Path, header: Header, config: Mapping[str, Any]) -> Iterator[tuple[str, str, StoredTensor]]:
    """(GLM-4's name, its type in the file, where it lies) of every tensor; those of q, k and v in one are cut apart.

    Raises:
        CheckpointError: a tensor of that kind has another number of rows.
    """
    halves = any(name.startswith(f"blk.0.{_GATE}.") for name in header.tensors)
    head_dim = config["head_dim"]
    key_rows = config["num_key_value_heads"] * head_dim
    rows = {"q": config["num_attention_heads"] * head_dim, "k": key_rows, "v": key_rows}
    for name, tensor in header.tensors.items():
        kind, layer = header.types[name], _LAYER.fullmatch(name)
        if layer is None:
            yield _NAMES.get(name, name), kind, tensor
            continue
        prefix, part, suffix = f"model.layers.{layer[1]}", layer[2], layer[3]
        if part == _FUSED_QKV:
            if tensor.shape[0] != sum(rows.values()):
                raise CheckpointError(
                    f"{name} in {path} has {tensor.shape[0]} rows; the heads need {sum(rows.values())}"
                )
            first = 0
            for letter, count in rows.items():
                yield f"{prefix}.self_attn.{letter}_proj.{suffix}", kind, tensor.rows(first, first + count)
                first += count
            continue
        mlp = {_GATE: "gate_proj", _UP: "up_proj"} if halves else {_UP: "gate_up_proj"}
        own = f"mlp.{mlp[part]}" if part in mlp else _PARTS.get(part)
        yield (name if own is None else f"{prefix}.{own}.{suffix}"), kind, tensor
