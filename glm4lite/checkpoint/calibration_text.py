"""The token ids a model is calibrated with: a text of one's own, the one that comes with the package, or random ids.

The package's text is English and Chinese prose, code, and chats with tool calls in GLM-4's own format. Where there is
no tokenizer, random ids give nine tenths of the gain: what the inputs of a layer have in common lies in the model.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glm4lite.base.errors import CheckpointError, ConfigError
from glm4lite.base.files import TOKENIZER
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.model.config import Glm4Config
from glm4lite.text.tokenizer import Tokenizer
from glm4lite_quant import Calibration

logger = logging.getLogger("glm4lite")

TOKENS = 4096
WINDOW = 512
BUNDLED = Path(__file__).with_name("calibration.txt")


@dataclass(frozen=True)
class CalibrationIds:
    """Windows of ids [W, T], each a text of its own, and the record of where they are from."""

    ids: Tensor
    record: Calibration


def read_text(path: Path) -> str:
    """A calibration file; ConfigError where it cannot be read, is empty or is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"the calibration text {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the calibration text {path} is not UTF-8; convert it first") from None
    if not text.strip():
        raise ConfigError(f"the calibration text {path} is empty; give one of a few thousand words")
    return text


def calibration_ids(checkpoint: Checkpoint, config: Glm4Config, text: str | None) -> CalibrationIds:
    """At most TOKENS ids of `text` (None: the package's own) for this checkpoint.

    Raises:
        CheckpointError: a text is given, but the checkpoint has no tokenizer for it.
    """
    window = min(WINDOW, config.context_length)
    try:
        tokenizer = _tokenizer(checkpoint, config)
    except CheckpointError as error:
        if text is not None:
            raise CheckpointError(f"the calibration text cannot be used: {error}") from None
        logger.warning("calibrated with random token ids: %s", error)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (max(1, TOKENS // window), window), generator=generator)
        return CalibrationIds(ids, Calibration(ids.numel(), "random ids: no usable tokenizer.json"))
    content = read_text(BUNDLED) if text is None else text
    ids = _windows(tokenizer.ids(content, special=True), tokenizer.prefix_ids, window)
    digest = hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()
    return CalibrationIds(ids, Calibration(ids.numel(), f"sha256:{digest}"))


def _tokenizer(checkpoint: Checkpoint, config: Glm4Config) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    if tokenizer.size > config.vocab_size:
        path = checkpoint.folder / TOKENIZER
        raise CheckpointError(f"{path} has {tokenizer.size} tokens, more than config.json's {config.vocab_size}")
    return tokenizer


def _windows(ids: list[int], prefix: list[int], window: int) -> Tensor:
    """[W, T]: windows spread evenly over a text that is longer than TOKENS, each begun with the prefix."""
    size = min(window - len(prefix), len(ids))
    if size < 1:
        raise ConfigError("the calibration text and the model's context leave no token to calibrate with")
    count = len(ids) // size
    kept = max(1, min(count, TOKENS // (size + len(prefix))))
    starts = [number * count // kept * size for number in range(kept)]
    return torch.tensor([prefix + ids[start : start + size] for start in starts])
