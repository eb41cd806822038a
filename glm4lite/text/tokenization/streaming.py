"""Ids to text as they arrive."""

import codecs

from glm4lite.text.tokenization.codec import Codec


class StreamingDetokenizer:
    """Text of one growing list of ids, piece by piece: the pieces joined are `text(ids)`.

    A character whose bytes are not all there yet is held back, so no piece ends in half a character (U+FFFD). Each
    step costs the same however long the text is.
    """

    def __init__(self, tokenizer: Codec, keep_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.byte_level else None
        self._window: list[int] = []  # other decoders: the last ids, of which the first _shown characters are out
        self._shown = 0
        self._read = 0  # ids of the window whose text is out

    def add(self, token_id: int) -> str:
        """The text that `token_id` completes; often one word, sometimes nothing."""
        if self._tokenizer.is_special(token_id) and not self._keep_special:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._window.append(token_id)
        text = self._tokenizer.text(self._window, keep_special=True)
        # At most 4 tokens make one character in byte fallback; a longer wait is for bytes that never were UTF-8.
        if text.endswith("\ufffd") and len(self._window) - self._read <= 4:
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """What is still held back: U+FFFD for a character that never became whole, else nothing."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        return self._emit(self._tokenizer.text(self._window, keep_special=True)) if self._window else ""

    def _emit(self, text: str) -> str:
        piece = text[self._shown :]
        # The ids shown last stay as context, because such decoders treat the first token of a text differently.
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._shown = len(self._tokenizer.text(self._window, keep_special=True))
        return piece
