"""ForcedCall: makes an output begin with a call of one of some tools, as GLM-4 writes it: `name\\n{json}`.

The model chooses among the names and writes the arguments; each token it draws that would lead out of the form is
replaced by the likeliest one that does not. Behind the closing brace it may only end or, where several calls are
allowed, begin another part, which is free.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from glm4lite.text.json_prefix import JsonObject

if TYPE_CHECKING:
    from torch import Tensor

    from glm4lite.text.tokenizer import Tokenizer

_LIKELY = 256  # tokens tried in order of their logits before the shortest way on is taken


class ForcedCall:
    """The rule for one generation; ask it for every token, in order.

    `endings`: the ids that may follow the call, of which the first is taken when the model wants none of them.
    """

    def __init__(self, tokenizer: Tokenizer, names: Collection[str], endings: Sequence[int]) -> None:
        self._tokenizer, self._endings = tokenizer, list(endings)
        self._heads = [tokenizer.ids(f"{name}\n") for name in names]
        self._at = 0  # of the heads' ids
        self._arguments = JsonObject()
        self._free = False

    def __call__(self, drawn: int, logits: Tensor) -> int:
        """`drawn` where it is allowed, else another id; logits [V] are those it was drawn from."""
        if self._free:
            return drawn
        if any(len(head) > self._at for head in self._heads):
            return self._name(drawn, logits)
        if self._arguments.complete:
            self._free = True
            return drawn if drawn in self._endings else self._endings[0]
        return self._argument(drawn, logits)

    def _name(self, drawn: int, logits: Tensor) -> int:
        allowed = [head[self._at] for head in self._heads]
        token = drawn if drawn in allowed else max(allowed, key=lambda token: float(logits[token]))
        self._heads = [head for head in self._heads if head[self._at] == token]
        self._at += 1
        return token

    def _argument(self, drawn: int, logits: Tensor) -> int:
        if self._accept(drawn):
            return drawn
        for token in logits.topk(min(_LIKELY, len(logits))).indices.tolist():
            if self._accept(token):
                return int(token)
        token = self._tokenizer.ids(self._arguments.way_on())[0]
        self._accept(token)
        return token

    def _accept(self, token: int) -> bool:
        if self._tokenizer.is_special(token):
            return False
        written = self._tokenizer.token_bytes(token)
        place = self._arguments.then(written) if written else None
        if place is None:
            return False
        self._arguments = place
        return True
