"""Writes a checkpoint folder: configs, tokenizer, chat template, and bf16 safetensors shards with an index."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from nano.tokenizer import tokenizer_config

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
SHARDS = 2


def model_config(tokenizer: Tokenizer) -> dict[str, object]:
    """The config.json of `nano`: the shape of GLM-4-9B-0414, made small."""
    special = {name: tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")}
    return {
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": list(special.values()),
        "pad_token_id": special["<|endoftext|>"],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 640,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_shards(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous().clone() for name, tensor in state.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, torch.Tensor]] = [{}]
    written = 0
    for name, tensor in tensors.items():
        if written >= total * len(shards) / SHARDS:
            shards.append({})
        shards[-1][name] = tensor
        written += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def export(
    state: Mapping[str, torch.Tensor], config: Mapping[str, object], tokenizer: Tokenizer, destination: Path
) -> None:
    """Writes the whole folder beside `destination`, then swaps it in, so that a reader never sees half of it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    folder.chmod(0o755)
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, "do_sample": False, **ids})
    tokenizer.save(str(folder / "tokenizer.json"))
    limit = config["max_position_embeddings"]
    _write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, int(str(limit))))
    shutil.copyfile(TEMPLATE, folder / "chat_template.jinja")
    _write_shards(folder, state)
    old = folder.with_name(folder.name + "-old")
    if destination.exists():
        destination.rename(old)
    folder.rename(destination)
    shutil.rmtree(old, ignore_errors=True)
