"""Which special strings play which part: `tokenizer.eos_token`, `tokenizer.pad_token_id` and the like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, overload

from glm4lite.base.errors import TokenizerError, shown
from glm4lite.text.tokenization.codec import token_text

if TYPE_CHECKING:
    from typing import Self

PARTS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The parts every tokenizer of Transformers has; a checkpoint may name more (`image_token`)."""


class SpecialTokens:
    """`parts`: name -> string, None where nothing plays that part; `extra`: special strings without one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """config: tokenizer_config.json, whose order is kept. Raises ValueError for one that is no text."""
        self.parts: dict[str, str | None] = dict.fromkeys(PARTS)
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
        named = dict(extra) if isinstance(extra, Mapping) else {}
        for name, value in {**config, **named}.items():
            if name in named or name in PARTS or (name.endswith("_token") and token_text(value) is not None):
                self.parts[name] = as_text(name, value)
        self.extra = [] if named else as_texts("extra_special_tokens", extra)

    @property
    def named(self) -> dict[str, str]:
        """The parts that are played."""
        return {name: text for name, text in self.parts.items() if text is not None}

    @property
    def all(self) -> list[str]:
        """Each once, those with a part first."""
        return list(dict.fromkeys([*self.named.values(), *self.extra]))


class Tokens(Protocol):
    """What has special tokens and a vocabulary."""

    special_tokens: SpecialTokens

    def token_id(self, token: str) -> int | None: ...

    def token_of(self, token_id: int) -> str | None: ...


class Part:
    """An attribute of a tokenizer that holds one part's string."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, tokenizer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, tokenizer: Tokens, owner: type) -> str | None: ...
    def __get__(self, tokenizer: Tokens | None, owner: type) -> Self | str | None:
        return self if tokenizer is None else tokenizer.special_tokens.parts[self._name]

    def __set__(self, tokenizer: Tokens, value: object) -> None:
        tokenizer.special_tokens.parts[self._name] = in_vocabulary(tokenizer, self._name, value)


class PartId:
    """An attribute of a tokenizer that holds one part's id."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name.removesuffix("_id")

    @overload
    def __get__(self, tokenizer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, tokenizer: Tokens, owner: type) -> int | None: ...
    def __get__(self, tokenizer: Tokens | None, owner: type) -> Self | int | None:
        if tokenizer is None:
            return self
        text = tokenizer.special_tokens.parts[self._name]
        return None if text is None else tokenizer.token_id(text)

    def __set__(self, tokenizer: Tokens, value: int | None) -> None:
        text = None if value is None else tokenizer.token_of(value)
        if value is not None and text is None:
            raise TokenizerError(f"{self._name}_id cannot be {shown(value)}: the vocabulary has no such id")
        tokenizer.special_tokens.parts[self._name] = text


def in_vocabulary(tokenizer: Tokens, name: str, value: object) -> str | None:
    """The string of a token; TokenizerError where the vocabulary lacks it: it would have no id, or a new one."""
    text = as_text(name, value)
    if text is not None and tokenizer.token_id(text) is None:
        raise TokenizerError(
            f"{name} cannot be {shown(text)}: the checkpoint's vocabulary does not hold it and is fixed; "
            "take one of tokenizer.all_special_tokens"
        )
    return text


def as_text(name: str, value: object) -> str | None:
    """A token as its string; it may be tokenizers' AddedToken, or a dict of its fields. Raises TokenizerError."""
    content = getattr(value, "content", value)
    text = token_text(content)
    if text is None and value is not None:
        raise TokenizerError(f"{name} must be a token's text, found {shown(value)}")
    return text


def as_texts(name: str, values: object) -> list[str]:
    """Tokens as their strings. Raises TokenizerError."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise TokenizerError(f"{name} must be a list of tokens, found {shown(values)}")
    return [text for value in values if (text := as_text(name, value)) is not None]
