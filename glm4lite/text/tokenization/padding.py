"""How long the rows of a batch become: cut, and filled with the pad token."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tokenizers

from glm4lite.base.errors import TokenizerError, shown
from glm4lite.text.tokenization.encoding import BatchEncoding, as_lists

Side = Literal["left", "right"]

_PADDING: Mapping[bool | str | None, str | None] = {
    True: "longest",
    False: None,
    None: None,
    "longest": "longest",
    "max_length": "max_length",
}
_TRUNCATION: Mapping[bool | str | None, str | None] = {
    True: "longest_first",
    False: None,
    None: None,
    "longest_first": "longest_first",
    "only_first": "only_first",
    "only_second": "only_second",
}
_NO_LIMIT = 10**20  # a model_max_length above says that none is known
_FILLED = {"attention_mask": 0, "special_tokens_mask": 1}


@dataclass(frozen=True)
class Pad:
    """What rows are filled with, and where."""

    token: str
    id: int
    type_id: int
    side: Side


@dataclass(frozen=True)
class Lengths:
    """Rows are cut to `cut` ids and filled up to `fill` (None: to the longest), then to a multiple.

    truncation: "longest_first", "only_first" or "only_second" (of a pair); None: nothing is cut. pad None: nothing is
    filled.
    """

    truncation: str | None = None
    cut: int | None = None
    cut_side: Side = "right"
    stride: int = 0
    pad: Pad | None = None
    fill: int | None = None
    multiple: int | None = None

    @classmethod
    def of(
        cls,
        padding: Any,
        truncation: Any,
        max_length: int | None,
        *,
        model_max_length: float,
        pad: Pad | None,
        multiple: int | None = None,
        cut_side: Side = "right",
        stride: int = 0,
    ) -> Lengths:
        """What a call's arguments mean. Raises TokenizerError for values that mean nothing.

        model_max_length: taken where there is no max_length; pad: None where the tokenizer has no pad token. Source:
        Transformers, where max_length alone cuts, and padding=True alone does not.
        """
        max_length = None if max_length is None else _count("max_length", max_length)
        multiple = None if multiple is None else _count("pad_to_multiple_of", multiple)
        stride = _count("stride", stride)
        if max_length is not None and padding is False and truncation is None:
            truncation = "longest_first"
        how, cuts = _value("padding", padding, _PADDING), _value("truncation", truncation, _TRUNCATION)
        if max_length is not None and padding is True and cuts is None:
            warnings.warn("max_length changes nothing: padding=True pads to the longest; give truncation=True too",
                          stacklevel=4)  # fmt: skip
        limit = _count("model_max_length", model_max_length) if max_length is None else max_length
        if limit > _NO_LIMIT and (cuts or how == "max_length"):
            warnings.warn("neither max_length nor the tokenizer's model_max_length says a length: there is none",
                          stacklevel=4)  # fmt: skip
            cuts, how = None, None if how == "max_length" else how
        if how is not None and pad is None:
            raise TokenizerError(
                "there is no pad token to fill rows with; name one: tokenizer.pad_token = tokenizer.eos_token"
            )
        if cuts and how and multiple and limit % multiple:
            raise TokenizerError(
                f"rows are cut to {limit} tokens, which is no multiple of pad_to_multiple_of {multiple}"
            )
        return cls(
            truncation=cuts,
            cut=int(limit) if cuts else None,
            cut_side=cut_side,
            stride=stride,
            pad=pad if how else None,
            fill=int(limit) if how == "max_length" else None,
            multiple=multiple,
        )

    def set(self, backend: tokenizers.Tokenizer) -> None:
        """Makes a backend of one's own cut and fill so."""
        if self.cut is not None:
            backend.enable_truncation(
                max_length=self.cut, stride=self.stride, strategy=self.truncation, direction=self.cut_side
            )
        if self.pad is not None:
            backend.enable_padding(
                length=self.fill,
                direction=self.pad.side,
                pad_id=self.pad.id,
                pad_token=self.pad.token,
                pad_type_id=self.pad.type_id,
                pad_to_multiple_of=self.multiple,
            )

    def check_stride(self, added: int) -> None:
        """Raises TokenizerError where rows share all that `added` tokens leave of them: the library would panic."""
        if self.cut is not None and self.stride and self.stride >= self.cut - added:
            raise TokenizerError(
                f"rows of {self.cut} tokens, {added} of them added, cannot share {self.stride} (stride)"
            )

    def shortened(self, ids: list[int]) -> list[int]:
        """One row of ids, cut."""
        if self.cut is None:
            return ids
        return ids[: self.cut] if self.cut_side == "right" else ids[max(0, len(ids) - self.cut) :]

    def filled(self, rows: Mapping[str, list[Any]], main: str, mask: bool) -> dict[str, list[Any]]:
        """Rows by name, of which those that go with the ids in `main` are filled; with a `mask` where there is none."""
        lengths = [len(ids) for ids in rows[main]]
        filled = {name: list(values) for name, values in rows.items()}
        if mask:
            filled.setdefault("attention_mask", [[1] * length for length in lengths])
        if self.pad is None:
            return filled
        most = max(lengths, default=0) if self.fill is None else self.fill
        if self.multiple:
            most = -(-most // self.multiple) * self.multiple
        values = {main: self.pad.id, "token_type_ids": self.pad.type_id, **_FILLED}
        for name in values.keys() & filled.keys():
            for place, (row, length) in enumerate(zip(filled[name], lengths, strict=True)):
                if not isinstance(row, list) or len(row) != length:
                    raise TokenizerError(f"row {place} of {name} must hold {length} numbers, one for each of its ids")
                filler = [values[name]] * (most - length)
                filled[name][place] = filler + row if self.pad.side == "left" else row + filler
        return filled


def whole(name: str, value: Any) -> int:
    """A whole number, numpy's too. Raises TokenizerError."""
    try:
        return operator.index(value)
    except TypeError:
        raise TokenizerError(f"{name} must be a whole number, found {shown(value)}") from None


def _count(name: str, value: Any) -> int:
    """A number of tokens. Raises TokenizerError."""
    count = int(value) if isinstance(value, float) and value.is_integer() else whole(name, value)
    if count < 0:
        raise TokenizerError(f"{name} must not be below 0, found {count}")
    return count


def _value(name: str, given: Any, known: Mapping[Any, str | None]) -> str | None:
    """An argument's meaning; Transformers' enumerations are their strings."""
    given = getattr(given, "value", given)
    nothing = given in ("do_not_pad", "do_not_truncate") if isinstance(given, str) else given is None
    if nothing:
        return None
    if isinstance(given, bool | str) and given in known:
        return known[given]
    raise TokenizerError(f"{name} must be one of {', '.join(map(repr, known))}, found {shown(given)}")


def gathered(features: Any, main: str) -> tuple[dict[str, Any], bool, str | None]:
    """Features (one encoding, an encoding of rows, or a list of encodings) as lists by name; whether there are rows;
    and the kind of tensor they came as. Raises TokenizerError.
    """
    if isinstance(features, Sequence) and features and all(isinstance(one, Mapping) for one in features):
        names = list(features[0])
        for place, one in enumerate(features):
            if set(one) != set(names):
                raise TokenizerError(f"example {place} has {', '.join(one)}; the first has {', '.join(names)}")
        features = {name: [one[name] for one in features] for name in names}
    if not isinstance(features, Mapping) or main not in features:
        raise TokenizerError(f"pad takes encodings that hold {main}, found {shown(features)}")
    data = {name: as_lists(value) for name, value in features.items()}
    batched = bool(data[main]) and isinstance(data[main][0], list | tuple)
    if batched:
        data[main] = [list(row) for row in data[main]]
    if batched and any(not isinstance(value, list) or len(value) != len(data[main]) for value in data.values()):
        raise TokenizerError(f"all values must have {len(data[main])} rows, as {main} has")
    return data, batched, _kind(features[main])


def _kind(value: Any) -> str | None:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    if not hasattr(value, "tolist"):
        return None
    return "pt" if type(value).__module__.startswith("torch") else "np"


def encoded(data: Mapping[str, list[Any]], batched: bool, tensor_type: Any) -> BatchEncoding:
    """Rows as a BatchEncoding, a single one without its axis."""
    values = data if batched else {name: rows[0] for name, rows in data.items()}
    return BatchEncoding(values, tensor_type=tensor_type)
