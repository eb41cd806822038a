"""The byte-level BPE of `nano`, trained on generated dialogues.

The pieces are chosen so that copying does not depend on where a word stands: digits are single tokens, words carry no
leading space (a short list of function words does), each Chinese character stands alone, and the fixed text of a tool
declaration is a few long tokens. Every byte is in the vocabulary, so any text can be encoded.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)

FUNCTION_WORDS = [
    "the",
    "a",
    "an",
    "is",
    "are",
    "was",
    "be",
    "in",
    "of",
    "to",
    "for",
    "and",
    "or",
    "with",
    "on",
    "at",
    "by",
    "from",
    "now",
    "it",
    "I",
    "you",
    "can",
    "no",
    "not",
    "that",
    "this",
    "what",
    "how",
    "much",
    "many",
    "do",
    "did",
    "have",
    "has",
    "me",
    "my",
    "your",
    "as",
    "its",
    "into",
    "if",
    "so",
    "than",
    "then",
    "there",
    "will",
    "would",
    "could",
    "please",
    "use",
    "these",
    "using",
    "one",
    "any",
    "all",
    "about",
    "out",
    "up",
    "just",
    "only",
    "get",
    "give",
    "find",
    "show",
    "like",
    "want",
    "need",
    "know",
    "tell",
]

_PAD = "\n" + " " * 4
_PAD2, _PAD3, _PAD4 = (_PAD + " " * 4 * extra for extra in (1, 2, 3))
SCAFFOLD = (
    "\n# 可用工具\n\n## ",
    "\n在调用上述函数时，请使用 Json 格式表示调用的参数。",
    "{" + _PAD + '"name": "',
    '",' + _PAD + '"description": "',
    '",' + _PAD + '"parameters": {' + _PAD2 + '"type": "object",' + _PAD2 + '"properties": {' + _PAD3 + '"',
    '": {' + _PAD4 + '"type": "string",' + _PAD4 + '"description": "',
    '": {' + _PAD4 + '"type": "number",' + _PAD4 + '"description": "',
    '": {' + _PAD4 + '"type": "integer",' + _PAD4 + '"description": "',
    '"' + _PAD3 + "}," + _PAD3 + '"',
    '"' + _PAD3 + "}" + _PAD2 + "}," + _PAD2 + '"required": [' + _PAD3 + '"',
    '",' + _PAD3 + '"',
    '"' + _PAD2 + "]" + _PAD + "}\n}",
    '{"',
    '"}',
    '": "',
    '": ',
    '", "',
    ', "',
    "\n## ",
    "\n\n",
    " \n",
)


def _pattern() -> str:
    scaffold = "|".join(re.escape(piece) for piece in sorted(SCAFFOLD, key=len, reverse=True))
    function_words = "|".join(FUNCTION_WORDS)
    return "|".join(
        [
            scaffold,
            r"\d",
            rf" (?:{function_words})(?![A-Za-z])",
            r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[A-Z]",
            r"\p{Han}",
            r" [*+/=\-] ",
            r" ?\n+",
            r" +",
            r"[^\sA-Za-z0-9\p{Han}]",
            r"\s",
        ]
    )


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Splits text into the pieces described at the top of this file, then maps bytes to printable characters."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_pattern()), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _count_pieces(texts: Iterable[str]) -> collections.Counter[str]:
    split = pre_tokenizer()
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(piece for piece, _ in split.pre_tokenize_str(text))
    return counts


def _byte_text(text: str) -> str:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


def _is_word(piece: str) -> bool:
    return piece.isascii() and piece.isalpha()


def train(texts: Iterable[str], merges: int, size: int) -> Tokenizer:
    """A tokenizer with `size` base tokens: bytes, `merges` BPE merges, fixed pieces, then the most frequent pieces."""
    counts = _count_pieces(texts)
    words = {piece: count for piece, count in counts.items() if _is_word(piece)}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    # A square root flattens the counts: subword pieces should serve unseen names, not only the commonest words.
    bpe.train_from_iterator((" ".join([word] * max(1, round(count**0.5))) for word, count in words.items()), trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocab = dict(learned["vocab"])
    fixed = [_byte_text(piece) for piece in SCAFFOLD] + [_byte_text(" " + word) for word in FUNCTION_WORDS]
    frequent = [piece for piece, _ in counts.most_common()]
    for piece in [*fixed, *frequent]:
        if len(vocab) >= size:
            break
        vocab.setdefault(piece, len(vocab))
    model = models.BPE(vocab=vocab, merges=[tuple(merge) for merge in learned["merges"]], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, object]:
    """The tokenizer_config.json of the checkpoint, in the form of the 0414 models."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }
    return {
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": max_length,
        "padding_side": "left",
        "remove_space": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that has to be there; raises KeyError."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(f"the tokenizer has no token {token!r}")
    return int(found)


def word_pieces(tokenizer: Tokenizer) -> list[str]:
    """The tokens that are letters or Chinese characters, as text."""
    texts = [tokenizer.decode([index]) for index in range(tokenizer.get_vocab_size())]
    characters = {text for text in texts if len(text) == 1 and "\u4e00" <= text <= "\u9fff"}
    return sorted(characters.union(text for text in texts if text.isascii() and text.isalpha()))


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
