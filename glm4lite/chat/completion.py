"""Completion: raw continuation of a text, for base models and for looking at what a model says by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from glm4lite.base.events import Event, TextDelta
from glm4lite.engine.engine import SEPARATOR, Engine, Totals
from glm4lite.text.grammar import AnswerForm, Schema, checked_schema


class Completion:
    """Goes on from a text, without a chat template. `run` yields TextDelta events and, last, Done.

    for event in Completion(Engine.load("nano")).run("Once upon a time", max_new_tokens=20):
        print(event)
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._cancel = threading.Event()

    def stop(self) -> None:
        """Ends the running text; may be called from another thread or a signal handler."""
        self._cancel.set()

    def run(self, text: str, schema: Schema | None = None, **sampling: Any) -> Iterator[Event]:
        """Goes on from `text`; `sampling` are fields of SamplingParams, None where the checkpoint decides.

        schema: a JSON schema that what comes follows; stop texts are not looked for in it.

        Raises:
            ContextLengthError: The text leaves no room in the model's context.
            SamplingError: A field is out of range.
            SchemaError: Nothing can be held to the schema.
        """
        self._cancel.clear()
        params, constraint = self.engine.params(**sampling), None
        if schema is not None:
            params, constraint = params.uncut(), self.engine.constraint(AnswerForm(checked_schema(schema)))
        prompt = self.engine.tokenizer.prefix_ids + self.engine.tokenizer.ids(text)
        generation = self.engine.generate(prompt, params, cancel=self._cancel)
        generation.constraint = constraint
        yield from self.engine.prefill(generation)
        for piece in self.engine.pieces(generation):
            if piece != "":
                yield TextDelta(SEPARATOR if piece is None else piece)
        totals = Totals()
        totals.add(generation)
        yield totals.done(generation)
