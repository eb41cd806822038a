"""Constraint: which ids may come next in one answer, by a grammar (`glm4lite.text.grammar`).

llguidance follows the grammar (an Earley parser over a lexer of derivatives) and says in well under a millisecond
which of 151,552 ids may come. The others are masked before one is drawn, so that probabilities are those of what can be
said; ids that alone can come are taken without asking the model. Source: https://github.com/guidance-ai/llguidance.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from glm4lite.base.errors import SchemaError, one_line
from glm4lite.text.grammar import ANY_OBJECT, AnswerForm, ToolForm

if TYPE_CHECKING:
    from torch import Tensor

    from glm4lite.text.tokenization.codec import Codec

KEPT = 16  # compiled grammars: those of the last conversations' tools and schemas
# Bounds of what a stranger's schema may cost; the usual one takes a thousandth. Time follows the fuel (50,000 or 14,000
# units a millisecond), memory the states (1 to 2 KB each).
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 2_000_000,
    "step_lexer_fuel": 400_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class Constraint:
    """The state of one answer. Belongs to the thread that steps it."""

    def __init__(self, matcher: Any, words: int, loosened: tuple[str, ...] = ()) -> None:
        """`words`: of 32 bits, of a mask; `loosened`: tools whose arguments may be any object."""
        self._matcher, self._words, self.loosened = matcher, words, loosened

    def copy(self, loosened: tuple[str, ...] | None = None) -> Constraint:
        """Another answer, which goes on from here."""
        return Constraint(self._matcher.deep_copy(), self._words, self.loosened if loosened is None else loosened)

    def masked(self, logits: Tensor, ends: Collection[int] = ()) -> Tensor:
        """logits [V] with -inf for what may not come. Raises SchemaError where nothing may.

        ends: ids that end the answer beside the model's own; they may come where it may end.
        """
        import torch

        rows = self._bits().view(torch.uint8).to(logits.device)
        allowed = (rows[:, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device)) & 1
        forbidden = allowed.view(-1)[: len(logits)] == 0
        if ends and self._matcher.is_accepting():
            forbidden[[token for token in ends if token < len(logits)]] = False
        return logits.masked_fill(forbidden, float("-inf"))

    def _bits(self) -> Tensor:
        """One bit for each id, in words of 32."""
        import torch

        bits = torch.empty(self._words, dtype=torch.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.data_ptr(), 4 * self._words)
        self._check()
        if not bits.any():
            raise SchemaError("the answer cannot go on: its schema leaves nothing that could come next")
        return bits

    def check(self, begin: Sequence[int] = ()) -> None:
        """Raises SchemaError where nothing may come behind these."""
        after = self.copy()
        after.accept(begin)
        if not after.complete:
            after._bits()

    def accept(self, ids: Sequence[int]) -> None:
        """These came. Raises SchemaError where they may not."""
        self._matcher.consume_tokens(list(ids))
        self._check()

    def forced(self) -> list[int]:
        """The ids that come now whatever is drawn, as far as that is certain."""
        ids: list[int] = self._matcher.compute_ff_tokens()
        return ids

    def fitting(self, ids: Sequence[int]) -> int:
        """How many of these may come, one behind the other."""
        count: int = self._matcher.validate_tokens(list(ids))
        return count

    @property
    def complete(self) -> bool:
        """Whether nothing more may come."""
        stopped: bool = self._matcher.is_stopped()
        return stopped

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SchemaError(f"the answer cannot go on as its schema wants: {_said(self._matcher.get_error())}")


class Grammars:
    """Makes constraints for one vocabulary, for any thread. What they share is made with the first one: it takes 25 MB,
    and for 151,552 ids a second or two.
    """

    def __init__(self, tokenizer: Codec, stop_ids: Collection[int], separator: int | None) -> None:
        """`separator`: the id between two parts of an answer, where the vocabulary has one."""
        self._tokenizer, self._stop_ids, self._separator = tokenizer, sorted(stop_ids), separator
        self._vocabulary: Any = None
        self._kept: OrderedDict[str, Constraint] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, form: AnswerForm) -> Constraint:
        """For one answer of that form.

        Arguments of a tool that is not strict, and whose schema cannot be held, may be any object; the constraint's
        `loosened` names it. Raises SchemaError, in llguidance's words, for any other schema it does not hold.
        """
        grammar = form.grammar(self._separator)
        with self._lock:
            if grammar not in self._kept:
                self._kept[grammar] = self._made(form)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(grammar)
            return self._kept[grammar].copy()

    def _made(self, form: AnswerForm) -> Constraint:
        """Each schema is looked at alone first: one that nothing follows would be found in the middle of an answer."""
        if form.schema is not None:
            self._try("the schema", AnswerForm(form.schema), "\n")
        tools = tuple(map(self._possible, form.tools))
        loosened = tuple(tool.name for tool, was in zip(tools, form.tools, strict=True) if tool is not was)
        return self._compiled(replace(form, tools=tools)).copy(loosened)

    def _possible(self, tool: ToolForm) -> ToolForm:
        """The tool, whose arguments may be any object where its schema is refused and it is not strict."""
        try:
            form = AnswerForm(tools=(tool,), must_call=(tool.name,), parallel=False)
            self._try(f"tool {tool.name!r}", form, f"{tool.name}\n")
        except SchemaError:
            if tool.strict:
                raise
            return replace(tool, schema=ANY_OBJECT)
        return tool

    def _try(self, what: str, form: AnswerForm, begin: str = "") -> None:
        """Raises SchemaError where that form cannot be held, or nothing may come behind `begin`."""
        try:
            self._compiled(form).check(self._tokenizer.ids(begin))
        except SchemaError as error:
            raise SchemaError(f"{what} cannot be held: {error}") from None

    def _compiled(self, form: AnswerForm) -> Constraint:
        from llguidance import LLMatcher, LLParserLimits

        if self._vocabulary is None:
            self._vocabulary = _vocabulary(self._tokenizer, self._stop_ids)
        grammar, limits = LLMatcher.grammar_from_lark(form.grammar(self._separator)), LLParserLimits(**_LIMITS)
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise SchemaError(_said(matcher.get_error()))
        return Constraint(matcher, (self._vocabulary.vocab_size + 31) // 32)


class _Vocabulary:
    """A tokenizer in the form that llguidance asks for."""

    def __init__(self, tokenizer: Codec, eos: int) -> None:
        """`eos`: one of the tokenizer's ids, or the one behind them, which no logits have."""
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = eos, None
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.size)]
        self.tokens += [b"<end>"] * (eos == tokenizer.size)
        self.special_token_ids = sorted({*tokenizer.special.values(), eos})

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.ids(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def _vocabulary(tokenizer: Codec, stop_ids: list[int]) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    if not tokenizer.byte_level:
        raise SchemaError("this model's tokenizer is not byte-level, so answers cannot be held to a schema")
    ends = stop_ids or [tokenizer.size]
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, ends[0])), eos_token=ends)


def _said(error: str) -> str:
    """What is wrong, without the grammar that llguidance shows around it."""
    said = re.split(r"^ *\d+ \| ", error, maxsplit=1, flags=re.MULTILINE)[0]
    return one_line(re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", said), 400)
