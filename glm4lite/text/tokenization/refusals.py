"""What Transformers' tokenizers take and ours does not: said by name, with the reason."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from glm4lite.base.errors import TokenizerError, unknown_name

# Argument -> the values that ask for nothing, and why others are refused.
Refused = Mapping[str, tuple[tuple[Any, ...], str]]

LOADING: Refused = {
    "trust_remote_code": ((None, False), "no code of a checkpoint is run"),
    "use_fast": ((None, True), "there is only the one that reads tokenizer.json"),
    "backend": ((None, "tokenizers"), "there is only the one that reads tokenizer.json"),
    "from_slow": ((None, False), "there is only the one that reads tokenizer.json"),
    "legacy": ((None,), "tokenizer.json says it all"),
    "tokenizer_type": ((None,), "tokenizer.json says it all"),
    "config": ((None,), "the tokenizer's own files say it all"),
    "gguf_file": ((None,), "give the file itself where a model is loaded"),
    "add_bos_token": ((None, False), "what is put around a text is said in tokenizer.json"),
    "add_eos_token": ((None, False), "what is put around a text is said in tokenizer.json"),
    "add_prefix_space": ((None, False), "tokenizer.json says it all"),
    "proxies": ((None,), "set HTTPS_PROXY in the environment"),
    "mirror": ((None,), "set HF_ENDPOINT in the environment"),
    "use_auth_token": ((None,), "its name is token"),
}
ENCODING: Refused = {
    "max_target_length": ((None,), "give max_length, or tokenize the targets in a call of their own"),
    "return_input_ids": ((None, True), "they are always returned"),
    "sanitize_control_tokens": ((None, False), "it is apply_chat_template's; split_special_tokens=True is a text's"),
}
DECODING: Refused = {
    "spaces_between_special_tokens": ((None, False), "text is put together as it was cut"),
    "use_source_tokenizer": ((None, False), "there is only one vocabulary"),
    "group_tokens": ((None,), "GLM's tokens are not grouped"),
}
SAVING: Refused = {
    "push_to_hub": ((None, False), "upload the folder with huggingface_hub's own command"),
    "legacy_format": ((None, False), "tokenizer.json is the only format"),
    "save_format": ((None, "hf"), "tokenizer.json is the only format"),
    "filename_prefix": ((None, ""), "no reader would find the files"),
    "repo_id": ((None,), "upload the folder with huggingface_hub's own command"),
    "token": ((None,), "nothing is uploaded"),
}
_GROWING = "a checkpoint's vocabulary is fixed; its tokens can be given names: tokenizer.pad_token = '<|endoftext|>'"
METHODS: Mapping[str, str] = {
    "add_tokens": _GROWING,
    "batch_encode_plus": "call the tokenizer itself: tokenizer(texts, ...)",
    "build_inputs_with_special_tokens": "call the tokenizer itself, or prepend the ids: tokenizer.prefix_ids + ids",
    "encode_plus": "call the tokenizer itself: tokenizer(text, ...)",
    "encode_message_with_chat_template": "give apply_chat_template the whole conversation",
    "parse_response": "glm4lite.ChatSession reads thoughts and calls out of answers",
    "prepare_for_model": "call the tokenizer itself: tokenizer(text, ...)",
    "push_to_hub": "upload the folder of save_pretrained with huggingface_hub's own command",
    "register_for_auto_class": "it is not one of Transformers' classes",
    "save_chat_templates": "save_pretrained writes it",
    "save_vocabulary": "save_pretrained writes it",
    "train_new_from_iterator": "train it with the tokenizers library",
}


def check(method: str, given: Mapping[str, Any], refused: Refused, known: Iterable[str]) -> None:
    """Nothing where all that is `given` asks for nothing; TokenizerError for the first that does, or is not known."""
    for name, value in given.items():
        if name not in refused:
            raise TokenizerError(unknown_name(method, name, [*known, *refused]))
        nothing, why = refused[name]
        if not any(value is one or (isinstance(value, str) and value == one) for one in nothing):
            raise TokenizerError(f"{method}: {name}={reprlib.repr(value)} is not supported: {why}")
