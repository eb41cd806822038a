"""Glm4Config: the documented defaults, both dialects, and errors that name the key."""

import pytest

from glm4lite.config import Glm4Config
from glm4lite.errors import ConfigError

SIZES = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
}


def test_every_default_is_the_references() -> None:
    transformers = pytest.importorskip("transformers")
    reference, ours = transformers.Glm4Config().to_dict(), Glm4Config().model_dump()
    for key in transformers.Glm4Config.__annotations__:
        if key in ours and key != "model_type":
            assert ours[key] == reference[key], key
    assert Glm4Config().rms_norm_eps == 1.5625e-07


def test_the_older_dialect_says_the_same_as_the_newer_one() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    older = Glm4Config.from_dict(
        {**SIZES, "model_type": "glm4", "rope_theta": 5e6, "rope_scaling": yarn, "torch_dtype": "bfloat16"}
    )
    newer = Glm4Config.from_dict(
        {
            **SIZES,
            "model_type": "glm4",
            "rope_parameters": {**yarn, "rope_type": "yarn", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "dtype": "bfloat16",
        }
    )
    assert older.rope_theta == newer.rope_theta == 5e6
    assert older.partial_rotary_factor == 0.5  # chat-hf leaves it out
    assert older.rope_parameters["rope_type"] == "yarn"
    assert older.dtype == newer.dtype == "bfloat16"


def test_a_config_comes_back_from_its_own_dict() -> None:
    config = Glm4Config(**SIZES, model_type="glm", eos_token_id=5, unknown_key=[1])
    again = Glm4Config.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert config.to_dict()["architectures"] == ["GlmForCausalLM"]
    assert (again.eos_token_ids, again.to_dict()["unknown_key"]) == ([5], [1])


def test_the_remote_code_dialect_of_glm_4_9b_chat_is_read() -> None:
    config = Glm4Config.from_dict(
        {
            "model_type": "chatglm",
            "padded_vocab_size": 151552,
            "hidden_size": 4096,
            "ffn_hidden_size": 13696,
            "num_layers": 40,
            "num_attention_heads": 32,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "kv_channels": 128,
            "layernorm_epsilon": 1.5625e-07,
            "rope_ratio": 500,
            "seq_length": 131072,
            "add_qkv_bias": True,
        }
    )
    assert (config.model_type, config.rope_theta, config.num_key_value_heads) == ("glm", 5e6, 2)
    assert (config.max_position_embeddings, config.intermediate_size) == (131072, 13696)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"hidden_size": "4096"}, "hidden_size: .* found '4096'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: .* found -1"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(32\) must be a multiple of num_key_value_heads \(3\)"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor must be a number above 0, found None"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object, found 'yarn'"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 of head_dim 128 gives 192"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_file(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Glm4Config.from_dict({**SIZES, "model_type": "glm4", **changes}, "model/config.json")
    assert str(caught.value).startswith("model/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "num_hidden_layers"])
def test_a_missing_key_is_named(key: str) -> None:
    values = {**SIZES, "model_type": "glm4"}
    del values[key]
    with pytest.raises(ConfigError, match=f"the key '{key}' is missing"):
        Glm4Config.from_dict(values)
