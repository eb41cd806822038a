"""BatchEncoding: what a tokenizer returns, as lists, arrays or tensors, and where each token lies in its text."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import tokenizers

from glm4lite.base.errors import TokenizerError, shown

if TYPE_CHECKING:
    import torch


class BatchEncoding(UserDict[str, Any]):
    """`input_ids`, `attention_mask` and what else was asked for, by name and as attributes: `model(**encoding)`.

    encodings: of each row, what the tokenizers library knows about it; None where there are only ids (padded anew, or
    of a chat). tensor_type: "pt" or "np". Source: Transformers' class of the same name.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        encoding: tokenizers.Encoding | Sequence[tokenizers.Encoding] | None = None,
        tensor_type: Any = None,
        prepend_batch_axis: bool = False,
    ) -> None:
        super().__init__(data or {})
        self._encodings = [encoding] if isinstance(encoding, tokenizers.Encoding) else encoding
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, key: str | int | slice) -> Any:
        """By name; of a number or a slice, the rows' Encodings, or their values where there are none."""
        if isinstance(key, str):
            return self.data[key]
        if self._encodings is not None:
            return self._encodings[key]
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.data.items()}
        raise KeyError(f"{key!r}: rows can be had by a slice, values by their names: {', '.join(self.data)}")

    def __getattr__(self, name: str) -> Any:
        if name != "data" and name in self.data:
            return self.data[name]
        raise AttributeError(f"the encoding has no {name!r}; it has {', '.join(self.__dict__.get('data', ()))}")

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "_encodings": self._encodings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def encodings(self) -> Sequence[tokenizers.Encoding] | None:
        return self._encodings

    @property
    def is_fast(self) -> bool:
        """Whether tokens can be found in their text."""
        return self._encodings is not None

    @property
    def n_sequences(self) -> int | None:
        """1, or 2 for pairs; None where it is not known."""
        return self._encodings[0].n_sequences if self._encodings else None

    def to(self, device: str | torch.device | int, *, non_blocking: bool = False) -> Self:
        """Moves all tensors to a device, in place. Raises TokenizerError for a dtype: ids stay whole numbers."""
        import torch

        if not isinstance(device, str | int | torch.device):
            raise TokenizerError(f"an encoding goes to a device, such as 'cpu' or model.device, not to {shown(device)}")
        for name, value in self.data.items():
            if isinstance(value, torch.Tensor):
                self.data[name] = value.to(device, non_blocking=non_blocking)
        return self

    def convert_to_tensors(self, tensor_type: Any = None, prepend_batch_axis: bool = False) -> Self:
        """Lists become tensors ("pt") or arrays ("np"), in place. Raises TokenizerError where rows differ in length."""
        kind = getattr(tensor_type, "value", tensor_type)
        if kind is None:
            return self
        if kind not in ("pt", "np"):
            raise TokenizerError(f"return_tensors must be 'pt' or 'np' (or left out, for lists), found {shown(kind)}")
        for name, value in self.data.items():
            try:
                self.data[name] = (
                    _as_torch(value, prepend_batch_axis) if kind == "pt" else _as_numpy(value, prepend_batch_axis)
                )
            except (ValueError, TypeError, RuntimeError):
                raise TokenizerError(
                    f"{name} is no tensor: its rows differ in length, or hold no numbers; "
                    "give padding=True (and truncation=True)"
                ) from None
        return self

    def tokens(self, batch_index: int = 0) -> list[str]:
        return self._of(batch_index).tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Of each token the number of its word; None for special tokens that were added."""
        return self._of(batch_index).word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Of each token 0 or 1: the first or second text of a pair; None for special tokens that were added."""
        return self._of(batch_index).sequence_ids

    # Of the following, each takes a row and a place in it, or only a place of the first row.

    def token_to_sequence(self, row_or_token: int, token: int | None = None) -> int | None:
        row, place = _row_and(row_or_token, token)
        return self._of(row).token_to_sequence(place % len(self._of(row).ids))

    def token_to_word(self, row_or_token: int, token: int | None = None) -> int | None:
        row, place = _row_and(row_or_token, token)
        return self._of(row).token_to_word(place % len(self._of(row).ids))

    def token_to_chars(self, row_or_token: int, token: int | None = None) -> tuple[int, int] | None:
        """The token's characters in its text, from the first to before the second number."""
        row, place = _row_and(row_or_token, token)
        return self._of(row).token_to_chars(place)

    def word_to_tokens(self, row_or_word: int, word: int | None = None, sequence_index: int = 0) -> Any:
        """The word's tokens, from the first to before the second number."""
        row, place = _row_and(row_or_word, word)
        return self._of(row).word_to_tokens(place, sequence_index)

    def word_to_chars(self, row_or_word: int, word: int | None = None, sequence_index: int = 0) -> Any:
        row, place = _row_and(row_or_word, word)
        return self._of(row).word_to_chars(place, sequence_index)

    def char_to_token(self, row_or_char: int, char: int | None = None, sequence_index: int = 0) -> int | None:
        row, place = _row_and(row_or_char, char)
        return self._of(row).char_to_token(place, sequence_index)

    def char_to_word(self, row_or_char: int, char: int | None = None, sequence_index: int = 0) -> int | None:
        row, place = _row_and(row_or_char, char)
        return self._of(row).char_to_word(place, sequence_index)

    def _of(self, row: int) -> Any:
        if not self._encodings:
            raise TokenizerError("where its tokens lie is not known of a padded or chat encoding; call the tokenizer")
        return self._encodings[row]


def _row_and(row_or_place: int, place: int | None) -> tuple[int, int]:
    return (0, row_or_place) if place is None else (row_or_place, place)


def _as_torch(value: Any, prepend: bool) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value[None] if prepend else value
    rows = [value] if prepend else value
    if isinstance(rows, list) and rows and all(isinstance(row, torch.Tensor) for row in rows):
        return torch.stack(rows)
    if isinstance(rows, list) and rows and hasattr(rows[0], "dtype"):
        import numpy

        return torch.from_numpy(numpy.array(rows))
    return torch.tensor(rows, dtype=None if _leaves(rows) else torch.int64)


def _as_numpy(value: Any, prepend: bool) -> Any:
    import numpy

    rows = [value] if prepend else value
    array = numpy.asarray(rows, dtype=None if not isinstance(rows, list) or _leaves(rows) else numpy.int64)
    if array.dtype == object:
        raise ValueError
    return array


def _leaves(rows: Any) -> bool:
    """Whether lists in lists hold anything: of nothing, the type is not known."""
    return any(_leaves(row) for row in rows) if isinstance(rows, list | tuple) else True


def as_lists(value: Any) -> Any:
    """Tensors and arrays, also in lists, as lists of numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) and _has_arrays(value) else value


def _has_arrays(values: Sequence[Any]) -> bool:
    return any(hasattr(value, "tolist") or isinstance(value, list | tuple) for value in values)
