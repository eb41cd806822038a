"""Texts to batches of ids and back, with the arguments that Transformers documents."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import models

from glm4lite.base.errors import CheckpointError, TokenizerError, shown
from glm4lite.text.tokenization import refusals
from glm4lite.text.tokenization.codec import clean
from glm4lite.text.tokenization.encoding import BatchEncoding, as_lists
from glm4lite.text.tokenization.padding import Lengths, gathered
from glm4lite.text.tokenization.rust import named_errors
from glm4lite.text.tokenization.vocabulary import Vocabulary, an_id

logger = logging.getLogger("glm4lite")

_FIELDS = {  # of an encoding: Transformers' name -> the library's
    "input_ids": "ids",
    "token_type_ids": "type_ids",
    "attention_mask": "attention_mask",
    "special_tokens_mask": "special_tokens_mask",
    "offset_mapping": "offsets",
}
_SPACES = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")]
_SPACES += [(f" '{end}", f"'{end}") for end in ("m", "s", "ve", "re")]


@dataclass(frozen=True)
class _Call:
    """What a call asks for. fields: of `_FIELDS`; lengths: rows of lists where there are no tensors."""

    fields: tuple[str, ...]
    lengths: Lengths
    special: bool
    split_special: bool
    words: bool
    overflowing: bool
    counted: bool
    tensors: Any
    verbose: bool


class Encoder(Vocabulary):
    """Calling it, encode, decode and pad."""

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
        **others: Any,
    ) -> BatchEncoding:
        """Ids of a text, or of a list of texts, with special strings as special tokens.

        Args:
            text: a string or a list of them; with is_split_into_words each is a list of words.
            text_pair: second texts, which are put behind the first ones.
            text_target: texts whose ids become `labels` (all there is, where there is no text).
            add_special_tokens: puts around a text what tokenizer.json says (the fuller GLM-4 files: `[gMASK]<sop>`).
            padding: True or "longest", "max_length", or False. padding_side: else the attribute of that name.
            truncation: True or "longest_first", "only_first", "only_second"; False. None: if max_length is given.
            max_length: in tokens; None: the attribute model_max_length.
            stride: how many ids the rows of one text share, with return_overflowing_tokens.
            return_tensors: "pt" or "np", [rows, longest]; None: lists, of a single text without the rows.
            return_token_type_ids, return_attention_mask: None: as model_input_names says.
            split_special_tokens: True: special strings in the texts are text.

        Raises TokenizerError: an argument is not known or not supported, or the texts are no texts.
        """
        if others:
            refusals.check("the tokenizer", others, refusals.ENCODING, inspect.signature(Encoder.__call__).parameters)
        wanted = {
            "input_ids": True,
            "token_type_ids": self._by_default("token_type_ids", return_token_type_ids),
            "attention_mask": self._by_default("attention_mask", return_attention_mask),
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
        }
        call = _Call(
            tuple(name for name, asked in wanted.items() if asked),
            self._lengths(padding, truncation, max_length, pad_to_multiple_of, padding_side, stride),
            add_special_tokens,
            self.split_special_tokens if split_special_tokens is None else split_special_tokens,
            is_split_into_words,
            return_overflowing_tokens,
            return_length,
            return_tensors,
            verbose and max_length is None,
        )
        if text is None and text_target is None:
            raise TokenizerError("there is no text; give a string or a list of strings")
        targets = None if text_target is None else self._encoded(text_target, text_pair_target, call)
        if text is None and targets is not None:
            return targets
        encoding = self._encoded(text, text_pair, call)
        if targets is not None:
            encoding["labels"] = targets["input_ids"]
        return encoding

    def encode(
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        **others: Any,
    ) -> Any:
        """The input_ids of a call: a list, or a tensor [1, tokens]. Special strings become special tokens."""
        return self(
            text,
            text_pair,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            stride=stride,
            padding_side=padding_side,
            return_tensors=return_tensors,
            **others,
        )["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **others: Any
    ) -> list[str]:
        """The tokens of a text, as the vocabulary spells them."""
        return self(text, pair, add_special_tokens=add_special_tokens, **others).tokens()

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **others: Any,
    ) -> Any:
        """The text of ids (a number, a list, a tensor), or a list of texts of several rows.

        skip_special_tokens: leaves special tokens out. clean_up_tokenization_spaces: takes spaces before punctuation
        away, which as in Transformers is not done to BPE vocabularies: they know their spaces. Ids that are not in use
        are left out.

        Raises TokenizerError: an id is no id (the -100 of labels), or an argument is not known.
        """
        refusals.check("decode", others, refusals.DECODING, ("skip_special_tokens", "clean_up_tokenization_spaces"))
        ids = as_lists(token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids)
        if isinstance(ids, list | tuple) and ids and isinstance(ids[0], list | tuple):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        if not isinstance(ids, int | list | tuple):
            raise TokenizerError(f"decode takes token ids, found {shown(token_ids)}")
        ids = [an_id(token_id) for token_id in ([ids] if isinstance(ids, int) else ids)]
        text: str = self._call("decode", ids, skip_special_tokens=skip_special_tokens)
        cleans = (
            self.clean_up_tokenization_spaces
            if clean_up_tokenization_spaces is None
            else bool(clean_up_tokenization_spaces)
        )
        if cleans and isinstance(self._backend.model, models.BPE):
            self._say_once("clean_up_tokenization_spaces=True is passed over: a BPE vocabulary knows its spaces")
            cleans = False
        return self.clean_up_tokenization(text) if cleans else text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **others: Any,
    ) -> list[str]:
        """The texts of several rows of ids."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces, **others)
        return [texts] if isinstance(texts, str) else texts

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """Text without the spaces that word tokenizers leave before punctuation and English endings."""
        for found, instead in _SPACES:
            text = text.replace(found, instead)
        return text

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Encodings filled to one length: a list of them, as collators have it, or one that holds rows of lists.

        input_ids, attention_mask, token_type_ids and special_tokens_mask are filled; other values stay. Tensors stay
        tensors. Raises TokenizerError where they do not fit each other, or there is no pad token.
        """
        main = self.model_input_names[0]
        data, batched, kind = gathered(encoded_inputs, main)
        lengths = self._lengths(padding, False, max_length, pad_to_multiple_of, padding_side)
        rows = data if batched or not data[main] else {name: [value] for name, value in data.items()}
        filled = lengths.filled(rows, main, self._by_default("attention_mask", return_attention_mask))
        values = filled if rows is data else {name: value[0] for name, value in filled.items()}
        return BatchEncoding(values, tensor_type=kind if return_tensors is None else return_tensors)

    def _by_default(self, name: str, asked: bool | None) -> bool:
        return name in self.model_input_names if asked is None else asked

    def _lengths(
        self, padding: Any, truncation: Any, max_length: Any, multiple: Any, side: str | None, stride: int = 0
    ) -> Lengths:
        return Lengths.of(
            padding,
            truncation,
            max_length,
            model_max_length=self.model_max_length,
            pad=self._pad(side),
            multiple=multiple,
            cut_side=self.truncation_side,
            stride=stride,
        )

    def _encoded(self, text: Any, pair: Any, call: _Call) -> BatchEncoding:
        batched, inputs = _inputs(text, pair, call.words)
        call.lengths.check_stride(self.num_special_tokens_to_add(isinstance(inputs[0], tuple)))
        view = self._view(call.lengths, call.split_special)
        try:
            firsts: list[tokenizers.Encoding] = named_errors(
                self._origin, view.encode_batch, inputs, is_pretokenized=call.words, add_special_tokens=call.special
            )
        except CheckpointError as error:
            if "Truncation error" not in str(error):
                raise
            how = f"truncation={call.lengths.truncation!r} to max_length {call.lengths.cut}"
            raise TokenizerError(f"{how}: one of the texts is too short to be cut that far") from None
        found = [[one, *one.overflowing] if call.overflowing else [one] for one in firsts]
        encodings = [one for row in found for one in row]
        data: dict[str, Any] = {name: [getattr(one, _FIELDS[name]) for one in encodings] for name in call.fields}
        if call.counted:
            data["length"] = [len(one.ids) for one in encodings]
        if call.overflowing:
            data["overflow_to_sample_mapping"] = [place for place, row in enumerate(found) for _ in row]
        longest = max(len(one.ids) for one in encodings)
        if call.verbose and longest > self.model_max_length:
            self._say_once(f"a text has {longest} tokens, more than the model's {self.model_max_length}")
        if not batched and call.tensors is None and not call.overflowing:
            data = {name: rows[0] if isinstance(rows[0], list) else rows for name, rows in data.items()}
        return BatchEncoding(data, encodings, tensor_type=call.tensors)

    def _say_once(self, what: str) -> None:
        if not self.deprecation_warnings.get(what[:40]):
            self.deprecation_warnings[what[:40]] = True
            logger.warning("%s: %s", self.name_or_path or self._origin, what)


def _inputs(text: Any, pair: Any, words: bool) -> tuple[bool, list[Any]]:
    """Whether it is a batch, and the texts as the library takes them. Raises TokenizerError."""
    batched = isinstance(text, list | tuple)
    if words and batched:
        batched = bool(text) and isinstance(text[0], list | tuple)
    if not batched:
        one = _one(text, words)
        return False, [one if not pair else (one, _one(pair, words))]
    if not text:
        raise TokenizerError("there is no text: the list is empty")
    if pair is None:
        return True, [_one_or_pair(one, words) for one in text]
    if not isinstance(pair, list | tuple) or len(pair) != len(text):
        raise TokenizerError(f"text_pair must be a list of {len(text)} texts, as text is")
    return True, [(_one(first, words), _one(second, words)) for first, second in zip(text, pair, strict=True)]


def _one_or_pair(text: Any, words: bool) -> Any:
    nested = isinstance(text, list | tuple) and len(text) == 2 and all(isinstance(one, list | tuple) for one in text)
    if nested if words else isinstance(text, list | tuple) and len(text) == 2:
        return (_one(text[0], words), _one(text[1], words))
    return _one(text, words)


def _one(text: Any, words: bool) -> str | list[str]:
    if words:
        if isinstance(text, Sequence) and not isinstance(text, str) and all(isinstance(word, str) for word in text):
            return [clean(word) for word in text]
        raise TokenizerError(f"with is_split_into_words a text is a list of words, found {shown(text)}")
    if isinstance(text, str):
        return clean(text)
    raise TokenizerError(f"a text must be a string, found {shown(text)}")
