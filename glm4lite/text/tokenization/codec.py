"""Text to token ids and back, from a checkpoint's tokenizer.json: the safe way, which glm4lite itself takes.

Special tokens (`<|user|>`, `[gMASK]`, …) are recognized only where the caller says so, so what a user types stays text:

    >>> tokenizer.ids("<|user|>"), tokenizer.ids("<|user|>", special=True)
    ([27, 91, 872, 91, 29], [151336])
"""

import functools
import json
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import tokenizers
from tokenizers import decoders, models

from glm4lite.base.errors import CheckpointError, ContextLengthError, one_line
from glm4lite.base.files import TOKENIZER, decoded, open_file, read_json
from glm4lite.base.magic import START_BYTES, dangling, mistaken_for
from glm4lite.text.tokenization.rust import named_errors, panic_reports_hidden

GLM_STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
_PREFIX_TOKENS = ("[gMASK]", "<sop>")
_Piece: TypeAlias = tuple[str, int | None]
_ALL, _LETTERS, _DIGITS, _NO_ASCII = (
    bytes(range(256)),
    string.ascii_letters.encode(),
    b"0123456789",
    bytes(range(128, 256)),
)
_OTHER_KINDS = [_ALL.translate(None, kind) for kind in (_ALL, _LETTERS, _DIGITS, _NO_ASCII)]  # what is not of a kind
_PROBE = "The answer to 37 * 24 (= 888)?\r\n\t- \u00e9\u4f60\u597d \U0001f642 <|x|>"
_MAX_BYTES = 256 << 20  # the largest known have 30 MB
_ALWAYS_SPECIAL = {*GLM_STOP_TOKENS, *_PREFIX_TOKENS, "<|system|>", "<|assistant|>"}


class Codec:
    """What turns text into the ids of one checkpoint, and ids into text.

    size: ids in use (rows of the embedding past it are padding); special: special string -> id;
    eos_ids: what tokenizer_config.json names as end of sequence; stop_ids: these and GLM's own stop tokens;
    prefix_ids: `[gMASK]<sop>` where the vocabulary has them, which every GLM prompt starts with (chat templates write
    it themselves; put it before raw completions).
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None, origin: str = TOKENIZER
    ) -> None:
        """origin: the file that the backend was read from, for messages."""
        config = config or {}
        self._backend, self._origin, self._config = backend, origin, config
        self.folder: Path | None = None  # where its files are
        declared, eos = _declared_special(config), token_text(config.get("eos_token"))
        self._call("no_truncation")
        self._call("no_padding")
        added = self._call("get_added_tokens_decoder")
        # A token that only tokenizer_config.json (or the GLM family) knows to be special must be one for the backend.
        also = [token.content for token in added.values() if not token.special and token.content in declared]
        self._call("add_special_tokens", also)
        # Plain text never yields special tokens: ids() finds them itself, where it is told to.
        backend.encode_special_tokens = True
        specials = self._call("get_added_tokens_decoder").items()
        self._specials: dict[int, tokenizers.AddedToken] = {i: token for i, token in specials if token.special}
        # Cut at one after the other, longest first: a pattern of all of them takes seconds for a text full of "<|".
        found = (token for token in self._specials.values() if token.content)
        self._by_length = sorted(found, key=lambda token: -len(token.content))
        self.special: dict[str, int] = {token.content: i for i, token in sorted(self._specials.items())}
        self.size: int = max(self._call("get_vocab", with_added_tokens=True).values(), default=-1) + 1
        self.eos_ids = frozenset(self._ids_of(eos))
        self.stop_ids = self.eos_ids | {self.special[name] for name in GLM_STOP_TOKENS if name in self.special}
        has_prefix = all(name in self.special for name in _PREFIX_TOKENS)
        self.prefix_ids: list[int] = [self.special[name] for name in _PREFIX_TOKENS] if has_prefix else []
        self.byte_level = isinstance(backend.decoder, decoders.ByteLevel)

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Read tokenizer.json and, when there is one, tokenizer_config.json; raises CheckpointError naming the file.

        A tokenizer that cannot encode a few words of many kinds is refused here, not when a model was loaded for it.
        """
        file = Path(path) / TOKENIZER
        data = _read(file)
        with panic_reports_hidden():
            try:
                backend = named_errors(str(file), tokenizers.Tokenizer.from_buffer, data)
            except CheckpointError as error:
                what = mistaken_for(data[:START_BYTES])
                raise error if what is None else CheckpointError(f"{file} is {what}") from None
            config = read_json(file.with_name("tokenizer_config.json"), CheckpointError, optional=True)
            if "added_tokens_decoder" not in config:  # older files name the special tokens in one more place
                config |= read_json(file.with_name("special_tokens_map.json"), CheckpointError, optional=True)
            try:
                tokenizer = cls(backend, config, str(file))
            except (TypeError, ValueError, AttributeError) as error:
                what = f"unexpected form ({one_line(error)[:200]})"
                raise CheckpointError(f"{path}/tokenizer_config.json: {what}") from error
            tokenizer.text(tokenizer.ids(_PROBE))
        tokenizer.folder = Path(path)
        return tokenizer

    def written(self) -> dict[str, Any]:
        """What tokenizer.json says, with the special tokens that other files name."""
        found: dict[str, Any] = json.loads(self._call("to_str"))
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # which a copy of the backend does not remember

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return named_errors(self._origin, getattr(self._backend, method), *arguments, **options)

    def ids(self, text: str, special: bool = False, context: int | None = None) -> list[int]:
        """Ids of `text`; with `special`, the strings in `self.special` become their single ids. Adds no prefix.

        context: raises ContextLengthError for a text that does not fit, most often without tokenizing it.
        """
        if context is not None:
            self.check_fits(text, context)
        return self.ids_between(text, context=context) if special else self._encode_plain(text, context)

    def ids_between(self, text: str, restore: Callable[[str], str] = str, context: int | None = None) -> list[int]:
        """The single ids of special strings, and between them the ids of what `restore` makes of the text there."""
        ids: list[int] = []
        for piece, token_id in self.split_special(text):
            ids.extend(self._encode_plain(restore(piece), context) if token_id is None else [token_id])
        return ids

    def check_fits(self, text: str, context: int) -> None:
        """Raises ContextLengthError where `text` is so long that it needs no counting: it cannot fit."""
        least = self.least_tokens(text)
        if least >= context:
            raise _too_long(text, f"at least {least}", context)

    def split_special(self, text: str) -> list[_Piece]:
        """Pieces of `text` in order: special strings with their id, the text between them with None."""
        split: list[_Piece] = [(text, None)]
        for token in self._by_length:
            if token.content in text:
                split = [part for piece in split for part in self._split_at(token, piece)]
        return [part for part in split if part[0]]

    def _split_at(self, token: tokenizers.AddedToken, piece: _Piece) -> Iterator[_Piece]:
        """The piece cut at one special string; lstrip and rstrip tokens swallow the white space beside them."""
        text, token_id = piece
        if token_id is not None:
            yield piece
            return
        parts = text.split(token.content)
        for place, part in enumerate(parts):
            if place:
                yield token.content, self.special[token.content]
            part = part.lstrip() if token.rstrip and place else part
            yield (part.rstrip() if token.lstrip and place < len(parts) - 1 else part), None

    def text(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Text of `ids`. Special tokens are left out or kept as their strings; ids not in use are left out."""
        kept = [i for i in ids if keep_special or i not in self._specials]
        text: str = self._call("decode", kept, skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token of a byte-level vocabulary; empty for an id that is not in use."""
        token: str | None = self._call("id_to_token", token_id)
        if token is None:
            return b""
        table = _byte_of_character()
        if token_id not in self._specials and all(character in table for character in token):
            return bytes(table[character] for character in token)
        return token.encode("utf-8", "replace")

    def least_tokens(self, text: str) -> int:
        """No encoding of `text` has fewer ids, special strings in it counted as one id or more.

        Its bytes over the most that one token holds, for each kind of bytes by itself, since the longest tokens are
        runs of spaces. 0 where a tokenizer may drop or shorten text before it looks ids up.
        """
        most = self._most_bytes
        return max(-(-count // most[kind]) for kind, count in enumerate(_kinds_of(text)) if most[kind]) if most else 0

    @functools.cached_property
    def _most_bytes(self) -> list[int]:
        """How many bytes of each kind one token holds at most; empty where ids say nothing about a text's length."""
        vocabulary, table = self._backend.get_vocab(with_added_tokens=False), _byte_of_character()
        added = self._backend.get_added_tokens_decoder().values()
        whole = isinstance(self._backend.model, models.BPE) and table.keys() <= vocabulary.keys()
        swallows = any(token.lstrip or token.rstrip for token in added)  # white space of any length beside them
        if not whole or swallows or self._backend.normalizer is not None or not _keeps_bytes(self._backend):
            return []
        # A character of a byte-level vocabulary is a byte.
        tokens = [bytes(table.get(character, 0) for character in token) for token in vocabulary]
        tokens += [token.content.encode("utf-8", "replace") for token in added]
        return [max(len(token.translate(None, others)) for token in tokens) for others in _OTHER_KINDS]

    def is_special(self, token_id: int) -> bool:
        """True for the ids in `self.special`."""
        return token_id in self._specials

    def _encode_plain(self, text: str, context: int | None = None) -> list[int]:
        # Unlike `encode`, which gives the same ids, this lets other threads run, for seconds with a long text.
        encoded = self._call("encode_batch_fast", [clean(text)], add_special_tokens=False)[0]
        if context is not None and len(encoded) >= context:
            raise _too_long(text, str(len(encoded)), context)
        ids: list[int] = encoded.ids
        return ids

    def _ids_of(self, text: str | None) -> list[int]:
        token_id = self._call("token_to_id", text) if text else None
        return [] if token_id is None else [token_id]


def clean(text: str) -> str:
    """Text with "?" for each lone surrogate, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _too_long(text: str, tokens: str, context: int) -> ContextLengthError:
    return ContextLengthError(
        "the prompt has {characters} characters, {tokens} tokens, and the model's context is {context}; "
        "shorten the conversation or start a new one",
        characters=str(len(text)),
        tokens=tokens,
        context=str(context),
    )


def _read(file: Path) -> bytes:
    """A tokenizer.json as UTF-8 without a byte order mark."""
    try:
        with open_file(file) as opened:
            data = opened.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        link = dangling(file)
        if link is not None:
            raise CheckpointError(f"{file} is {link}") from None
        hint = ""
        if file.with_name("tokenizer.model").exists():
            hint = " (its tokenizer.model is of the older remote-code form; use the '-hf' conversion)"
        raise CheckpointError(f"{file}: not found{hint}; a checkpoint folder needs its tokenizer.json") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    if len(data) > _MAX_BYTES:
        raise CheckpointError(f"{file} has more than {_MAX_BYTES} bytes, as no tokenizer has; download it again")
    try:
        return decoded(data).encode()
    except UnicodeError:
        return data  # for the library to say what is wrong


def _declared_special(config: dict[str, Any]) -> set[str]:
    listed = config.get("added_tokens_decoder") or {}
    declared = {token_text(token) for token in listed.values() if isinstance(token, dict) and token.get("special")}
    return {text for text in declared if text} | _ALWAYS_SPECIAL


def token_text(token: Any) -> str | None:
    """A token in tokenizer_config.json is its string or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _kinds_of(text: str) -> list[int]:
    """How many bytes of each kind a text has."""
    data = text.encode("utf-8", "replace")
    return [len(data.translate(None, others)) for others in _OTHER_KINDS]


def _keeps_bytes(backend: tokenizers.Tokenizer) -> bool:
    """Whether the pre-tokenizer ends in bytes and drops nothing on the way."""
    steps = [] if backend.pre_tokenizer is None else [json.loads(backend.pre_tokenizer.__getstate__())]
    kinds = list[str]()
    for step in steps:  # grows by what a Sequence holds
        kinds.append(step["type"] if step.get("behavior") != "Removed" else "Removed")
        steps.extend(step.get("pretokenizers", ()))
    return "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Sequence", "Split", "Digits"}


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the 68 others for the characters from U+0100 on."""
    printable: Sequence[int] = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}
