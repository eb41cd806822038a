"""GenerationConfig: what `generate` is asked for, under Transformers' names; what it cannot do is refused by name."""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from glm4lite.base.errors import ConfigError, unknown_name
from glm4lite.base.files import read_json
from glm4lite.base.whole_file import write_whole

logger = logging.getLogger("glm4lite")

FILE = "generation_config.json"
IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
DEFAULT_NEW_TOKENS, DEFAULT_TOP_K = 20, 50
"""Where neither the call nor the checkpoint says: Transformers' own."""

# Transformers' settings that `generate` does not have, with the values that ask for nothing (None always does).
_OFF: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "early_stopping": (False, True, "never"),  # read by beam search alone, as the next two
    "length_penalty": (0.0, 1.0),
    "diversity_penalty": (0.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "force_words_ids": (),
    "constraints": (),
    "forced_bos_token_id": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "token_healing": (False,),
    "guidance_scale": (1, 1.0),
    "watermarking_config": (),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "low_memory": (False,),
    "use_mtp": (False,),
    "cache_implementation": ("dynamic",),
    "cache_config": (),
    "max_cache_len": (),
    "decoder_start_token_id": (),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "is_assistant": (False,),
    "compile_config": (),
    "continuous_batching_config": (),
    "speculation_type": (),
}
# Of those, what a processor of Transformers' does, which `generate` takes as it is.
_PROCESSORS: Mapping[str, str] = {
    "epsilon_cutoff": "EpsilonLogitsWarper",
    "eta_cutoff": "EtaLogitsWarper",
    "top_h": "TopHLogitsWarper",
    "bad_words_ids": "NoBadWordsLogitsProcessor",
    "forced_bos_token_id": "ForcedBOSTokenLogitsProcessor",
    "remove_invalid_values": "InfNanRemoveLogitsProcessor",
    "exponential_decay_length_penalty": "ExponentialDecayLengthPenalty",
    "guidance_scale": "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "watermarking_config": "WatermarkLogitsProcessor",
}
# Settings that change nothing here: how drafts are made without a draft model, metadata, compilation.
_WITHOUT_EFFECT = frozenset(
    {
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "max_matching_ngram_size",
        "disable_compile",
        "transformers_version",
        "_from_model_config",
        "_commit_hash",
        "_name_or_path",
        "_attn_implementation",
    }
)

Count = Annotated[int, Field(ge=0, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class GenerationConfig(BaseModel):
    """How `generate` continues a text. None: not said, so the model's own generation_config decides.

    Lengths are in tokens. max_length and min_length count the prompt, max_new_tokens and min_new_tokens do not and win
    over them; max_time is in seconds. do_sample draws with temperature, then top_k, top_p, min_p and typical_p leave
    ids out; without it the likeliest id is taken. Source: Transformers' GenerationConfig.

    Raises ConfigError for a value out of range, and for a setting that `generate` does not have (`num_beams`).
    """

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, allow_inf_nan=False)

    max_length: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_length: Count | None = None
    min_new_tokens: Count | None = None
    max_time: Annotated[float, Field(gt=0)] | None = None
    stop_strings: list[Annotated[str, Field(min_length=1)]] | None = None
    do_sample: bool | None = None
    use_cache: bool | None = None
    prefill_chunk_size: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    top_k: Count | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    no_repeat_ngram_size: Count | None = None
    sequence_bias: list[tuple[Annotated[list[TokenId], Field(min_length=1)], float]] | None = None
    suppress_tokens: list[TokenId] | None = None
    begin_suppress_tokens: list[TokenId] | None = None
    forced_eos_token_id: list[TokenId] | None = None
    renormalize_logits: bool | None = None
    num_return_sequences: Annotated[int, Field(ge=1, le=4096)] | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    return_dict_in_generate: bool | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: list[int] | None = None

    def __init__(self, **values: Any) -> None:
        values = {name: value for name, value in values.items() if not _says_nothing(name, value)}
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_problem(error)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).model_fields and not name.startswith("_"):
            if _says_nothing(name, value):
                return
            raise ConfigError(unknown(name, type(self).model_fields))
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise ConfigError(_problem(error)) from None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """None for a setting of Transformers' that asks for nothing here, for scripts that look at it."""
            return None if name in _OFF else super().__getattr__(name)

    @field_validator("*", mode="before")
    @classmethod
    def _as_number(cls, value: Any) -> Any:
        """A number of numpy's or torch's as Python's."""
        return value.item() if getattr(value, "shape", None) == () else value

    @field_validator("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        """One id, several, or a tensor of them."""
        if isinstance(value, Tensor):
            value = value.tolist()
        return [value] if isinstance(value, int) else list(value) if isinstance(value, tuple | set) else value

    @field_validator("pad_token_id", "bos_token_id", mode="before")
    @classmethod
    def _as_id(cls, value: Any) -> Any:
        return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value

    @field_validator("sequence_bias", mode="before")
    @classmethod
    def _as_pairs(cls, value: Any) -> Any:
        """`{(5,): 1.0}` or, as JSON has it, `[[[5], 1.0]]`."""
        pairs = value.items() if isinstance(value, Mapping) else value
        if not isinstance(pairs, list | tuple) and not isinstance(value, Mapping):
            return value
        return [(list(pair[0]), pair[1]) if _is_pair(pair) else pair for pair in pairs]

    @field_validator("stop_strings", mode="before")
    @classmethod
    def _as_texts(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else list(value) if isinstance(value, tuple | set) else value

    @classmethod
    def of(cls, value: GenerationConfig | Mapping[str, Any] | Any) -> GenerationConfig:
        """Ours, a mapping of settings, or Transformers' object of the same name."""
        if isinstance(value, GenerationConfig):
            return value
        values = value.to_dict() if hasattr(value, "to_dict") else value
        if not isinstance(values, Mapping):
            raise ConfigError(f"generation_config must be a GenerationConfig or a dict, found {reprlib.repr(value)}")
        return cls(**values)

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], origin: str = FILE) -> Self:
        """The contents of a generation_config.json; keys nobody knows are passed over, with a warning.

        Raises ConfigError naming the `origin`.
        """
        strange = [name for name in values if not is_setting(name)]
        if strange:
            logger.warning("%s: %s: not known, passed over", origin, ", ".join(strange[:5]))
        try:
            return cls(**{name: value for name, value in values.items() if name not in strange})
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> Self:
        """Reads a folder's generation_config.json, with `changes`. ConfigError names what is wrong."""
        file = Path(folder) / FILE
        return cls.from_stored(read_json(file), str(file)).with_changes(**changes)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **changes: Any) -> Self:
        """What `to_dict` gave, with `changes`. Raises ConfigError."""
        return cls(**{**config_dict, **changes})

    @classmethod
    def from_model_config(cls, model_config: Any) -> Self:
        """The ids that a Glm4Config, ours or Transformers', names."""
        return cls(**{name: getattr(model_config, name, None) for name in IDS})

    def update(self, **values: Any) -> dict[str, Any]:
        """Sets settings; returns those that are none. Raises ConfigError for a value that cannot be used."""
        for name, value in values.items():
            if is_setting(name):
                setattr(self, name, value)
        return {name: value for name, value in values.items() if not is_setting(name)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes generation_config.json into a folder, which is made where it is missing. Raises ConfigError."""
        path = Path(folder, FILE)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, f"{json.dumps(self.to_dict(), indent=2)}\n".encode())
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None

    def to_dict(self) -> dict[str, Any]:
        """What is said; a single eos_token_id as a number."""
        values = {name: value for name, value in self.model_dump().items() if value is not None}
        eos = values.get("eos_token_id")
        return values | ({"eos_token_id": eos[0]} if eos is not None and len(eos) == 1 else {})

    to_diff_dict = to_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        """What is said, as JSON with sorted keys; use_diff=False: what is not said too, as null."""
        return json.dumps(self.to_dict() if use_diff else self.model_dump(), indent=2, sort_keys=True) + "\n"

    def over(self, other: GenerationConfig) -> GenerationConfig:
        """These settings; where one is None, the other's."""
        return self.model_copy(update={k: v for k, v in other.model_dump().items() if getattr(self, k) is None})

    def with_changes(self, **values: Any) -> Self:
        """Settings that are given win, None too: `eos_token_id=None` ends no text. Raises ConfigError."""
        return type(self)(**{**self.model_dump(), **values})


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], list | tuple)


def _says_nothing(name: str, value: Any) -> bool:
    """Whether a setting asks for nothing that `generate` does not do anyway; ConfigError where it cannot do it."""
    if name in _WITHOUT_EFFECT or (value is None and (name in _OFF or name in GenerationConfig.model_fields)):
        return True
    if name not in _OFF:
        return False
    if not isinstance(value, list | dict | Tensor) and value in _OFF[name]:
        return True
    instead = f"give Transformers' {_PROCESSORS[name]} in logits_processor" if name in _PROCESSORS else "leave it out"
    raise ConfigError(f"{name}={reprlib.repr(value)} is not supported by glm4lite's generate; {instead}")


def is_setting(name: str) -> bool:
    """Whether Transformers' GenerationConfig has it, whatever `generate` makes of it."""
    return name in GenerationConfig.model_fields or name in _OFF or name in _WITHOUT_EFFECT


def unknown(name: str, known: Iterable[str]) -> str:
    """The sentence about a setting that does not exist."""
    return unknown_name("generate", name, [*known, *_OFF])


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "value"
    if first["type"] == "extra_forbidden":
        return unknown(name, GenerationConfig.model_fields)
    if name == "temperature":
        return f"temperature must be a number above 0, found {reprlib.repr(first['input'])}; do_sample=False is greedy"
    return f"{name}: {first['msg']}, found {reprlib.repr(first['input'])}"
