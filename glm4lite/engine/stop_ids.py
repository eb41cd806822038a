"""The ids that end an answer."""

from __future__ import annotations

from typing import Any

from glm4lite.base.errors import ConfigError
from glm4lite.model.config import Glm4Config
from glm4lite.text.tokenizer import Tokenizer


def stop_ids(config: Glm4Config, generation_config: dict[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """The union of what config.json and generation_config.json name and the tokenizer's (GLM's own included).

    GLM-4 ends an answer with <|user|> and calls with <|observation|>; released configs name one or all of them.
    """
    given = generation_config.get("eos_token_id")
    listed = given if isinstance(given, list) else [] if given is None else [given]
    wrong = [token for token in listed if not isinstance(token, int)]
    if wrong:
        raise ConfigError(f"generation_config.json: eos_token_id must be whole numbers, found {str(wrong[0])[:40]!r}")
    ids = [*config.eos_token_ids, *listed, *tokenizer.stop_ids]
    return frozenset(token for token in ids if 0 <= token < config.vocab_size)
