"""Several sequences in one pass: each has the logits that it has alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4lite import Glm4ForCausalLM, load
from glm4lite.model.step import Span
from glm4lite.runtime.fused import FusedLayers
from glm4lite_quant.kernels import decoder, native
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint
from tests.glm4lite.company import alone, company, random_prompts

HAVE = native._library()


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in HAVE.isas:
        pytest.skip(f"this host has no {request.param}" if HAVE.cdll else f"no native library: {HAVE.problem}")
    monkeypatch.setenv("GLM4LITE_ISA", request.param)
    return str(request.param)


@pytest.mark.parametrize("kv", ["float", "int8"])
def test_natively_each_sequence_has_the_bits_it_has_alone(isa: str, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("nano", quant="int4", device="cpu", kv=kv)
    for count, longest, seed in ((1, 700, 1), (3, 90, 2), (12, 60, 3)):
        prompts = random_prompts(model, count, longest, seed)
        monkeypatch.setenv("GLM4LITE_THREADS", "1")
        wanted = alone(model, prompts)
        monkeypatch.setenv("GLM4LITE_THREADS", "2")
        for number, rows, logits in company(model, prompts, seed):
            assert torch.equal(logits, wanted[number][rows])


@pytest.mark.parametrize("kv", ["float", "int8"])
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_in_torch_each_sequence_has_the_numbers_it_has_alone(
    tmp_path: Path, quant: str, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedLayers, "run", lambda *_: None)
    folder = write_checkpoint(tmp_path / "tiny", tiny_config())
    model = load(folder, quant=quant, device="cpu", dtype="float32", kv=kv)
    tolerance = 1e-4 if (quant, kv) == ("none", "float") else 0.05  # a code next to a half may round either way
    for count, longest, seed in ((1, 200, 1), (3, 90, 2), (12, 60, 3)):
        prompts = random_prompts(model, count, longest, seed)
        wanted = alone(model, prompts)
        for number, rows, logits in company(model, prompts, seed):
            expected = wanted[number][rows]
            assert float((logits - expected).norm()) <= tolerance * float(expected.norm())
            if tolerance < 1e-3:
                assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_layers_of_several_types_take_part(tmp_path: Path) -> None:
    """As with layers on a CPU and a GPU: some compute in float32, the others in the model's bfloat16."""
    folder = write_checkpoint(tmp_path / "tiny", tiny_config(num_hidden_layers=4))
    model = load(folder, quant="none", device="cpu", dtype="bfloat16")
    for layer in list(model.model.layers)[::2]:
        layer.float().dtype = torch.float32
    prompts = random_prompts(model, 4, 50, seed=5)
    wanted = alone(model, prompts)
    for number, rows, logits in company(model, prompts, seed=5):
        assert float((logits - wanted[number][rows]).norm()) <= 0.02 * float(wanted[number][rows].norm())


def test_all_rows_go_through_a_layer_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = load("nano", quant="int4", device="cpu"), []
    if native.backend() is None:
        pytest.skip(native.status())
    run = decoder.run

    def counted(kernels: Any, spans: Any, *rest: Any) -> None:
        calls.append((len(kernels), [span.rows for span in spans]))
        run(kernels, spans, *rest)

    monkeypatch.setattr(decoder, "run", counted)
    model.step([Span([1], model.new_cache()) for _ in range(8)])
    model.step([Span([1] * rows, model.new_cache()) for rows in (1, 40)])
    assert calls == [(5, [1] * 8), *[(1, [1, 40])] * 5]


def test_the_head_computes_the_wanted_rows_of_all_in_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = load("nano", quant="int4", device="cpu"), []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(list(inputs[0].shape)))
    first, second, third = model.step(
        [Span([1, 2, 3], model.new_cache(), 0), Span([4, 5, 6], model.new_cache(), 2), Span([7], model.new_cache())]
    )
    assert seen == [[3, model.config.hidden_size]]
    assert [len(logits) for logits in (first, second, third)] == [0, 2, 1]


@pytest.mark.parametrize("rows", [(20, 1), (20,)])
def test_a_step_can_be_stopped_between_the_layers_and_begun_anew(rows: tuple[int, ...]) -> None:
    model = load("nano", quant="int4", device="cpu")
    prompts, passed = [[5] * count for count in rows], threading.Event()
    wanted = alone(model, prompts)
    caches = [model.new_cache() for _ in rows]

    def stop_at_the_second() -> None:
        if passed.is_set():
            raise InterruptedError
        passed.set()

    model.model.interrupt = stop_at_the_second
    with pytest.raises(InterruptedError):
        model.step([Span(ids, cache) for ids, cache in zip(prompts, caches, strict=True)])
    model.model.interrupt = None
    assert [cache.layers[0].length for cache in caches] == list(rows)
    assert [cache.get_seq_length() for cache in caches] == [0] * len(rows)
    for cache in caches:
        cache.truncate(0)
    again = model.step([Span(ids, cache) for ids, cache in zip(prompts, caches, strict=True)])
    for logits, expected in zip(again, wanted, strict=True):
        torch.testing.assert_close(logits, expected[-1:])


def test_what_is_no_step_is_refused_before_anything_is_computed(nano: Glm4ForCausalLM) -> None:
    cache = nano.new_cache()
    with pytest.raises(ValueError, match="a span has no ids"):
        nano.step([Span([1], cache), Span([], nano.new_cache())])
    with pytest.raises(ValueError, match="two spans of a step share a cache"):
        nano.step([Span([1], cache), Span([2], cache)])
    with pytest.raises(ValueError, match="kept"):
        nano.step([Span([1], cache, 2)])
    assert nano.step([]) == []
    assert cache.get_seq_length() == 0


@pytest.fixture(scope="module")
def nano() -> Glm4ForCausalLM:
    return load("nano", quant="int4", device="cpu")
