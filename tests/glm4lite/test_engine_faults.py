"""What goes wrong in one place stays there: whoever is stopped, fails or leaves, the engine goes on for the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import Engine
from glm4lite.engine.sampling import SamplingParams
from glm4lite_quant.kernels import native

T = TypeVar("T")

PARAMS = SamplingParams(temperature=0, max_new_tokens=8)

pytestmark = pytest.mark.skipif(native.backend() is None, reason=f"no native library: {native.status()}")


@pytest.fixture
def engine() -> Engine:
    return Engine.load("nano", quant="int4", device="cpu", speculate="off")


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` gives, in a thread that may hang."""
    found = list[T]()
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"nothing came within {seconds} s"
    return found[0]


def test_an_answer_that_is_stopped_before_or_between_its_steps_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel = threading.Event()
    cancel.set()
    before = engine.generate([30, 31, 32], PARAMS, cancel)
    assert within(20, lambda: list(before.prefill())) == []
    assert (list(before), before.finish_reason) == ([], "cancelled")
    monkeypatch.setattr(type(engine.model), "chunk", 16)
    between = engine.generate([*range(20, 90)], PARAMS, threading.Event())

    def stopped_at_the_first_part() -> int:
        for _ in between.prefill():
            between.cancel.set()
        return len(list(between))

    assert within(20, stopped_at_the_first_part) == 0
    assert between.finish_reason == "cancelled"
    assert not engine.scheduler.busy
