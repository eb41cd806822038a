"""A byte-level tokenizer with GLM-4's special tokens, made on the spot, and where the large rebuilt one lies."""

import functools
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from glm4lite.text.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "glm4"
SPECIALS = [
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
]
needs_shared = pytest.mark.skipif(
    not (SHARED / "tokenizer" / "tokenizer.json").is_file(), reason=f"no rebuilt GLM-4 tokenizer at {SHARED}"
)


def byte_backend(special: bool = True) -> tokenizers.Tokenizer:
    """About 300 byte-level tokens, then GLM-4's special tokens (declared as ordinary added ones if not `special`)."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=sorted(alphabet), show_progress=False)
    backend.train_from_iterator(["the assistant tells the user what the user asked 你好 北京"] * 3, trainer)
    (backend.add_special_tokens if special else backend.add_tokens)(list(SPECIALS))
    return backend


def byte_tokenizer() -> Tokenizer:
    """The above as glm4lite's Tokenizer."""
    return Tokenizer(byte_backend())


@functools.cache
def glm_tokenizer() -> Tokenizer:
    """The rebuilt tokenizer of the GLM-4 family (loading takes half a second, so it is shared)."""
    return Tokenizer.from_folder(SHARED / "tokenizer")
