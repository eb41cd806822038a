"""What QuantConfig accepts, what it writes to config.json, and which modules its table treats differently."""

from __future__ import annotations

import json
from typing import Any

import pytest

from glm4lite_quant import Codec, QuantConfig, QuantError


def test_names_of_the_command_line_are_parsed() -> None:
    assert QuantConfig.parse("int4") == QuantConfig(4, 32)
    assert QuantConfig.parse("int8") == QuantConfig(8, 32)
    assert QuantConfig.parse("none") is None
    assert QuantConfig.parse(None) is None
    assert QuantConfig.parse(QuantConfig(4, 128)) == QuantConfig(4, 128)


@pytest.mark.parametrize("value", ["int5", "", "INT4", 4, True])
def test_an_unknown_name_says_what_can_be_used(value: Any) -> None:
    with pytest.raises(QuantError, match="use int4, int8 or none"):
        QuantConfig.parse(value)


@pytest.mark.parametrize(("key", "kwargs"), [("bits", {"bits": 7}), ("bits", {"bits": True}), ("bits", {"bits": "4"})])
def test_wrong_bits_are_named(key: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(QuantError, match=f"{key} is .*; use one of 2, 3, 4, 5, 6, 8"):
        QuantConfig(**kwargs)


@pytest.mark.parametrize("group", [0, 16, 256, 32.0, None])
def test_a_wrong_group_size_is_named(group: Any) -> None:
    with pytest.raises(QuantError, match=r"group_size is .*; use one of 32, 64, 128"):
        QuantConfig(group_size=group)


def test_head_embedding_keys_and_values_are_int8_and_norms_stay_as_they_are() -> None:
    config = QuantConfig(4, 64)
    for name in ("lm_head", "model.embed_tokens", "model.layers.0.self_attn.k_proj", "model.layers.9.self_attn.v_proj"):
        chosen = config.for_module(name)
        assert chosen is not None
        assert (chosen.bits, chosen.group_size) == (8, 64)
    for name in ("score", "model.norm", "model.layers.0.post_self_attn_layernorm"):
        assert config.for_module(name) is None
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj"):
        assert config.for_module(name) == config


def test_config_json_gives_the_same_config_back() -> None:
    for config in (QuantConfig(), QuantConfig(8, 128), QuantConfig(exceptions=(("lm_head", None),))):
        assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_modules_have_codecs_of_their_own_by_their_whole_names() -> None:
    codecs = {
        "model.layers.0.mlp.down_proj": Codec(3, 64),
        "model.layers.1.mlp.down_proj": Codec(4, 128),
        "model.layers.2.mlp.down_proj": Codec(4, 128),
        "model.layers.1.self_attn.k_proj": Codec(4, 128),
        "lm_head": Codec(8, 32),
    }
    config = QuantConfig().with_codecs(codecs)
    assert config.codec == Codec(4, 128)
    assert config.mixed
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for name, codec in codecs.items():
        own = config.for_module(name)
        assert own is not None
        assert own.codec == codec
        assert own.method == ("absmax" if codec.bits == 8 else "calibrated")
    assert config.for_module("model.norm") is None
    other = config.for_module("model.layers.7.self_attn.k_proj")
    assert other is not None
    assert other.bits == 8  # as before
    assert not QuantConfig().with_codecs({"a": Codec(4, 32), "b": Codec(4, 32)}).mixed


def test_a_pattern_is_a_name_or_has_wildcards() -> None:
    config = QuantConfig(exceptions=(("model.layers.*.mlp.*", Codec(3, 64)), ("o_proj", 6), ("model.layers.1", 2)))
    for name, bits in (("model.layers.3.mlp.down_proj", 3), ("x.o_proj", 6), ("model.layers.1.q_proj", 4)):
        own = config.for_module(name)
        assert own is not None
        assert own.bits == bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"bits": 7}, "bits is 7"),
        ({"group_size": "32"}, "group_size is '32'"),
        ({"format": 2}, "format is 2"),
        ({"exceptions": ["lm_head"]}, "exceptions is"),
        ({"exceptions": {"lm_head": 16}}, r"exceptions\['lm_head'\] is 16"),
        ({"exceptions": {"x": {"bits": 3}}}, r"exceptions\['x'\] is .*; expected bits and group_size"),
        ({"exceptions": {"x": {"bits": 3, "group_size": 16}}}, r"group_size is 16; .* \(in exceptions\['x'\]\)"),
        ({"surprise": 1}, "surprise is not known"),
    ],
)
def test_a_wrong_quantization_config_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantError, match=message):
        QuantConfig.from_dict({**QuantConfig().to_dict(), **change})


def test_a_missing_key_is_named() -> None:
    for key in ("bits", "group_size", "format", "exceptions"):
        d = QuantConfig().to_dict()
        del d[key]
        with pytest.raises(QuantError, match=f"{key} is missing"):
            QuantConfig.from_dict(d)


def test_an_exception_may_name_a_whole_module() -> None:
    config = QuantConfig(exceptions=(("*layers.1.mlp.down_proj", 8), ("k_proj", 4)))
    assert config.for_module("model.layers.1.mlp.down_proj").bits == 8  # type: ignore[union-attr]
    assert config.for_module("model.layers.11.mlp.down_proj").bits == 4  # type: ignore[union-attr]
    assert QuantConfig.from_dict(config.to_dict()) == config
