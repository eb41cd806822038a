"""A token's way through a GPU's layers, recorded and replayed: the torch code's numbers, and eager where it cannot.

Where there is no GPU the recording is that of tests.glm4lite.recorder, and Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm4lite import Glm4ForCausalLM, SamplingParams, load
from glm4lite.base.errors import ConfigError
from glm4lite.engine.decoding import Generation
from glm4lite.engine.prefix_pool import PrefixCache
from glm4lite.model.layer_cache import LayerCache
from glm4lite.runtime import cuda_graph
from glm4lite.runtime.cuda_graph import StepGraphs
from glm4lite.runtime.runner import FastRunner
from glm4lite_quant.kernels.picking import REFERENCE
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint

pytest.importorskip("triton", reason="triton is not installed: recorded decoding is not tested")
CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set (tests/conftest.py does)", allow_module_level=True)

from tests.glm4lite.recorder import Recorder, recorded  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
IDS = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(5))
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
CONFIGS: dict[str, dict[str, Any]] = {
    "9B": {"num_attention_heads": 8},
    "32B": {"num_attention_heads": 6, "attention_bias": False},
    "glm": {"model_type": "glm", "architectures": ["GlmForCausalLM"], "partial_rotary_factor": 1.0},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("graph")
    return {name: write_checkpoint(root / name, tiny_config(**changes)) for name, changes in CONFIGS.items()}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return recorded(monkeypatch)


def model_of(folder: Path, dtype: torch.dtype, quant: str | None = None, kv: str = "float") -> Glm4ForCausalLM:
    return load(folder, quant, device=DEVICE, dtype=dtype, kv=kv)


def logits_of(model: Glm4ForCausalLM, pieces: list[int], ids: Tensor = IDS) -> Tensor:
    """Of a prompt that comes in pieces of so many tokens."""
    with torch.inference_mode():
        cache = model.new_cache()
        parts = ids[:, : sum(pieces)].to(DEVICE).split(pieces, dim=1)
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1).float()


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def eagerly(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr(StepGraphs, "run", lambda *_: None)
        return work()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("9B", torch.float32),
        ("9B", torch.bfloat16),
        pytest.param("32B", torch.bfloat16, marks=pytest.mark.slow),
        ("glm", torch.float32),
    ],
    ids=str,
)
def test_replayed_tokens_have_the_torch_codes_numbers(
    folders: dict[str, Path], recorder: Recorder, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    model, pieces = model_of(folders[name], dtype), [12, 1, 1, 2, 1, 1, 1]
    got = logits_of(model, pieces)
    want = eagerly(monkeypatch, lambda: logits_of(model, pieces))
    assert distance(got, want) < TOLERANCE[dtype]
    if not CUDA:
        assert recorder.recordings == 2  # the cache grew once, from 16 to 32 tokens
        assert recorder.replays == pieces.count(1)


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_quantized_layers_are_recorded(
    folders: dict[str, Path], recorder: Recorder, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    if not CUDA:  # Triton's products take a minute in the interpreter
        monkeypatch.setattr("glm4lite_quant.linear.pick", lambda weight: REFERENCE)
    model = model_of(folders["9B"], torch.bfloat16, quant)
    got = logits_of(model, [4, 1, 1, 1])
    assert distance(got, eagerly(monkeypatch, lambda: logits_of(model, [4, 1, 1, 1]))) < TOLERANCE[torch.bfloat16]
    assert CUDA or recorder.replays == 3


def test_an_int8_cache_is_recorded_too(
    folders: dict[str, Path], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pieces = model_of(folders["9B"], torch.float32, kv="int8"), [14, 1, 1, 1, 1]
    got = logits_of(model, pieces)
    assert distance(got, eagerly(monkeypatch, lambda: logits_of(model, pieces))) < 2e-5
    assert CUDA or recorder.replays == 4


def test_generating_is_the_same_recorded_and_eager(
    folders: dict[str, Path], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = model_of(folders["9B"], torch.float32), SamplingParams(temperature=0, max_new_tokens=6)
    got = list(Generation(model, IDS[0, :13].tolist(), params))
    assert got == eagerly(monkeypatch, lambda: list(Generation(model, IDS[0, :13].tolist(), params)))
    assert len(got) == 6


def test_two_conversations_in_turn_do_not_mix(
    folders: dict[str, Path], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(folders["9B"], torch.float32)
    others = [IDS[:, :4], IDS[:, 4:8]]

    def in_turn() -> list[Tensor]:
        with torch.inference_mode():
            caches, found = [model.new_cache() for _ in others], []
            for at in range(3):
                for ids, cache in zip(others, caches, strict=True):
                    found.append(model(ids[:, at : at + 1].to(DEVICE), past_key_values=cache).logits)
            return found

    for got, want in zip(in_turn(), eagerly(monkeypatch, in_turn), strict=True):
        assert distance(got, want) < TOLERANCE[torch.float32]


def test_a_cache_that_was_cut_back_is_gone_on_from(
    folders: dict[str, Path], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = model_of(folders["9B"], torch.float32), SamplingParams(temperature=0, max_new_tokens=4)

    def twice() -> list[int]:
        cache, prompt = PrefixCache(model.new_cache()), IDS[0, :9].tolist()
        list(Generation(model, prompt, params, cache=cache))
        return list(Generation(model, [*prompt[:6], 7], params, cache=cache))

    assert twice() == eagerly(monkeypatch, twice)


def test_weights_that_moved_are_noticed(
    folders: dict[str, Path], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(folders["9B"], torch.float32)
    logits_of(model, [4, 1, 1])
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight.detach() * 2, requires_grad=False)
    got = logits_of(model, [4, 1, 1])
    assert distance(got, eagerly(monkeypatch, lambda: logits_of(model, [4, 1, 1]))) < TOLERANCE[torch.float32]
    assert distance(logits_of(copy.deepcopy(model), [4, 1, 1]), got) < TOLERANCE[torch.float32]


def test_where_nothing_can_be_recorded_the_reason_is_said_once(
    folders: dict[str, Path], recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(folders["9B"], torch.float32)
    want = eagerly(monkeypatch, lambda: logits_of(model, [4, 1, 1]))
    monkeypatch.setattr("glm4lite_quant.kernels.gpu.problem", lambda name, device: "triton is not here")
    with caplog.at_level(logging.WARNING, "glm4lite"):
        assert torch.equal(logits_of(model, [4, 1, 1]), want)
        logits_of(model, [4, 1, 1])
    (said,) = caplog.records
    assert said.message.endswith("without a CUDA graph, which is slower: triton is not here")
    assert isinstance(model.model.runner, FastRunner)
    assert model.model.runner.graphs.reason(model.model.layers[0]) == "triton is not here"


def test_a_layer_that_asks_the_gpu_for_a_number_is_not_recorded(
    folders: dict[str, Path], recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Asking(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) != 1e30 else x

    model = model_of(folders["9B"], torch.float32)
    want = eagerly(monkeypatch, lambda: logits_of(model, [4, 1, 1]))
    for layer in model.model.layers:
        layer.self_attn.o_proj.__class__ = Asking
    with caplog.at_level(logging.WARNING, "glm4lite"):
        assert distance(logits_of(model, [4, 1, 1]), want) < TOLERANCE[torch.float32]
    assert "captur" in caplog.text


def test_it_can_be_switched_off(folders: dict[str, Path], recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(folders["9B"], torch.float32)
    monkeypatch.setenv("GLM4LITE_GPU_DECODE", "eager")
    logits_of(model, [4, 1])
    assert recorder.recordings == 0
    assert cuda_graph.status(torch.device(DEVICE)) == "eager: GLM4LITE_GPU_DECODE=eager is set"
    monkeypatch.setenv("GLM4LITE_GPU_DECODE", "fast")
    with pytest.raises(ConfigError, match="GLM4LITE_GPU_DECODE is 'fast'; use graph or eager"):
        load(folders["9B"])


def test_gradients_hooks_and_hidden_states_take_the_torch_code(folders: dict[str, Path], recorder: Recorder) -> None:
    model = model_of(folders["9B"], torch.float32)
    cache = model.new_cache()
    with torch.inference_mode():
        model(IDS[:, :4].to(DEVICE), past_key_values=cache)
        model(IDS[:, 4:5].to(DEVICE), past_key_values=cache, output_hidden_states=True)
        handle = model.model.layers[1].register_forward_hook(lambda *_: None)
        model(IDS[:, 5:6].to(DEVICE), past_key_values=cache)
        handle.remove()
    assert recorder.recordings == 0


def stopped_in_mid_pass(model: Glm4ForCausalLM, cache: PrefixCache, prompt: list[int]) -> None:
    cancel = threading.Event()
    handle = model.model.layers[0].register_forward_hook(lambda *_: cancel.set())
    assert list(Generation(model, prompt, SamplingParams(temperature=0), cache=cache, cancel=cancel)) == []
    handle.remove()


def test_layers_whose_caches_have_grown_unequally_are_not_written_beyond_their_end(
    folders: dict[str, Path], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = model_of(folders["9B"], torch.float32), SamplingParams(temperature=0, max_new_tokens=6)

    def after_a_stop() -> list[int]:
        cache = PrefixCache(model.new_cache())
        stopped_in_mid_pass(model, cache, IDS[0].tolist())  # the first layer's cache has grown, the second's has not
        return list(Generation(model, IDS[0, :13].tolist(), params, cache=cache))

    assert after_a_stop() == eagerly(monkeypatch, after_a_stop)


def test_a_new_conversation_of_one_token_does_not_take_a_forgotten_ones_memory(
    folders: dict[str, Path], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(folders["9B"], torch.float32)
    logits_of(model, [4, 1, 1])
    before = recorder.recordings
    got = logits_of(model, [1] * 6)
    assert CUDA or recorder.recordings == before + 1
    assert distance(got, eagerly(monkeypatch, lambda: logits_of(model, [1] * 6))) < TOLERANCE[torch.float32]


def test_memory_that_runs_out_while_a_cache_grows_leaves_it_as_it_was(
    folders: dict[str, Path], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = model_of(folders["9B"], torch.float32), LayerCache()
    for new in (torch.ones(1, 2, 9, 16), torch.ones(1, 2, 1, 16)):
        cache.append(new, new)
    real, calls = LayerCache._reserved, []

    def reserved(cache: LayerCache, buffer: Tensor | None, like: Tensor, end: int) -> Tensor:
        calls.append(end)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(cache, buffer, like, end)

    keys, values = cache.keys, cache.values
    with monkeypatch.context() as patched:
        patched.setattr(LayerCache, "_reserved", reserved)
        with pytest.raises(torch.OutOfMemoryError):
            cache.view(30, model.model.layers[0].self_attn.heads, torch.device("cpu"), torch.float32)
    assert cache.keys is keys
    assert cache.values is values


def test_a_script_may_change_between_inference_mode_and_no_grad(folders: dict[str, Path], recorder: Recorder) -> None:
    model = model_of(folders["9B"], torch.float32)
    cache = model.new_cache()
    ids = IDS.to(DEVICE)
    with torch.inference_mode():
        model(ids[:, :6], past_key_values=cache)
        model(ids[:, 6:7], past_key_values=cache)
    with torch.no_grad():
        model(ids[:, 7:8], past_key_values=cache)
        model(ids[:, 8:30], past_key_values=cache)
        model(ids[:, 30:31], past_key_values=cache)
    with torch.inference_mode():
        last = model(ids[:, 31:32], past_key_values=cache).logits
        assert distance(last[:, -1], model(ids[:, :32], use_cache=False).logits[:, -1]) < 1e-5
