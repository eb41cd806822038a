"""GGUF files of a tiny GLM-4, written by the package gguf, and the same model as a plain folder.

write_gguf(tmp_path / "tiny.gguf", "Q4_0")
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.glm4lite.checkpoints import SPECIALS, TEMPLATE, tiny_config, tiny_tensors, tiny_tokenizer

CONFIG = tiny_config(hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_mlp_layernorm": "post_ffw_norm",
}


def ggml_name(name: str, architecture: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{leaf}"
    _, _, layer, part = module.split(".", 3)
    own = NAMES[part]
    fused = architecture == "chatglm" and own in ("attn_q", "attn_k", "attn_v")
    return f"blk.{layer}.{'attn_qkv' if fused else own}.{leaf}"


def random_blocks(kind: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray[Any, Any]:
    """uint8 [N, bytes] of a type that the package cannot write: any codes, and scales that make weights sane."""
    number = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[number]
    chance = np.random.default_rng(seed)
    blocks = chance.integers(0, 256, (shape[0] * shape[1] // weights, size), dtype=np.uint8)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind, (0,)):
        scale = (0.0005 + 0.0005 * chance.random(len(blocks))).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


def write_gguf(
    path: Path, kind: str, split: int = 0, own: Mapping[str, str] = {}, **changes: Any
) -> dict[str, torch.Tensor]:
    """Writes a file whose matrices have the type `kind`; returns what its tensors decode to, by GLM-4's names.

    own: further metadata. changes: metadata, None leaves a key out; `architecture` too. split: tensors of each of
    several files.
    """
    architecture = changes.pop("architecture", "glm4")
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    _add_metadata(writer, changes)
    for key, value in own.items():
        writer.add_string(key, value)
    decoded, joined = dict[str, torch.Tensor](), dict[str, list[np.ndarray[Any, Any]]]()
    config = CONFIG if architecture == "glm4" else CONFIG | {"model_type": "glm"}
    number = gguf.GGMLQuantizationType[kind]
    for name, tensor in tiny_tensors(config).items():
        values = tensor.float().numpy()
        if values.ndim == 1 or kind == "F32":
            joined.setdefault(ggml_name(name, architecture), []).append(values)
            decoded[name] = torch.from_numpy(values)
            continue
        try:
            data = gguf.quants.quantize(values, number)
        except NotImplementedError:
            data = random_blocks(kind, values.shape)
        joined.setdefault(ggml_name(name, architecture), []).append(data)
        decoded[name] = torch.from_numpy(gguf.quants.dequantize(data, number).copy())
    for name, parts in joined.items():  # those of q, k and v may have one name
        stored = np.concatenate(parts)
        writer.add_tensor(name, stored, raw_dtype=number if stored.ndim > 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def _add_metadata(writer: gguf.GGUFWriter, changes: dict[str, Any]) -> None:
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_context_length(changes.pop("context_length", CONFIG["max_position_embeddings"]))
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_dimension_count(int(CONFIG["head_dim"] * CONFIG["partial_rotary_factor"]))
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    written = json.loads(tiny_tokenizer().to_str())
    vocabulary = sorted(written["model"]["vocab"].items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary] + list(SPECIALS)
    padding = [f"[PAD{number}]" for number in range(len(tokens), CONFIG["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.pop("pre", "glm4"))
    writer.add_token_list(tokens + padding)
    writer.add_token_types([1] * len(vocabulary) + [3] * len(SPECIALS) + [5] * len(padding))
    writer.add_token_merges([" ".join(pair) for pair in written["model"]["merges"]])
    writer.add_eos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eot_token_id(tokens.index("<|user|>"))
    template = changes.pop("template", TEMPLATE)
    if template is not None:
        writer.add_chat_template(template)
