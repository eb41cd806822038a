"""What to quantize to: bits, group size and the modules that are treated differently. The form config.json holds.

A module that is treated differently has other bits, or a codec of its own:
`"exceptions": {"lm_head": 8, "*norm*": null, "model.layers.0.mlp.down_proj": {"bits": 3, "group_size": 64}}`.
The first that matches holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

QUANT_METHOD = "glm4lite"
FORMAT = 1
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

# How the scales of groups are found below 8 bits: by what calibration tells about the inputs, by the weights alone, not
# at all (the whole range), or by another tool, whose codes were kept. int8 takes the largest magnitude always.
CALIBRATED, SEARCH, MINMAX, ABSMAX, KEPT = "calibrated", "search", "minmax", "absmax", "kept"
METHODS = (CALIBRATED, SEARCH, MINMAX)

# Pattern of a module's last name part, or of all of its name -> its bits; None stays unquantized. The head is read on
# every token but decides the answer, k and v are 2 % of the bytes, `score` and the norms are tiny: none of them is
# worth four bits.
EXCEPTIONS: tuple[tuple[str, int | None], ...] = (
    ("lm_head", 8),
    ("embed_tokens", 8),
    ("k_proj", 8),
    ("v_proj", 8),
    ("score", None),
    ("*norm*", None),
)

# Modules whose inputs the kernels take as two int8 parts (15 bits) instead of one: what comes straight from a norm has
# the widest outliers. On a real model int8 inputs everywhere add 6 % to the divergence of int4 weights, 3.3 % of it by
# q, k and v and 2.1 % by the head, which are a tenth of a 9B's work on a prompt and cost nothing at one token.
TWO_PART_INPUTS = ("q_proj", "k_proj", "v_proj", "lm_head")


def activation_splits(module: str) -> int:
    """In how many int8 parts the input of a quantized linear is multiplied, by the module's dotted name."""
    return 2 if module.rsplit(".", 1)[-1] in TWO_PART_INPUTS else 1


_WILD = re.compile(r"[*?[]")  # a mixed model names hundreds of modules, and fnmatch would compile each name anew


class QuantError(ValueError):
    """A weight, a setting or an input that the quantized layers cannot use; the message says which and what to do."""


@dataclass(frozen=True, order=True)
class Codec:
    """How a weight is stored: the bits of a code, and how many columns of a row share a scale."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        _check_choice("bits", self.bits, BITS)
        _check_choice("group_size", self.group_size, GROUP_SIZES)

    def __str__(self) -> str:
        return f"int{self.bits}, groups of {self.group_size}"


@dataclass(frozen=True)
class Calibration:
    """What a quantized model was calibrated with: how many tokens of which text ("sha256:…"), or why of none."""

    tokens: int
    source: str

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise QuantError(f"quantization calibration.tokens is {self.tokens!r}; expected a whole number above 0")
        if not isinstance(self.source, str):
            raise QuantError(f"quantization calibration.source is {self.source!r}; expected a text")

    @classmethod
    def from_dict(cls, d: Any) -> Calibration:
        """As config.json holds it; raises QuantError for anything else."""
        if not isinstance(d, Mapping) or set(d) != {"tokens", "source"}:
            raise QuantError(f"quantization_config.calibration is {d!r}; expected an object of tokens and source")
        return cls(d["tokens"], d["source"])


@dataclass(frozen=True)
class QuantConfig:
    """Bits per code, how many input columns share one scale, and how the scales are found.

    exceptions: (pattern of a module's last name or of all of its name, what it has instead), the first that matches
    holds: other bits, a whole Codec, or None for what stays unquantized.

    method: "calibrated" (below 8 bits unless given), "search", "minmax"; int8 is always "absmax", and "kept" is what
    another tool's codes are. calibration: what a calibrated model was made with.

    >>> QuantConfig.parse("int4").for_module("model.layers.0.self_attn.k_proj").bits
    8
    """

    bits: int = 4
    group_size: int = 32
    exceptions: tuple[tuple[str, int | Codec | None], ...] = EXCEPTIONS
    method: str = CALIBRATED
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        _check_choice("bits", self.bits, BITS)
        _check_choice("group_size", self.group_size, GROUP_SIZES)
        for pattern, own in self.exceptions:
            if own is not None and not isinstance(own, Codec):
                _check_choice(f"exceptions[{pattern!r}]", own, BITS)
        if self.method not in (*METHODS, ABSMAX, KEPT):
            raise QuantError(f"quantization method is {self.method!r}; use one of {', '.join(METHODS)}")
        if self.bits == 8:
            object.__setattr__(self, "method", ABSMAX)
        elif self.method == ABSMAX:
            raise QuantError(f"quantization method {ABSMAX!r} is int8's; use one of {', '.join(METHODS)}")

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
        for pattern, own in self.exceptions:
            if _matches(pattern, leaf) or _matches(pattern, name):
                codec = Codec(own, self.group_size) if isinstance(own, int) else own
                return None if codec is None else self._with(codec)
        return self

    def _with(self, codec: Codec) -> QuantConfig:
        return replace(self, bits=codec.bits, group_size=codec.group_size, method=self._method_for(codec.bits))

    @property
    def codec(self) -> Codec:
        """Of the modules that are no exceptions."""
        return Codec(self.bits, self.group_size)

    @property
    def mixed(self) -> bool:
        """Whether modules have codecs of their own."""
        return any(isinstance(own, Codec) for _, own in self.exceptions)

    def with_codecs(self, codecs: Mapping[str, Codec]) -> QuantConfig:
        """The same with a codec for each of these modules, by their whole names; others are treated as they were.

        What most of them have becomes that of all that are no exceptions.
        """
        if not codecs:
            return self
        base = self._with(max(sorted(set(codecs.values())), key=list(codecs.values()).count))
        own = {name: codec for name, codec in codecs.items() if not base._is_stored_as(name, codec)}
        return replace(base, exceptions=(*own.items(), *(one for one in self.exceptions if one[0] not in own)))

    def _is_stored_as(self, name: str, codec: Codec) -> bool:
        found = self.for_module(name)
        return found is not None and found.codec == codec

    def _method_for(self, bits: int) -> str:
        return CALIBRATED if self.method == ABSMAX and bits < 8 else self.method

    def same_format(self, other: QuantConfig) -> bool:
        """True where weights of both are stored alike, however their scales were found."""
        own, theirs = ((c.bits, c.group_size, c.exceptions) for c in (self, other))
        return own == theirs

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        made = {"calibration": asdict(self.calibration)} if self.calibration else {}
        return made | {
            "quant_method": QUANT_METHOD,
            "bits": self.bits,
            "group_size": self.group_size,
            "format": FORMAT,
            "exceptions": {name: asdict(own) if isinstance(own, Codec) else own for name, own in self.exceptions},
            "method": self.method,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> QuantConfig:
        """Reads what `to_dict` wrote; QuantError names the key that is missing, unknown or wrong."""
        if not isinstance(d, Mapping):
            raise QuantError(f"quantization_config is {d!r}; expected an object")
        known = {"quant_method", "bits", "group_size", "format", "exceptions"}
        added = {"method", "calibration"}  # since version 0.2: folders without them were searched
        method = d.get("quant_method")
        if method != QUANT_METHOD:
            raise QuantError(f"quantization_config.quant_method is {method!r}; only {QUANT_METHOD!r} can be read")
        for key in sorted(known - d.keys()):
            raise QuantError(f"quantization_config.{key} is missing")
        for key in sorted(d.keys() - known - added):
            raise QuantError(f"quantization_config.{key} is not known; it may need a newer version")
        if d["format"] != FORMAT or isinstance(d["format"], bool):
            raise QuantError(f"quantization_config.format is {d['format']!r}; this version reads {FORMAT}")
        searched = ABSMAX if d["bits"] == 8 else SEARCH
        calibration = Calibration.from_dict(d["calibration"]) if "calibration" in d else None
        exceptions = _read_exceptions(d["exceptions"])
        return cls(d["bits"], d["group_size"], exceptions, d.get("method", searched), calibration)


def _matches(pattern: str, name: str) -> bool:
    return pattern == name or (_WILD.search(pattern) is not None and fnmatchcase(name, pattern))


def _read_exceptions(value: Any) -> tuple[tuple[str, int | Codec | None], ...]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise QuantError(f"quantization_config.exceptions is {value!r}; expected an object of name: bits")
    return tuple((name, _read_codec(name, own)) for name, own in value.items())


def _read_codec(name: str, own: Any) -> Any:
    """A codec where an exception is one; what else it is is checked with the others."""
    if not isinstance(own, Mapping):
        return own
    if set(own) != {"bits", "group_size"}:
        raise QuantError(f"quantization exceptions[{name!r}] is {own!r}; expected bits and group_size")
    try:
        return Codec(own["bits"], own["group_size"])
    except QuantError as error:
        raise QuantError(f"{error} (in exceptions[{name!r}])") from None


def _check_choice(key: str, value: Any, choices: tuple[int, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value not in choices:
        raise QuantError(f"quantization {key} is {value!r}; use one of {', '.join(map(str, choices))}")
