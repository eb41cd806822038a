"""nano with words put in its mouth, at a speed one can stop it at."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

from glm4lite.engine import Engine


def slow_engine(nano: Engine, reply: str, seconds: float = 0.01) -> Engine:
    """An Engine that computes like nano but answers everything with `reply`, taking `seconds` more a token."""
    words = [*nano.tokenizer.encode(reply), nano.tokenizer.special["<|user|>"]]
    model, left = copy.copy(nano.model), list[int]()

    def told(ids: torch.Tensor, **named: Any) -> Any:
        output = nano.model(ids, **named)
        time.sleep(seconds)
        if ids.shape[1] > 1 or not left:
            left[:] = words
        output.logits = torch.zeros_like(output.logits)
        output.logits[0, -1, left.pop(0)] = 1
        return output

    model.forward = told  # type: ignore[method-assign, assignment]
    return Engine(model, nano.tokenizer, nano.template, {"do_sample": False})
