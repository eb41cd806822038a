"""Tiny checkpoints for tests: real safetensors shards with an index, a real tokenizer, a chat template.

folder = write_checkpoint(tmp_path / "tiny", tiny_config(num_hidden_layers=1), shards=2)
"""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
"""GLM-4-0414's special tokens, in its order; they follow the ordinary tokens."""

ORDINARY = 370
"""Ordinary tokens of the tiny tokenizer; the specials take ids 370 to 383 and the model has 400 rows."""

TEXT = (
    "What is 37 * 24? The answer is 888. It is sunny in Paris today, and the tower is 330 metres tall.",
    "Convert 5 km to miles, please. That is about 3.106856 miles. The weather in Tokyo is fine.",
    "今天天气很好。你好，世界！北京是中国的首都。",
    'def main():\n    print("hello")\n\n{"expression": "37 * 24", "city": "Paris", "value": 5}',
)

TEMPLATE = """[gMASK]<sop>
{%- if tools %}<|system|>
# 可用工具
{% for tool in tools %}{% set function = tool["function"] if "function" in tool else tool %}

## {{ function["name"] }}

{{ function | tojson(indent=4) }}
在调用上述函数时，请使用 Json 格式表示调用的参数。
{%- endfor %}
{%- endif %}
{%- for message in messages %}
{%- if message.get("metadata") %}<|assistant|>{{ message["metadata"] }} \\n{{ message["content"] }}
{%- else %}<|{{ message["role"] }}|>\\n{{ message["content"] }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}""".replace("\\n", "\n")
"""A chat template that lays messages and tools out as the 0414 one does (small, not a copy)."""


def tiny_config(**changes: Any) -> dict[str, Any]:
    """config.json of a two-layer GLM-4 with all its features; keyword arguments replace keys, None removes one."""
    eos = [ORDINARY + SPECIALS.index(token) for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    config = {
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 400,
        "hidden_act": "silu",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": eos,
        "pad_token_id": ORDINARY,
    }
    return {key: value for key, value in (config | changes).items() if value is not None}


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of the causal language model that `config` describes."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    rows = {"q": config["num_attention_heads"] * head_dim}
    rows["k"] = rows["v"] = config["num_key_value_heads"] * head_dim
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config["model_type"] == "glm4":
        norms += ["post_self_attn_layernorm", "post_mlp_layernorm"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for letter, count in rows.items():
            found[f"{prefix}self_attn.{letter}_proj.weight"] = (count, hidden)
            if config["attention_bias"]:
                found[f"{prefix}self_attn.{letter}_proj.bias"] = (count,)
        found[f"{prefix}self_attn.o_proj.weight"] = (hidden, rows["q"])
        found[f"{prefix}mlp.gate_up_proj.weight"] = (2 * inner, hidden)
        found[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        found |= {f"{prefix}{norm}.weight": (hidden,) for norm in norms}
    found["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    return found


def tiny_tensors(
    config: Mapping[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Random weights of a sane scale: norms near 1, matrices near 1/sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        values = torch.randn(shape, generator=generator)
        values = 1 + 0.1 * values if "norm" in name else values / shape[-1] ** 0.5 if len(shape) == 2 else 0.1 * values
        tensors[name] = values.to(dtype)
    return tensors


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    """`shards` files of about equal counts (so a layer lies in two) and an index; 1 means model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), dict[str, str]()
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE of GLM-4's kind (same split, all 256 bytes, its 14 specials last), trained on a few lines."""
    return Tokenizer.from_str(_trained())


@functools.cache
def _trained() -> str:
    """What tokenizer.json holds: trained once, as many checkpoints are written."""
    tokenizer = Tokenizer(models.BPE())
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ORDINARY, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    if tokenizer.get_vocab_size() != ORDINARY:
        raise RuntimeError(f"the tiny tokenizer has {tokenizer.get_vocab_size()} tokens, {ORDINARY} expected")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return str(tokenizer.to_str(pretty=True))


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """tokenizer.json, tokenizer_config.json and, unless `template` is None, chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_trained(), encoding="utf-8")
    added = {
        str(ORDINARY + i): {"content": token, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, token in enumerate(SPECIALS)
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": added,
        "eos_token": "<|user|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    shards: int = 2,
    tokenizer: bool = True,
) -> Path:
    """A whole checkpoint folder; `tensors` default to random ones that fit `config`."""
    config = tiny_config() if config is None else config
    write_shards(folder, tiny_tensors(config) if tensors is None else tensors, shards)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    generation = {"eos_token_id": config.get("eos_token_id"), "pad_token_id": config.get("pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    if tokenizer:
        write_tokenizer(folder)
    return folder


def legacy_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """The same two-norm model as the older chatglm remote code stores it: other names, fused q, k and v."""
    renamed = dict(_legacy_tensors(config["num_hidden_layers"], tensors))
    renamed["transformer.rotary_pos_emb.inv_freq"] = torch.ones(4)
    old = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "padded_vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "multi_query_attention": True,
        "multi_query_group_num": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "ffn_hidden_size": config["intermediate_size"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "seq_length": config["max_position_embeddings"],
        "add_qkv_bias": config["attention_bias"],
        "add_bias_linear": False,
        "rope_ratio": config["rope_theta"] / 10000,
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "torch_dtype": "bfloat16",
    }
    return write_checkpoint(folder, old, renamed)


def _legacy_tensors(layers: int, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield "transformer.embedding.word_embeddings.weight", tensors["model.embed_tokens.weight"]
    for i in range(layers):
        old, new = f"transformer.encoder.layers.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            parts = [f"{new}self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            if all(name in tensors for name in parts):
                yield f"{old}self_attention.query_key_value.{kind}", torch.cat([tensors[name] for name in parts])
        yield f"{old}self_attention.dense.weight", tensors[f"{new}self_attn.o_proj.weight"]
        yield f"{old}mlp.dense_h_to_4h.weight", tensors[f"{new}mlp.gate_up_proj.weight"]
        yield f"{old}mlp.dense_4h_to_h.weight", tensors[f"{new}mlp.down_proj.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{old}{norm}.weight", tensors[f"{new}{norm}.weight"]
    yield "transformer.encoder.final_layernorm.weight", tensors["model.norm.weight"]
    yield "transformer.output_layer.weight", tensors["lm_head.weight"]
