"""Glm4Config: the documented defaults, both dialects, and errors that name the key."""

import copy
import math
from typing import Any

import pytest
import torch

from glm4lite.base.errors import ConfigError
from glm4lite.model.config import Glm4Config

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
    assert older.dtype == newer.dtype == torch.bfloat16


def test_a_config_comes_back_from_its_own_dict() -> None:
    config = Glm4Config(**SIZES, model_type="glm", eos_token_id=5, unknown_key=[1])
    again = Glm4Config.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert Glm4Config.from_dict(config.to_diff_dict()).to_diff_dict() == config.to_diff_dict()
    assert config.to_diff_dict()["architectures"] == ["GlmForCausalLM"]
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
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_parameters: factor must be a number of at least 1, found None"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object, found 'yarn'"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 of head_dim 128 gives 192"),
        ({"hidden_act": "prelu"}, "hidden_act 'prelu' has weights of its own"),
        ({"hidden_act": "gellu"}, "hidden_act 'gellu' is not known"),
        ({"hidden_size": 100, "head_dim": None}, "head_dim is null, and hidden_size 100 is no multiple of 32 heads"),
        ({"id2label": {"one": "a"}}, "id2label: keys are numbers"),
        ({"dtype": "bloat16"}, "dtype must be the name of a torch.dtype such as 'bfloat16', found 'bloat16'"),
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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


DEFAULT = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
SCALED = {"factor": 4.0, "original_max_position_embeddings": 256}

# As config.json may say them, and Transformers reads them.
ROPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "older keys": {"rope_theta": 5e6, "partial_rotary_factor": 1.0},
    "a whole number": {"rope_theta": 10000},
    "newer keys": {"rope_parameters": DEFAULT | {"rope_theta": 5e6}},
    "type beside rope_parameters": {"rope_parameters": DEFAULT, "rope_scaling": SCALED | {"type": "yarn"}},
    "rope_type beside rope_parameters": {"rope_parameters": DEFAULT, "rope_scaling": SCALED | {"rope_type": "yarn"}},
    "all keys in rope_scaling": {
        "rope_theta": 1e6,
        "rope_parameters": DEFAULT | {"rope_theta": 5e6},
        "rope_scaling": SCALED | {"type": "yarn", "rope_theta": 2e6, "partial_rotary_factor": 1.0},
    },
    "empty rope_scaling": {"rope_parameters": DEFAULT | SCALED | {"rope_type": "yarn"}, "rope_scaling": {}},
    "null rope_scaling": {"rope_parameters": DEFAULT | SCALED | {"rope_type": "yarn"}, "rope_scaling": None},
    "rope_scaling of no scaling": {
        "rope_parameters": DEFAULT | SCALED | {"rope_type": "yarn"},
        "rope_scaling": {"rope_type": "default"},
    },
    "two scalings": {
        "rope_parameters": DEFAULT | SCALED | {"rope_type": "yarn", "factor": 8.0},
        "rope_scaling": SCALED | {"rope_type": "yarn"},
    },
    "factor null": {"rope_scaling": SCALED | {"type": "yarn", "factor": None}},
    "factor whole": {"rope_scaling": SCALED | {"type": "yarn", "factor": 4}},
    "factor 1": {"rope_scaling": SCALED | {"type": "yarn", "factor": 1.0}},
    "original length left out": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "original length beside": {
        "original_max_position_embeddings": 128,
        "rope_scaling": {"type": "yarn", "factor": 4.0},
    },
    "attention_factor": {"rope_scaling": SCALED | {"type": "yarn", "attention_factor": 1.5}},
    "mscale": {"rope_scaling": SCALED | {"type": "yarn", "mscale": 0.7, "mscale_all_dim": 1.0}},
    "mscale alone": {"rope_scaling": SCALED | {"type": "yarn", "mscale": 0.7}},
    "mscale 0": {"rope_scaling": SCALED | {"type": "yarn", "mscale": 0, "mscale_all_dim": 0.0}},
    "betas": {"rope_scaling": SCALED | {"type": "yarn", "beta_fast": 16, "beta_slow": 2}},
    "betas exchanged": {"rope_scaling": SCALED | {"type": "yarn", "beta_fast": 1, "beta_slow": 32}},
    "betas null": {"rope_scaling": SCALED | {"type": "yarn", "beta_fast": None, "beta_slow": None}},
    "not truncated": {"rope_scaling": SCALED | {"type": "yarn", "truncate": False}},
}


@pytest.mark.parametrize("how", ROPES)
def test_every_way_to_say_rope_means_what_transformers_reads(how: str) -> None:
    torch, modeling = pytest.importorskip("torch"), pytest.importorskip("transformers.models.glm4.modeling_glm4")
    rotary = pytest.importorskip("glm4lite.model.rotary")
    values = {**SIZES, "head_dim": 64, "max_position_embeddings": 1024, **ROPES[how]}
    reference = modeling.Glm4RotaryEmbedding(modeling.Glm4Config(**copy.deepcopy(values)))
    config = Glm4Config.from_dict({**values, "model_type": "glm4"})
    frequencies, scaling = rotary.inverse_frequencies(config)
    torch.testing.assert_close(frequencies, reference.inv_freq)
    assert scaling == pytest.approx(reference.attention_scaling)
    assert Glm4Config.from_dict(config.to_dict()).rope_parameters == config.rope_parameters


def test_the_base_of_rope_parameters_is_kept_beside_rope_scaling() -> None:
    """Transformers takes its default of 10000 here, which is no model's intention."""
    saved = {"rope_parameters": DEFAULT | {"rope_theta": 5e6, "partial_rotary_factor": 1.0}}
    config = Glm4Config.from_dict({**SIZES, "model_type": "glm4", **saved, "rope_scaling": SCALED | {"type": "yarn"}})
    assert (config.rope_theta, config.partial_rotary_factor) == (5e6, 1.0)
    assert config.rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": SCALED | {"type": "linear"}}, "rope_type 'linear' is not supported"),
        ({"rope_scaling": SCALED | {"type": "dynamic"}}, "rope_type 'dynamic' is not supported"),
        ({"rope_scaling": SCALED | {"type": "YARN"}}, "rope_type 'YARN' is not supported"),
        ({"rope_scaling": SCALED}, "'factor' is not known of rope_type 'default'"),
        ({"rope_scaling": SCALED | {"type": "yarn", "attn_factor": 2.0}}, "'attn_factor' is not known of rope_type"),
        ({"rope_parameters": {"full_attention": DEFAULT}}, "'full_attention' is not known of rope_type 'default'"),
        (
            {"rope_scaling": SCALED | {"type": "yarn", "rope_type": "default"}},
            "rope_type is both 'yarn' and 'default'; remove the one that is not meant",
        ),
        (
            {"rope_theta": 1e6, "rope_parameters": DEFAULT | {"rope_theta": 5e6}, "rope_scaling": SCALED},
            "rope_theta is both 5000000.0 and 1000000.0; remove the one that is not meant",
        ),
        (
            {"original_max_position_embeddings": 128, "rope_scaling": SCALED | {"type": "yarn"}},
            "original_max_position_embeddings is both 256 and 128",
        ),
    ],
)
def test_rope_that_contradicts_itself_or_is_not_known_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Glm4Config.from_dict({**SIZES, "model_type": "glm4", **changes})


@pytest.mark.parametrize(
    ("longest", "scaling", "context"),
    [
        (32768, {}, 32768),
        (32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (131072, {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32768}, 131072),
        (32768, {"type": "yarn", "factor": 4.0}, 131072),
        (131072, {"type": "yarn", "factor": None, "original_max_position_embeddings": 32768}, 131072),
        (32768, {"type": "yarn", "factor": 1e12, "original_max_position_embeddings": 1e12}, 2**31 - 1),
    ],
)
def test_yarn_lengthens_the_context_by_its_factor(longest: int, scaling: dict[str, Any], context: int) -> None:
    values = {**SIZES, "model_type": "glm4", "max_position_embeddings": longest, "rope_scaling": scaling}
    config = Glm4Config.from_dict(values)
    assert config.context_length == context
    assert Glm4Config.from_dict(config.to_dict()).context_length == context


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400, "10000", True, None, [], 1, 0, -5])
def test_a_rope_base_is_a_number_above_1(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^config.json: (rope_parameters[.:] ?)?rope_theta must be ") as caught:
        Glm4Config.from_dict({**SIZES, "model_type": "glm4", "rope_parameters": {"rope_theta": value}})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("factor", 0.5),
        ("factor", math.inf),
        ("original_max_position_embeddings", 0),
        ("original_max_position_embeddings", 10**400),
        ("beta_fast", "32"),
        ("beta_fast", -3),
        ("beta_fast", 0),
        ("beta_slow", 1e-300),
        ("beta_slow", 1e300),
        ("attention_factor", "x"),
        ("attention_factor", 0),
        ("mscale", "x"),
        ("mscale", -10.0),
        ("mscale_all_dim", []),
        ("truncate", "yes"),
        ("partial_rotary_factor", math.inf),
        ("partial_rotary_factor", 1e300),
    ],
)
def test_a_yarn_value_that_cannot_be_used_is_named(key: str, value: object) -> None:
    rope = {"mscale": 1.0, "mscale_all_dim": 1.0} | YARN | {key: value}
    with pytest.raises(ConfigError, match=rf"rope_parameters[.:] ?{key} must be ") as caught:
        Glm4Config.from_dict({**SIZES, "model_type": "glm4", "rope_parameters": rope})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("rope_theta", [1.0001, 1e4, 9e11])
@pytest.mark.parametrize("beta", [0.002, 1, 9e11])
@pytest.mark.parametrize("context", [1, 9e11])
def test_every_rope_value_that_is_accepted_gives_finite_frequencies(
    rope_theta: float, beta: float, context: float
) -> None:
    rotary = pytest.importorskip("glm4lite.model.rotary")
    odd: dict[str, Any] = {"factor": 9e11, "beta_fast": beta, "beta_slow": 9e11, "mscale": 9e11, "mscale_all_dim": 1}
    rope = YARN | odd | {"rope_theta": rope_theta, "original_max_position_embeddings": context}
    frequencies, scaling = rotary.inverse_frequencies(Glm4Config(**SIZES, rope_parameters=rope))
    assert frequencies.isfinite().all()
    assert math.isfinite(scaling)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"initializer_range": math.inf}, "initializer_range"),
        ({"initializer_range": -1.0}, "initializer_range"),
        ({"attention_dropout": 10**400}, "attention_dropout"),
        ({"hidden_dropout": "x"}, "hidden_dropout"),
        ({"hidden_dropout": 1.5}, "hidden_dropout"),
        ({"classifier_dropout": -0.5}, "classifier_dropout"),
        ({"num_labels": 10**400}, "num_labels"),
        ({"max_position_embeddings": 10**400}, "max_position_embeddings"),
        ({"pad_token_id": 10**400}, "pad_token_id"),
        ({"vision": {"sizes": [1, math.nan]}}, r"vision\.sizes\.1"),
    ],
)
def test_a_number_that_is_not_finite_or_out_of_range_is_named(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config.json: {key}\b") as caught:
        Glm4Config.from_dict({**SIZES, "model_type": "glm4", **changes})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("ratio", ["500", math.nan, 10**400, 0, -1, True])
def test_a_rope_ratio_that_cannot_be_used_is_named_with_its_file(ratio: object) -> None:
    with pytest.raises(
        ConfigError, match=r"^old/config.json: rope_ratio must be (a number above 0|at most 1e\+12), found"
    ):
        Glm4Config.from_dict({**SIZES, "model_type": "chatglm", "rope_ratio": ratio}, "old/config.json")


def test_a_value_nested_without_end_is_refused() -> None:
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(ConfigError, match=r"^config.json: extra is nested too deeply"):
        Glm4Config.from_dict({**SIZES, "model_type": "glm4", "extra": nested})


def test_token_ids_that_are_null_stay_null() -> None:
    config = Glm4Config.from_dict({**SIZES, "model_type": "glm4", "pad_token_id": None, "eos_token_id": None})
    values = config.to_diff_dict()
    assert (values["pad_token_id"], values["eos_token_id"]) == (None, None)
    again = Glm4Config.from_dict(values)
    assert (again.pad_token_id, again.eos_token_ids) == (None, [])
    assert "dtype" not in values
    assert "problem_type" not in values
