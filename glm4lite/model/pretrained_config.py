"""PretrainedConfig: what Transformers gives every config class, for ours: files, JSON, labels, changes."""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, overload

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, model_validator

from glm4lite.base.errors import ConfigError, one_line
from glm4lite.base.files import CONFIG, check_values, read_json
from glm4lite.base.whole_file import write_whole

logger = logging.getLogger("glm4lite")

_MOST_LABELS = 1 << 16
_DTYPES = ("dtype", "torch_dtype")
_TRUE, _FALSE = ("true", "1", "y", "yes"), ("false", "0", "n", "no")


class PretrainedConfig(BaseModel):
    """Values that are checked whenever they are set. ConfigError names the key and what was found.

    `id2label` says how many labels there are; `num_labels` and `label2id` follow it. `dtype` is a torch.dtype, in JSON
    its name. Keys that are not known are kept and written back.
    """

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        validate_assignment=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
    )

    OMITTED: ClassVar[Mapping[str, Any]] = {
        "output_hidden_states": False,
        "output_attentions": False,
        "return_dict": True,
        "id2label": {0: "LABEL_0", 1: "LABEL_1"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    }
    """Values that all libraries take where config.json does not say."""

    OLDER_NAMES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "dtype": ("torch_dtype",),
        "torch_dtype": ("dtype",),
        "id2label": ("num_labels", "label2id"),
        "num_labels": ("id2label", "label2id"),
    }
    """Keys of which several say one thing, each with the others."""

    is_encoder_decoder: ClassVar[bool] = False
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]  # tells Trainer what is no prediction

    architectures: list[str] | None = None
    dtype: torch.dtype | None = None
    id2label: dict[int, str] = Field(default_factory=dict, max_length=_MOST_LABELS)
    label2id: dict[str, int] = Field(default_factory=dict)
    problem_type: str | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    name_or_path: str = Field(default="", exclude=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None

    if TYPE_CHECKING:  # pydantic has it, and hides it from type checkers

        def __getattr__(self, name: str) -> Any:
            """Keys that are no field of the class, as a checkpoint's config.json may have them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "dtype":
            value = named_dtype(value)
        elif name == "id2label":
            value = _labels(value, None)
        before = dict(self.__dict__)
        try:
            super().__setattr__(name, value)
        except (ConfigError, ValidationError) as error:
            self.__dict__.update(before)  # what is refused as a whole is set already
            raise error if isinstance(error, ConfigError) else ConfigError(_one_line(error)) from None
        if name == "id2label":
            self.label2id = {label: number for number, label in value.items()}

    @model_validator(mode="before")
    @classmethod
    def _fold_shared_keys(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = dict(values)
        try:
            for key, value in values.items():
                check_values(key, value)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        torch_dtype = values.pop("torch_dtype", None)
        values["dtype"] = named_dtype(values.get("dtype") or torch_dtype)
        values.pop("transformers_version", None)  # of whoever wrote the file
        count, by_name = values.pop("num_labels", None), values.get("label2id")
        given = values.get("id2label")
        if given is None and isinstance(by_name, dict) and by_name:
            given = {number: label for label, number in by_name.items()}
        values["id2label"] = labels = _labels(given, count)
        if not by_name:
            values["label2id"] = {label: number for number, label in labels.items()}
        return cls._folded(values)

    @classmethod
    def _folded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Older names of a class's own fields in the newer ones; called before any value is checked."""
        return values

    @field_serializer("dtype")
    def _dtype_name(self, dtype: torch.dtype | None) -> str | None:
        return None if dtype is None else str(dtype).removeprefix("torch.")

    @property
    def num_labels(self) -> int:
        """Classes of a classification head; setting another number makes new labels, LABEL_0 and so on."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if count != self.num_labels:
            self.id2label = _labels(None, count)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The older name of `dtype`."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, dtype: torch.dtype | str | None) -> None:
        self.dtype = named_dtype(dtype)

    @property
    def use_return_dict(self) -> bool:
        """The older name of `return_dict`."""
        return self.return_dict

    @property
    def per_layer_config(self) -> list[Self]:
        """The config of each layer, which all share: what Transformers' caches ask, `DynamicCache(config=config)`."""
        return [self] * int(getattr(self, "num_hidden_layers", 0))

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Self:
        """The config itself: GLM-4 is a text model."""
        return self

    @overload
    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, return_unused_kwargs: Literal[False] = False, **changes: Any
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, return_unused_kwargs: Literal[True], **changes: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, return_unused_kwargs: bool = False, **changes: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Reads config.json of a folder, "nano" or a Hub repo (its config.json alone is downloaded), or that very file;
        of a GGUF file, and a repo of nothing else, what its metadata says.

        changes: values for keys of the config, as attributes are set, and what says which file of a repo is meant
        (`revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`, `force_download`). Other keys come back with
        return_unused_kwargs, else they are refused.

        Raises:
            ConfigError: naming the file and the key.
            HubError: there is no such folder or repo, or it cannot be reached.
            CheckpointError: a GGUF file is damaged, or of another model.
        """
        file = _config_file(source, changes)
        values = read_json(file, ConfigError)
        changes = {key: value for key, value in changes.items() if key not in _DTYPES or value != "auto"}
        unused = {key: value for key, value in changes.items() if not cls.knows(key) and key not in values}
        if unused and not return_unused_kwargs:
            raise ConfigError(f"{cls.__name__} knows no {next(iter(unused))!r}; leave it out")
        config = cls.from_dict(values, file, **{key: changes[key] for key in changes.keys() - unused.keys()})
        config.name_or_path = str(source)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def knows(cls, key: str) -> bool:
        """Whether a key means something to this class, under its newest name or an older one."""
        return key in cls.model_fields or key in cls.OLDER_NAMES

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str | Path = CONFIG, **changes: Any) -> Self:
        """Reads the contents of a config.json, with `changes` in place of what it says.

        source: named in errors.

        Raises:
            ConfigError: the key and what was found.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: expected a JSON object, found {type(values).__name__}")
        try:
            return cls(**cls._changed(cls._translated(dict(values)), changes))
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def _changed(cls, values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        """A change also takes away what it makes untrue: another number of labels the names of the old ones."""
        for key in cls.OLDER_NAMES.keys() & changes.keys():
            if key == "num_labels" and len(values.get("id2label") or ()) == changes[key]:
                continue
            for older in cls.OLDER_NAMES[key]:
                values.pop(older, None)
        return values | changes

    @classmethod
    def _translated(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What a file says, in the names of the fields; a class may refuse it with ConfigError."""
        return values

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        """Reads one file. Raises ConfigError."""
        return cls.from_dict(read_json(Path(json_file), ConfigError), json_file)

    def to_dict(self) -> dict[str, Any]:
        """All values, those that nobody set too, ready for JSON; `from_dict` gives the same config back."""
        return self.model_dump()

    def to_diff_dict(self) -> dict[str, Any]:
        """What a config.json holds: the values without those that say nothing or what every library takes anyway."""
        values = self.to_dict()
        absent = {key for key, value in values.items() if value is None and not self._null_is_said(key)}
        usual = {key for key, value in self.OMITTED.items() if values[key] == value}
        return {key: value for key, value in values.items() if key not in absent | usual}

    @classmethod
    def _null_is_said(cls, key: str) -> bool:
        """Whether null means another thing than leaving the key out."""
        field = cls.model_fields.get(key)
        return field is not None and field.get_default(call_default_factory=True) is not None

    def to_json_string(self, use_diff: bool = True) -> str:
        """JSON of `to_diff_dict`, or of `to_dict`, with sorted keys."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Writes `to_json_string` to a file, which is there whole or not at all. Raises ConfigError."""
        path = Path(json_file_path)
        try:
            write_whole(path, self.to_json_string(use_diff).encode())
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror or one_line(error)}") from None

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False) -> None:
        """Writes config.json into a folder, which is made where it is missing. Raises ConfigError."""
        if push_to_hub:
            raise ConfigError("push_to_hub is not supported; save, then use `hf upload` of huggingface-hub")
        folder = Path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be made: {one_line(error)}") from None
        self.to_json_file(folder / CONFIG)

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Sets attributes. Raises ConfigError at the first value that cannot be used."""
        for key, value in config_dict.items():
            setattr(self, key, value)

    def update_from_string(self, update_str: str) -> None:
        """Sets "key=value,key=value": numbers and texts as they are, truth values as true or false."""
        for pair in update_str.split(","):
            key, separator, text = pair.partition("=")
            if not separator or not hasattr(self, key):
                raise ConfigError(f"{type(self).__name__} knows no {key!r}")
            setattr(self, key, _parsed(key, text, getattr(self, key)))


def named_dtype(dtype: Any) -> torch.dtype | None:
    """A torch.dtype from itself, or from "bfloat16" or "torch.bfloat16"; ConfigError for anything else."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else None
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype must be the name of a torch.dtype such as 'bfloat16', found {reprlib.repr(dtype)}")
    return found


def _labels(given: Any, count: Any) -> dict[int, str]:
    """id2label, whose keys are texts in JSON; made up where only a number (2, where not even that) is given."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= _MOST_LABELS):
        raise ConfigError(f"num_labels: a whole number from 1 to {_MOST_LABELS} is needed, found {reprlib.repr(count)}")
    if given is None or given == {}:
        return {number: f"LABEL_{number}" for number in range(2 if count is None else count)}
    if not isinstance(given, dict):
        raise ConfigError(f"id2label must be an object, found {reprlib.repr(given)}")
    try:
        labels = {int(number): label for number, label in given.items()}
    except (TypeError, ValueError):
        raise ConfigError(f"id2label: keys are numbers of labels, found {reprlib.repr(list(given))}") from None
    if count is not None and count != len(labels):
        logger.warning("num_labels %d is not used: id2label names %d labels", count, len(labels))
    return labels


def _parsed(key: str, text: str, now: Any) -> Any:
    """A text as a value of the type that the key has now."""
    try:
        if isinstance(now, bool):
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[text.lower()]
        if isinstance(now, int | float):
            return type(now)(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{key}: {text!r} is no {type(now).__name__}") from None
    if isinstance(now, str):
        return text
    raise ConfigError(f"{key} is neither a number, a text nor a truth value; set it as an attribute")


def _config_file(source: str | Path, changes: dict[str, Any]) -> Path:
    """Takes what names a file of the Hub out of `changes`."""
    from glm4lite.gguf.companions import folder_with
    from glm4lite.gguf.header import SUFFIX
    from glm4lite.hub.options import HubOptions
    from glm4lite.hub.sources import resolve_config

    options, given = HubOptions.taken_from(changes), Path(source)
    if given.is_file() and given.suffix != SUFFIX:
        return given
    return folder_with(CONFIG, resolve_config(source, options)) / CONFIG


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or not part.startswith("list["))
    return f"{where or 'value'}: {first['msg']}, found {reprlib.repr(first['input'])}"
