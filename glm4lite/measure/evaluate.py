"""How good a model's predictions are on a text: perplexity, and how far they are from another model's or precision's.

As llama.cpp's perplexity tool does, the text is cut into windows of 512 tokens that do not overlap, and only the
second half of each is scored, so that every scored token has at least half a window before it. GLM's own prefix
`[gMASK]<sop>` stands in each window where the vocabulary has it. Figures of tools that do otherwise are not comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm4lite.base.errors import EvaluationError
from glm4lite.base.events import Progress
from glm4lite.engine.engine import Engine
from glm4lite.hub.sources import resolve

WINDOW = 512
SHORTEST = 32  # tokens of a text that is shorter than a window
ROWS = 32  # positions whose log-probabilities are in memory at once: 20 MB at GLM-4's vocabulary

ProgressCallback = Callable[[Progress], None]


@dataclass
class Samples:
    """One value per scored token."""

    values: list[Tensor] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return float(torch.cat(self.values).double().mean())

    @property
    def error(self) -> float:
        """Standard error of the mean, tokens taken as independent; 0 for a single one."""
        joined = torch.cat(self.values).double()
        return float(joined.std() / math.sqrt(len(joined))) if len(joined) > 1 else 0.0


@dataclass(frozen=True)
class Comparison:
    """Against the reference model: mean KL(reference || model) in nats, the share of tokens with the same most
    likely token, and the perplexities' difference; each with its standard error."""

    reference: str
    perplexity: float
    kl_divergence: float
    kl_divergence_error: float
    top1_agreement: float
    top1_agreement_error: float
    delta_perplexity: float
    delta_perplexity_error: float


@dataclass(frozen=True)
class Evaluation:
    """Perplexity over the scored tokens with its standard error, and the comparison where there was one."""

    model: str
    windows: int
    window_tokens: int
    scored_tokens: int
    prefix: str
    perplexity: float
    perplexity_error: float
    against: Comparison | None = None

    def to_json(self) -> dict[str, Any]:
        """One flat object, as `glm4lite eval --json` prints it."""
        values = {name: value for name, value in vars(self).items() if name != "against"}
        if self.against is not None:
            compared = dict(vars(self.against))
            values |= {"against": compared.pop("reference"), "against_perplexity": compared.pop("perplexity")}
            values |= compared
        return values

    def lines(self) -> Iterator[tuple[str, str]]:
        """The same for people."""
        yield "model", self.model
        half = f"{self.scored_tokens} tokens scored, the second half of each window"
        yield "windows", f"{self.windows} of {self.window_tokens} tokens, {half}"
        yield "prefix", self.prefix or "none: the tokenizer has no [gMASK] and <sop>"
        yield "perplexity", f"{self.perplexity:.4f} +- {self.perplexity_error:.4f}"
        if self.against is not None:
            other = self.against
            yield "against", f"{other.reference}, perplexity {other.perplexity:.4f}"
            yield "KL divergence", f"{other.kl_divergence:.6f} +- {other.kl_divergence_error:.6f} nats"
            yield "same top token", f"{other.top1_agreement:.2%} +- {other.top1_agreement_error:.2%}"
            yield "delta perplexity", f"{other.delta_perplexity:+.4f} +- {other.delta_perplexity_error:.4f}"


@dataclass(frozen=True)
class Choice:
    """A model to evaluate: where it is, how to load it (None: int4, or as it is stored), and with which adapters."""

    source: str
    quant: str | None = None
    dtype: str = "auto"
    lora: tuple[str, ...] = ()

    def load(self, progress: ProgressCallback | None) -> Engine:
        return Engine.load(self.source, self.quant or "auto", dtype=self.dtype, progress=progress, lora=self.lora)

    def __str__(self) -> str:
        named = " + ".join((self.source, *self.lora))
        return f"{named} ({self.quant})" if self.quant else named


def read_text(path: Path) -> str:
    """A UTF-8 text; EvaluationError where it cannot be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror or error}); give a text file") from None
    if not text.strip():
        raise EvaluationError(f"{path} is empty; give a text of some thousand words")
    return text


def evaluate(
    model: Choice,
    text: str,
    against: Choice | None = None,
    windows: int | None = None,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Evaluate a model on a text, and compare it with another one over the same tokens.

    Both models are loaded at once and go through the text window by window; no more than one window's logits of each
    are kept. `windows` bounds how many are used.

    Raises:
        Glm4liteError: what `load` raises; EvaluationError for a text that is too short, a number of windows below 1,
            or models whose vocabularies differ.
    """
    if windows is not None and windows < 1:
        raise EvaluationError(f"windows is {windows}; use at least 1")
    engine = model.load(progress)
    cut = cut_windows(engine, text)[:windows]
    other = None if against is None else _reference(engine, model, against, text, progress)
    scores = _Scores()
    for index, ids in enumerate(cut):
        logits = window_logits(engine, ids)
        targets = torch.tensor(ids[-len(logits) :], device=logits.device)
        scores.add(logits, targets, None if other is None else window_logits(other, ids))
        if progress is not None:
            progress(Progress("eval", index + 1, len(cut), "windows"))
    prefix = "".join(engine.tokenizer.text([i], keep_special=True) for i in engine.tokenizer.prefix_ids)
    perplexity = math.exp(scores.loss.mean)
    return Evaluation(
        str(model),
        len(cut),
        len(cut[0]),
        sum(len(value) for value in scores.loss.values),
        prefix,
        perplexity,
        perplexity * scores.loss.error,
        None if against is None else scores.comparison(str(against), perplexity),
    )


def _reference(engine: Engine, model: Choice, against: Choice, text: str, progress: ProgressCallback | None) -> Engine:
    same_place = resolve(against.source) == resolve(model.source)
    if same_place and (against.quant, against.dtype) == (model.quant, model.dtype):
        return engine
    other = against.load(progress)
    mine, theirs = engine.model.config.vocab_size, other.model.config.vocab_size
    if mine != theirs:
        raise EvaluationError(
            f"{model.source} has a vocabulary of {mine} and {against.source} one of {theirs}; "
            "only models of the same vocabulary can be compared"
        )
    if not same_place and _ids(engine, text[:10000]) != _ids(other, text[:10000]):
        raise EvaluationError(
            f"{model.source} and {against.source} cut the text into different tokens; "
            "only models of the same vocabulary can be compared"
        )
    return other


def _ids(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer.prefix_ids + engine.tokenizer.ids(text)


def cut_windows(engine: Engine, text: str) -> list[list[int]]:
    """Windows of prefix and text, without overlap; what is left after the last whole one is not used.

    A text shorter than a window is one shorter window. Raises EvaluationError where even that is too little.
    """
    prefix, ids = engine.tokenizer.prefix_ids, engine.tokenizer.ids(text)
    window = min(WINDOW, engine.model.config.context_length)
    body = window - len(prefix)
    if len(ids) < min(SHORTEST, body):
        raise EvaluationError(f"the text has {len(ids)} tokens; at least {min(SHORTEST, body)} are needed")
    starts = range(0, max(1, len(ids) - body + 1), body)
    return [prefix + ids[start : start + body] for start in starts]


@torch.inference_mode()
def window_logits(engine: Engine, ids: list[int]) -> Tensor:
    """[T, vocab_size]: what predicts each token of the second half; row i belongs to ids[len(ids) // 2 + i]."""
    first = len(ids) // 2
    keep = torch.arange(first - 1, len(ids) - 1, device=engine.model.device)
    output = engine.model(torch.tensor([ids], device=engine.model.device), logits_to_keep=keep)
    logits: Tensor = output.logits[0]
    return logits


class _Scores:
    """What is kept of each scored token."""

    def __init__(self) -> None:
        self.loss, self.other_loss = Samples(), Samples()
        self.divergence, self.agreement = Samples(), Samples()

    def add(self, logits: Tensor, targets: Tensor, other: Tensor | None) -> None:
        """logits [T, vocab_size] of the model and of the reference, targets [T]."""
        for start in range(0, len(targets), ROWS):
            rows = slice(start, start + ROWS)
            mine, wanted = logits[rows].float().log_softmax(-1), targets[rows, None]
            self.loss.values.append(-mine.gather(1, wanted)[:, 0].cpu())
            if other is None:
                continue
            theirs = other[rows].float().log_softmax(-1)
            self.other_loss.values.append(-theirs.gather(1, wanted)[:, 0].cpu())
            self.divergence.values.append((theirs.exp() * (theirs - mine)).sum(-1).cpu())
            self.agreement.values.append((mine.argmax(-1) == theirs.argmax(-1)).double().cpu())

    def comparison(self, reference: str, perplexity: float) -> Comparison:
        other = math.exp(self.other_loss.mean)
        # To first order the perplexities' difference is the mean of this: what both find hard cancels out.
        paired = [perplexity * a - other * b for a, b in zip(self.loss.values, self.other_loss.values, strict=True)]
        return Comparison(
            reference,
            other,
            self.divergence.mean,
            self.divergence.error,
            self.agreement.mean,
            self.agreement.error,
            perplexity - other,
            Samples(paired).error,
        )
