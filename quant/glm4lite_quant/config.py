"""What to quantize to: bits, group size and the modules that are treated differently. The form config.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

QUANT_METHOD = "glm4lite"
FORMAT = 1
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)

# Pattern of a module's last name part -> its bits; None stays unquantized. The head is read on every token but decides
# the answer, k and v are 2 % of the bytes, `score` and the norms are tiny: none of them is worth four bits.
EXCEPTIONS: tuple[tuple[str, int | None], ...] = (
    ("lm_head", 8),
    ("embed_tokens", 8),
    ("k_proj", 8),
    ("v_proj", 8),
    ("score", None),
    ("*norm*", None),
)


class QuantError(ValueError):
    """A weight, a setting or an input that the quantized layers cannot use; the message says which and what to do."""


@dataclass(frozen=True)
class QuantConfig:
    """Bits per code and how many input columns share one scale.

    >>> QuantConfig.parse("int4").for_module("model.layers.0.self_attn.k_proj").bits
    8
    """

    bits: int = 4
    group_size: int = 32
    exceptions: tuple[tuple[str, int | None], ...] = EXCEPTIONS

    def __post_init__(self) -> None:
        _check_choice("bits", self.bits, BITS)
        _check_choice("group_size", self.group_size, GROUP_SIZES)
        for pattern, bits in self.exceptions:
            if bits is not None:
                _check_choice(f"exceptions[{pattern!r}]", bits, BITS)

    @classmethod
    def parse(cls, value: str | QuantConfig | None) -> QuantConfig | None:
        """`"int4"`, `"int8"`, `"none"`, None or a config; QuantError on anything else."""
        if value is None or isinstance(value, QuantConfig):
            return value
        known = {"int4": cls(bits=4), "int8": cls(bits=8), "none": None}
        if not isinstance(value, str) or value not in known:
            raise QuantError(f"quant is {value!r}; use int4, int8 or none")
        return known[value]

    def for_module(self, name: str) -> QuantConfig | None:
        """The config of one module by its dotted name (None: leave it unquantized)."""
        leaf = name.rsplit(".", 1)[-1]
        for pattern, bits in self.exceptions:
            if fnmatchcase(leaf, pattern):
                return None if bits is None else QuantConfig(bits, self.group_size, self.exceptions)
        return self

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "bits": self.bits,
            "group_size": self.group_size,
            "format": FORMAT,
            "exceptions": dict(self.exceptions),
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> QuantConfig:
        """Reads what `to_dict` wrote; QuantError names the key that is missing, unknown or wrong."""
        if not isinstance(d, Mapping):
            raise QuantError(f"quantization_config is {d!r}; expected an object")
        known = {"quant_method", "bits", "group_size", "format", "exceptions"}
        method = d.get("quant_method")
        if method != QUANT_METHOD:
            raise QuantError(f"quantization_config.quant_method is {method!r}; only {QUANT_METHOD!r} can be read")
        for key in sorted(known - d.keys()):
            raise QuantError(f"quantization_config.{key} is missing")
        for key in sorted(d.keys() - known):
            raise QuantError(f"quantization_config.{key} is not known; it may need a newer version")
        if d["format"] != FORMAT or isinstance(d["format"], bool):
            raise QuantError(f"quantization_config.format is {d['format']!r}; this version reads {FORMAT}")
        return cls(d["bits"], d["group_size"], _read_exceptions(d["exceptions"]))


def _read_exceptions(value: Any) -> tuple[tuple[str, int | None], ...]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise QuantError(f"quantization_config.exceptions is {value!r}; expected an object of name: bits")
    return tuple(value.items())


def _check_choice(key: str, value: Any, choices: tuple[int, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value not in choices:
        raise QuantError(f"quantization {key} is {value!r}; use one of {', '.join(map(str, choices))}")
