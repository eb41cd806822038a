"""The documented tokenizer's vocabulary: tokens and ids, special tokens by their parts, and what else scripts read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, overload

import tokenizers

from glm4lite.base.errors import TokenizerError, shown, unknown_name
from glm4lite.base.files import TOKENIZER
from glm4lite.text.tokenization import refusals
from glm4lite.text.tokenization.codec import Codec
from glm4lite.text.tokenization.encoding import as_lists
from glm4lite.text.tokenization.padding import Lengths, Pad, Side, whole
from glm4lite.text.tokenization.rust import named_errors
from glm4lite.text.tokenization.special_tokens import Part, PartId, SpecialTokens, as_texts, in_vocabulary

_NO_LIMIT = int(1e30)  # Transformers' model_max_length where none is known
_SIDES = ("left", "right")


class _SideOf:
    """An attribute that is "left" or "right"."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, tokenizer: Any, owner: type) -> Any:
        return self if tokenizer is None else vars(tokenizer)[self._name]

    def __set__(self, tokenizer: Any, value: Any) -> None:
        vars(tokenizer)[self._name] = side(self._name, value)


def side(name: str, value: Any) -> Side:
    if value not in _SIDES:
        raise TokenizerError(f"{name} must be 'left' or 'right', found {shown(value)}")
    chosen: Side = value
    return chosen


class Vocabulary(Codec):
    """Attributes and lookups under Transformers' names.

    Parts of special tokens (`pad_token`, `eos_token_id`) can be read and set, to what the vocabulary holds; so can
    padding_side, truncation_side, model_max_length, model_input_names, clean_up_tokenization_spaces and
    split_special_tokens (True: special strings in texts are text).
    """

    bos_token, eos_token, unk_token, sep_token = Part(), Part(), Part(), Part()
    pad_token, cls_token, mask_token = Part(), Part(), Part()
    bos_token_id, eos_token_id, unk_token_id, sep_token_id = PartId(), PartId(), PartId(), PartId()
    pad_token_id, cls_token_id, mask_token_id = PartId(), PartId(), PartId()
    padding_side, truncation_side = _SideOf(), _SideOf()
    is_fast = True
    pad_token_type_id = 0

    def __init__(
        self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None, origin: str = TOKENIZER
    ) -> None:
        super().__init__(backend, config, origin)
        config = self._config
        self._kept_view: tuple[tuple[Lengths, bool], tokenizers.Tokenizer] | None = None
        self.special_tokens = SpecialTokens(config)
        self.padding_side = config.get("padding_side", "right")
        self.truncation_side = config.get("truncation_side", "right")
        limit = config.get("model_max_length", config.get("max_len"))
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float)):
            raise TokenizerError(f"model_max_length must be a number of tokens, found {shown(limit)}")
        self.model_max_length: float = _NO_LIMIT if limit is None else limit
        self.model_input_names: list[str] = list(config.get("model_input_names") or ("input_ids", "attention_mask"))
        self.clean_up_tokenization_spaces = bool(config.get("clean_up_tokenization_spaces", False))
        self.split_special_tokens = bool(config.get("split_special_tokens", False))
        self.name_or_path = ""
        self.deprecation_warnings: dict[str, bool] = {}  # what has been said once; Transformers' collators write it too

    def __getattr__(self, name: str) -> Any:
        """The parts that only this checkpoint names; what ours does not have is refused with the reason."""
        special = self.__dict__.get("special_tokens")
        if special is not None and name in special.parts:
            return special.parts[name]
        if special is not None and name.removesuffix("_id") in special.parts:
            return self.convert_tokens_to_ids(special.parts[name.removesuffix("_id")])
        if name in refusals.METHODS:
            raise AttributeError(f"glm4lite's Tokenizer has no {name}: {refusals.METHODS[name]}")
        raise AttributeError(unknown_name("glm4lite's Tokenizer", name, [one for one in dir(self) if one[0] != "_"]))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept_view": None}  # a copy of it would forget its settings

    def __len__(self) -> int:
        """Tokens, those added to the vocabulary too."""
        count: int = self._call("get_vocab_size", with_added_tokens=True)
        return count

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r}, "
            f"special_tokens={self.special_tokens_map})"
        )

    @property
    def vocab_size(self) -> int:
        """Tokens without those that were added, such as the special ones."""
        count: int = self._call("get_vocab_size", with_added_tokens=False)
        return count

    @property
    def vocab(self) -> dict[str, int]:
        """As `get_vocab`."""
        return self.get_vocab()

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, as the vocabulary spells tokens (a space is "Ġ")."""
        found: dict[str, int] = self._call("get_vocab", with_added_tokens=True)
        return found

    def get_added_vocab(self) -> dict[str, int]:
        """Of the tokens that were added to the vocabulary."""
        return {token.content: token_id for token_id, token in sorted(self.added_tokens_decoder.items())}

    added_tokens_encoder = property(get_added_vocab)

    @property
    def added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        """Id -> added token, special ones among them."""
        found: dict[int, tokenizers.AddedToken] = self._call("get_added_tokens_decoder")
        return found

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizers library's object, a new one each time: changes to it change nothing here."""
        view: tokenizers.Tokenizer = named_errors(self._origin, _shared, self._backend)
        return view

    @property
    def decoder(self) -> Any:
        """The library's object that puts tokens together to a text."""
        return self._backend.decoder

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Part -> string, of the parts that something plays."""
        return self.special_tokens.named

    @property
    def all_special_tokens(self) -> list[str]:
        """Special tokens that play a part (end, padding), then the others; each once."""
        return self.special_tokens.all

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids, of those the vocabulary has."""
        return [i for i in map(self.token_id, self.special_tokens.all) if i is not None]

    @property
    def extra_special_tokens(self) -> list[str]:
        """Special tokens that play no part."""
        return self.special_tokens.extra

    @extra_special_tokens.setter
    def extra_special_tokens(self, tokens: Sequence[Any]) -> None:
        texts = as_texts("extra_special_tokens", tokens)
        found = [in_vocabulary(self, "extra_special_tokens", text) for text in texts]
        self.special_tokens.extra = [text for text in found if text is not None]

    additional_special_tokens = extra_special_tokens

    @property
    def extra_special_tokens_ids(self) -> list[int]:
        """The ids of `extra_special_tokens`, of those the vocabulary has."""
        return [i for i in map(self.token_id, self.special_tokens.extra) if i is not None]

    additional_special_tokens_ids = extra_special_tokens_ids

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Gives tokens of the vocabulary their parts; returns how many are new: 0.

        Raises TokenizerError for a token that the vocabulary does not hold: it is fixed.
        """
        for name, value in special_tokens_dict.items():
            if name in ("extra_special_tokens", "additional_special_tokens"):
                kept = [] if replace_extra_special_tokens else self.extra_special_tokens
                self.extra_special_tokens = list(dict.fromkeys([*kept, *as_texts(name, value)]))
            elif name in self.special_tokens.parts:
                self.special_tokens.parts[name] = in_vocabulary(self, name, value)
            else:
                parts = [*self.special_tokens.parts, "extra_special_tokens"]
                raise TokenizerError(unknown_name("add_special_tokens", name, parts))
        return 0

    def token_id(self, token: str) -> int | None:
        """The id of one token; None where the vocabulary does not hold it."""
        found: int | None = self._call("token_to_id", token)
        return found

    def token_of(self, token_id: int) -> str | None:
        """The token of one id; None for an id that is not in use."""
        found: str | None = self._call("id_to_token", an_id(token_id))
        return found

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...  # type: ignore[overload-overlap]
    @overload
    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]: ...
    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """Ids of tokens, the unknown token's (None where there is none) for what is no token."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self.token_id(tokens)
        return self.unk_token_id if found is None and tokens != self.unk_token else found

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str | None: ...
    @overload
    def convert_ids_to_tokens(self, ids: Iterable[int], skip_special_tokens: bool = False) -> list[str | None]: ...
    def convert_ids_to_tokens(
        self, ids: int | Iterable[int], skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        """Tokens as the vocabulary spells them; None for ids that are not in use."""
        ids = as_lists(ids)
        if isinstance(ids, int):
            return self.token_of(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.token_of(token_id) for token_id in ids if token_id not in skipped]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text that tokens, spelled as in the vocabulary, stand for."""
        decoder = self._backend.decoder
        text: str = " ".join(tokens) if decoder is None else named_errors(self._origin, decoder.decode, list(tokens))
        return text

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many tokens `add_special_tokens=True` puts around a text, or a pair of texts."""
        count: int = self._call("num_special_tokens_to_add", pair)
        return count

    @property
    def max_len_single_sentence(self) -> float:
        """Tokens that a text may have beside the special ones that are added to it."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> float:
        """Tokens that two texts may have together beside the special ones."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for a special token, 0 for another. Raises TokenizerError for ids to which special ones are yet to come."""
        if not already_has_special_tokens or token_ids_1 is not None:
            raise TokenizerError("get_special_tokens_mask takes whole sequences: already_has_special_tokens=True")
        special = set(self.all_special_ids)
        return [int(token_id in special) for token_id in as_lists(token_ids_0)]

    def _pad(self, where: str | None) -> Pad | None:
        token, token_id = self.pad_token, self.pad_token_id
        chosen = self.padding_side if where is None else side("padding_side", where)
        return None if token is None or token_id is None else Pad(token, token_id, self.pad_token_type_id, chosen)

    def _view(self, lengths: Lengths, split_special: bool) -> tokenizers.Tokenizer:
        """The backend with settings of its own, in which special strings are special tokens; never changed later.

        It shares the vocabulary, so it takes a tenth of a millisecond, and the last one is kept. The backend itself,
        which other threads use, keeps the safe settings.
        """
        kept, settings = self._kept_view, (lengths, split_special)
        if kept is None or kept[0] != settings:
            view: tokenizers.Tokenizer = named_errors(self._origin, _shared, self._backend)
            view.encode_special_tokens = split_special
            lengths.set(view)
            self._kept_view = kept = (settings, view)
        return kept[1]


def _shared(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    view = tokenizers.Tokenizer(backend.model)
    view.normalizer, view.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    view.post_processor, view.decoder = backend.post_processor, backend.decoder
    added = backend.get_added_tokens_decoder()
    for special, tokens in groupby([added[i] for i in sorted(added)], key=lambda token: token.special):
        (view.add_special_tokens if special else view.add_tokens)(list(tokens))
    if view.get_added_tokens_decoder().keys() == added.keys():
        return view
    return tokenizers.Tokenizer.from_str(backend.to_str())  # ids with gaps between them


def an_id(value: Any) -> int:
    """A token id; TokenizerError for what can be none, such as the -100 of labels."""
    number = whole("a token id", value)
    if not 0 <= number < 1 << 32:
        raise TokenizerError(f"{number} is no token id; replace the -100 of labels by pad_token_id before decoding")
    return number
