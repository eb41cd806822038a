"""Glm4Config: what config.json says about a GLM-4 model, in either dialect, checked before anything is built.

Field names and defaults are those of the Transformers documentation of Glm4Config and GlmConfig. The defaults are not
the values of the released checkpoints, so a config.json must name its own sizes.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from glm4lite.base.errors import ConfigError
from glm4lite.model.activations import ACTIVATIONS, WITH_WEIGHTS
from glm4lite.model.pretrained_config import PretrainedConfig

MODEL_TYPES = ("glm4", "glm")
ROPE_TYPES = ("default", "yarn")

# A config.json without one of these says nothing about the model it belongs to.
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# The remote-code dialect of glm-4-9b-chat (model_type "chatglm") -> Transformers' names.
CHATGLM_NAMES = {
    "padded_vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim",
    "multi_query_group_num": "num_key_value_heads",
    "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings",
    "add_qkv_bias": "attention_bias",
}


# What a rope number is at least; "above" where the bound itself does not work (theta 1 has no logarithm to divide by).
ROPE_BOUNDS: dict[str, tuple[str, float]] = {"rope_theta": ("above", 1), "partial_rotary_factor": ("above", 0)}
YARN_BOUNDS: dict[str, tuple[str, float]] = {
    "factor": ("of at least", 1),
    "original_max_position_embeddings": ("of at least", 1),
}
YARN_OPTIONAL_BOUNDS: dict[str, tuple[str, float]] = {
    "beta_fast": ("of at least", 0.001),
    "beta_slow": ("of at least", 0.001),
    "attention_factor": ("above", 0),
    "mscale": ("of at least", 0),
    "mscale_all_dim": ("of at least", 0),
}
LARGEST = 1e12
"""No rope number is larger: below it, none of the formulas overflows."""

SCALING_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "yarn": frozenset((*YARN_BOUNDS, *YARN_OPTIONAL_BOUNDS, "truncate")),
}
"""The keys of each rope type beside those that all have."""

LONGEST = 2**31 - 1
"""Tokens of a context, as positions are counted on a GPU."""

# Far above the largest GLM-4 (61 layers, 151552 wide), and small enough that every product of two is a tensor's size.
Size = Annotated[int, Field(gt=0, le=1 << 24)]
TokenId = Annotated[int, Field(gt=-(2**63), lt=2**63)]
Rate = Annotated[float, Field(ge=0, le=1)]


class Glm4Config(PretrainedConfig):
    """Configuration of a `glm4` (four norms per layer) or `glm` (two norms per layer) model.

    `rope_parameters` holds `rope_type`, `rope_theta` and `partial_rotary_factor` (and YaRN's own keys); the older keys
    `rope_theta`, `rope_scaling` and `partial_rotary_factor` are folded into it, as Transformers does: a `rope_scaling`
    that says something is taken instead of `rope_parameters`, of which the other two are kept.
    Keys that are not known are kept and written back by `to_dict`. Raises ConfigError for a value that cannot be used.
    """

    OLDER_NAMES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **PretrainedConfig.OLDER_NAMES,
        "rope_parameters": ("rope_scaling", "rope_theta", "partial_rotary_factor"),
        "rope_scaling": (),
        "rope_theta": (),
        "partial_rotary_factor": (),
    }

    model_type: str = "glm4"
    vocab_size: Size = 151552
    hidden_size: Size = 4096
    intermediate_size: Size = 13696
    num_hidden_layers: int = Field(default=40, gt=0, le=512)
    num_attention_heads: Size = 32
    num_key_value_heads: Size = 2
    head_dim: Size = 128
    hidden_act: str = "silu"
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    max_position_embeddings: int = Field(default=131072, gt=0, le=LONGEST)
    initializer_range: float = Field(default=0.02, ge=0)
    rms_norm_eps: float = Field(default=0.00000015625, gt=0)
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = Field(default_factory=dict)
    pad_token_id: TokenId | None = 151329
    eos_token_id: TokenId | list[TokenId] | None = Field(default_factory=lambda: [151329, 151336, 151338])
    bos_token_id: TokenId | None = None
    attention_bias: bool = True
    classifier_dropout: Rate | None = None
    hidden_dropout: Rate | None = None
    token_classification_bias: bool = True

    if TYPE_CHECKING:  # else a type checker makes one of the fields alone

        def __init__(self, **values: Any) -> None:
            """Also keys of older names, of other types (a dtype's name) and of no meaning here."""

    @classmethod
    def _folded(cls, values: dict[str, Any]) -> dict[str, Any]:
        for key, implied in (("num_key_value_heads", _query_heads), ("head_dim", _even_head_dim)):
            if key in values and values[key] is None:
                values[key] = implied(values)
        values["rope_parameters"] = _rope_parameters(values)
        for key in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
            values.pop(key, None)
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model_type not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise ConfigError(f"model_type {self.model_type!r} is not supported; glm4lite runs {known} (and chatglm)")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.hidden_act not in ACTIVATIONS:
            why = "has weights of its own, which GLM-4 has not" if self.hidden_act in WITH_WEIGHTS else "is not known"
            raise ConfigError(f"hidden_act {self.hidden_act!r} {why}; GLM-4 uses 'silu'")
        if self.num_attention_heads * self.head_dim > 1 << 24:
            raise ConfigError(f"num_attention_heads x head_dim is {self.num_attention_heads * self.head_dim}, too wide")
        _check_rope(self.rope_parameters, self.head_dim)
        return self

    @property
    def context_length(self) -> int:
        """The most tokens the model takes: YaRN's factor times the original length, or max_position_embeddings if more.

        The model card's YaRN is an added `rope_scaling`; max_position_embeddings stays that of the unscaled model.
        """
        if self.rope_parameters["rope_type"] != "yarn":
            return self.max_position_embeddings
        scaled = self.rope_parameters["factor"] * self.rope_parameters["original_max_position_embeddings"]
        return max(self.max_position_embeddings, min(round(scaled), LONGEST))

    @property
    def rope_scaling(self) -> dict[str, Any]:
        """The older name of `rope_parameters`; what is set here keeps its base and its share of rotated dimensions."""
        return self.rope_parameters

    @rope_scaling.setter
    def rope_scaling(self, scaling: dict[str, Any] | None) -> None:
        kept = {key: self.rope_parameters[key] for key in ROPE_BOUNDS}
        longest = self.max_position_embeddings
        self.rope_parameters = _rope_parameters(
            {"rope_parameters": kept, "rope_scaling": scaling, "max_position_embeddings": longest}
        )

    @property
    def rope_theta(self) -> float:
        """The base of the rotary frequencies."""
        return float(self.rope_parameters["rope_theta"])

    @property
    def partial_rotary_factor(self) -> float:
        """The share of each head's dimensions that is rotated (0.5 in GLM-4)."""
        return float(self.rope_parameters["partial_rotary_factor"])

    @property
    def rotary_dim(self) -> int:
        """How many of each head's dimensions are rotated (64 of 128 in GLM-4)."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def sandwich_norms(self) -> bool:
        """Whether attention and MLP outputs are normalized too: `glm4` has four norms per layer, `glm` has two."""
        return self.model_type == "glm4"

    @property
    def eos_token_ids(self) -> list[int]:
        """`eos_token_id` as a list, which it is in config.json where there are several; empty where there is none."""
        if self.eos_token_id is None:
            return []
        return list(self.eos_token_id) if isinstance(self.eos_token_id, list) else [self.eos_token_id]

    @classmethod
    def _translated(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("model_type") == "chatglm":
            values = _from_chatglm(values)
        if "model_type" not in values:
            raise ConfigError("the key 'model_type' is missing; it should be 'glm4' or 'glm'")
        if values["model_type"] in MODEL_TYPES:
            missing = [key for key in REQUIRED if key not in values]
            if missing:
                raise ConfigError(f"the key {missing[0]!r} is missing; download the file again")
        return values

    @classmethod
    def _changed(cls, values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        rope = {key: changes[key] for key in ROPE_BOUNDS if key in changes}
        for place in ("rope_parameters", "rope_scaling"):
            if rope and isinstance(values.get(place), dict):
                values[place] = values[place] | rope
        return super()._changed(values, changes)

    def to_diff_dict(self) -> dict[str, Any]:
        values = super().to_diff_dict()
        values.setdefault("architectures", [{"glm4": "Glm4ForCausalLM", "glm": "GlmForCausalLM"}[self.model_type]])
        return values


def _query_heads(values: Mapping[str, Any]) -> Any:
    """num_key_value_heads where it is null: each query head has its own."""
    return values.get("num_attention_heads", Glm4Config.model_fields["num_attention_heads"].default)


def _even_head_dim(values: Mapping[str, Any]) -> Any:
    """head_dim where it is null: the heads share the hidden size."""
    sizes = [values.get(key, Glm4Config.model_fields[key].default) for key in ("hidden_size", "num_attention_heads")]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or sizes[0] % sizes[1]:
        raise ConfigError(f"head_dim is null, and hidden_size {sizes[0]} is no multiple of {sizes[1]} heads")
    return sizes[0] // sizes[1]


def _rope_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """Both dialects as one dict. ConfigError where they say two things of which no reader could tell the meant one."""
    scaling, parameters = _rope_dict(values, "rope_scaling"), _rope_dict(values, "rope_parameters")
    rope = dict(scaling or parameters)
    rope["rope_type"] = _agreed("rope_type", [rope[key] for key in ("type", "rope_type") if key in rope], "default")
    rope.pop("type", None)
    for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 0.5)):
        if key not in scaling:
            rope[key] = _agreed(key, [place[key] for place in (parameters, values) if key in place], default)
    if rope["rope_type"] == "yarn":
        key = "original_max_position_embeddings"
        longest = values.get("max_position_embeddings")
        rope[key] = _agreed(key, [place[key] for place in (rope, values) if key in place], longest)
        if "factor" in rope and rope["factor"] is None:
            rope["factor"] = _implied_factor(longest, rope[key])
    return rope


def _rope_dict(values: dict[str, Any], key: str) -> dict[str, Any]:
    given = values.get(key)
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"{key} must be an object, found {_shown(given)}")
    return given or {}


def _agreed(key: str, said: list[Any], default: Any) -> Any:
    """What is said of a key in several places, the default where it is in none; null says nothing beside a value."""
    found = [value for value in said if value is not None]
    if any(value != found[0] for value in found):
        raise ConfigError(f"{key} is both {_shown(found[0])} and {_shown(found[1])}; remove the one that is not meant")
    if found:
        return found[0]
    return None if said else default


def _implied_factor(longest: Any, original: Any) -> float | None:
    """A null factor is how many times the original length max_position_embeddings is, as in Transformers."""
    numbers = all(isinstance(value, int | float) and value > 0 for value in (longest, original))
    return float(longest / original) if numbers else None


def _check_rope(rope: dict[str, Any], head_dim: int) -> None:
    kind = rope["rope_type"]
    if kind not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise ConfigError(f"rope_type {_shown(kind)} is not supported; known: {known}")
    allowed = {"rope_type", *ROPE_BOUNDS, *SCALING_KEYS[kind]}
    unknown = sorted(key for key, value in rope.items() if value is not None and key not in allowed)
    if unknown:
        what = f"{_shown(unknown[0])} is not known of rope_type {kind!r}"
        raise ConfigError(f"rope_parameters: {what}; remove it, or correct the type")
    bounds = dict(ROPE_BOUNDS)
    if kind == "yarn":
        optional = {key: bound for key, bound in YARN_OPTIONAL_BOUNDS.items() if rope.get(key) is not None}
        bounds |= YARN_BOUNDS | optional
        if not isinstance(rope.get("truncate", True), bool):
            raise ConfigError(f"rope_parameters: truncate must be true or false, found {_shown(rope['truncate'])}")
    for key, (relation, bound) in bounds.items():
        _check_number(f"rope_parameters: {key}", rope.get(key), relation, bound)
    rotary_dim = int(head_dim * rope["partial_rotary_factor"])
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ConfigError(
            f"partial_rotary_factor {rope['partial_rotary_factor']} of head_dim {head_dim} gives {rotary_dim} "
            f"rotated dimensions; an even number up to {head_dim} is needed"
        )


def _check_number(what: str, value: Any, relation: str, bound: float) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value > LARGEST:
            raise ConfigError(f"{what} must be at most {LARGEST:g}, found {_shown(value)}")
        if value > bound or (value == bound and relation != "above"):
            return
    raise ConfigError(f"{what} must be a number {relation} {bound}, found {_shown(value)}")


def _from_chatglm(values: dict[str, Any]) -> dict[str, Any]:
    """The remote-code config of glm-4-9b-chat in `glm` terms; rope_ratio multiplies the base of 10000."""
    renamed = {CHATGLM_NAMES.get(key, key): value for key, value in values.items()}
    if not renamed.get("multi_query_attention", True):
        renamed["num_key_value_heads"] = renamed.get("num_attention_heads", 0)
    ratio = renamed.pop("rope_ratio", 1)
    _check_number("rope_ratio", ratio, "above", 0)
    sandwich = renamed.get("post_self_attn_layernorm", False)
    return {**renamed, "model_type": "glm4" if sandwich else "glm", "rope_theta": 10000.0 * ratio}


def _shown(value: Any) -> str:
    """A value in a message, cut in the middle where it is long."""
    return reprlib.repr(value)
