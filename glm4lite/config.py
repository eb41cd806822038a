"""Glm4Config: what config.json says about a GLM-4 model, in either dialect, checked before anything is built.

Field names and defaults are those of the Transformers documentation of Glm4Config and GlmConfig. The defaults are not
the values of the released checkpoints, so a config.json must name its own sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from glm4lite.errors import ConfigError

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


class Glm4Config(BaseModel):
    """Configuration of a `glm4` (four norms per layer) or `glm` (two norms per layer) model.

    `rope_parameters` holds `rope_type`, `rope_theta` and `partial_rotary_factor` (and YaRN's own keys); the older keys
    `rope_theta`, `rope_scaling` and `partial_rotary_factor` are folded into it, as Transformers does.
    Keys that are not known are kept and written back by `to_dict`. Raises ConfigError for a value that cannot be used.
    """

    model_config = ConfigDict(extra="allow", strict=True, validate_assignment=True, protected_namespaces=())

    model_type: str = "glm4"
    vocab_size: int = Field(default=151552, gt=0)
    hidden_size: int = Field(default=4096, gt=0)
    intermediate_size: int = Field(default=13696, gt=0)
    num_hidden_layers: int = Field(default=40, gt=0)
    num_attention_heads: int = Field(default=32, gt=0)
    num_key_value_heads: int = Field(default=2, gt=0)
    head_dim: int = Field(default=128, gt=0)
    hidden_act: str = "silu"
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    max_position_embeddings: int = Field(default=131072, gt=0)
    initializer_range: float = 0.02
    rms_norm_eps: float = Field(default=0.00000015625, gt=0)
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = Field(default_factory=dict)
    pad_token_id: int | None = 151329
    eos_token_id: int | list[int] | None = Field(default_factory=lambda: [151329, 151336, 151338])
    bos_token_id: int | None = None
    attention_bias: bool = True
    dtype: str | None = None
    num_labels: int = Field(default=2, gt=0)
    problem_type: str | None = None
    classifier_dropout: float | None = None
    token_classification_bias: bool = True

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _fold_older_keys(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = dict(values)
        torch_dtype = values.pop("torch_dtype", None)
        values["dtype"] = str(values.get("dtype") or torch_dtype or "").removeprefix("torch.") or None
        labels = values.get("id2label")
        if isinstance(labels, dict) and "num_labels" not in values:
            values["num_labels"] = len(labels)
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
        if self.hidden_act not in ("silu", "swish"):
            raise ConfigError(f"hidden_act {self.hidden_act!r} is not supported; GLM-4 uses 'silu'")
        _check_rope(self.rope_parameters, self.head_dim)
        return self

    @property
    def rope_theta(self) -> float:
        return float(self.rope_parameters["rope_theta"])

    @property
    def partial_rotary_factor(self) -> float:
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
        if self.eos_token_id is None:
            return []
        return list(self.eos_token_id) if isinstance(self.eos_token_id, list) else [self.eos_token_id]

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str | Path = "config.json") -> Glm4Config:
        """Reads the contents of a config.json; `source` is named in errors. Raises ConfigError."""
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: expected a JSON object, found {type(values).__name__}")
        values = _from_chatglm(values) if values.get("model_type") == "chatglm" else dict(values)
        if "model_type" not in values:
            raise ConfigError(f"{source}: the key 'model_type' is missing; it should be 'glm4' or 'glm'")
        if values["model_type"] in MODEL_TYPES:
            missing = [key for key in REQUIRED if key not in values]
            if missing:
                raise ConfigError(f"{source}: the key {missing[0]!r} is missing; download the file again")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json that Transformers reads too."""
        values = self.model_dump(exclude_none=True)
        values.setdefault("architectures", [{"glm4": "Glm4ForCausalLM", "glm": "GlmForCausalLM"}[self.model_type]])
        return values


def _rope_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """Both dialects as one dict; the newer `rope_parameters` wins over the older keys."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = values.get(key)
        if given is None:
            continue
        if not isinstance(given, dict):
            raise ConfigError(f"{key} must be an object, found {given!r}")
        rope.update(given)
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    rope.setdefault("rope_type", "default")
    for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 0.5)):
        older = values.get(key)
        rope.setdefault(key, default if older is None else older)
    if rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    return rope


def _check_rope(rope: dict[str, Any], head_dim: int) -> None:
    if rope["rope_type"] not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise ConfigError(f"rope_type {rope['rope_type']!r} is not supported; known: {known}")
    numbers = ["rope_theta", "partial_rotary_factor"]
    if rope["rope_type"] == "yarn":
        numbers += ["factor", "original_max_position_embeddings"]
    for key in numbers:
        value = rope.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"rope_parameters: {key} must be a number above 0, found {value!r}")
    rotary_dim = int(head_dim * rope["partial_rotary_factor"])
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ConfigError(
            f"partial_rotary_factor {rope['partial_rotary_factor']} of head_dim {head_dim} gives {rotary_dim} "
            f"rotated dimensions; an even number up to {head_dim} is needed"
        )


def _from_chatglm(values: dict[str, Any]) -> dict[str, Any]:
    """The remote-code config of glm-4-9b-chat in `glm` terms; rope_ratio multiplies the base of 10000."""
    renamed = {CHATGLM_NAMES.get(key, key): value for key, value in values.items()}
    if not renamed.get("multi_query_attention", True):
        renamed["num_key_value_heads"] = renamed.get("num_attention_heads", 0)
    ratio = renamed.pop("rope_ratio", 1)
    if not isinstance(ratio, (int, float)):
        raise ConfigError(f"rope_ratio must be a number, found {ratio!r}")
    sandwich = renamed.get("post_self_attn_layernorm", False)
    return {**renamed, "model_type": "glm4" if sandwich else "glm", "rope_theta": 10000.0 * ratio}


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or not part.startswith("list["))
    return f"{where or 'value'}: {first['msg']}, found {first['input']!r}"
