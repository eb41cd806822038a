"""Layers in RAM and on disk that long prompts find on a GPU: the resident model's bits, and decoding where they lie.

Without a GPU the buffers lie on the CPU and are filled at once; which inputs ask for the GPU's layers is decided by
their number of tokens instead of their device.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4lite import Glm4ForCausalLM, SamplingParams, load
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.engine.decoding import Generation
from glm4lite.engine.prefix_pool import PrefixCache
from glm4lite.loading.device_map import _bus
from glm4lite.measure.inventory import devices, kernel_names
from glm4lite.memory.resources import Machine, Placement, Share
from glm4lite.memory.speed import prefetch_tokens
from glm4lite.model.layer_cache import LayerCache
from glm4lite.model.step import Span
from glm4lite.runtime import gpu_prefetch
from glm4lite.runtime.fused import FusedLayers
from glm4lite.runtime.gpu_prefetch import PrefetchedStore, Prefetcher, prefetch_long_prompts
from glm4lite.runtime.kv_pool import KVPool
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint
from tests.glm4lite.company import company, random_prompts

LAYERS, THRESHOLD = 6, 4
IDS = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(5))
PIECES = [IDS[:, :20], IDS[:, 20:21], IDS[:, 21:24], IDS[:, 24:]]
GREEDY = SamplingParams(temperature=0, max_new_tokens=6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("crossing")
    source = write_checkpoint(root / "plain", tiny_config() | {"num_hidden_layers": LAYERS})
    return {"none": source, **{q: quantize_checkpoint(source, root / q, q) for q in ("int4", "int8")}}


@pytest.fixture(autouse=True)
def standing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for the GPU: torch's code everywhere, and an input crosses by its number of tokens."""
    state = {"crosses": False}
    where = PrefetchedStore.where

    def noted(place: PrefetchedStore, tokens: int) -> Any:
        found = where(place, tokens)
        state["crosses"] = found is not None
        return found

    monkeypatch.setattr(PrefetchedStore, "where", noted)
    monkeypatch.setattr(Prefetcher, "carries", lambda bus, device: state["crosses"])
    monkeypatch.setattr(FusedLayers, "run", lambda *_: None)


def crossing_model(folder: Path, layers: slice = slice(0, 4), **options: Any) -> tuple[Glm4ForCausalLM, Prefetcher]:
    model = load(folder, **options)
    chosen = list(model.model.layers)[layers]
    return model, prefetch_long_prompts(chosen, torch.device("cpu"), model.model.dtype, THRESHOLD)


def logits_of(model: Glm4ForCausalLM, pieces: list[torch.Tensor] = PIECES) -> list[torch.Tensor]:
    with torch.inference_mode():
        cache = model.new_cache()
        return [model(piece, past_key_values=cache).logits for piece in pieces]


@pytest.mark.parametrize("kv", ["float", "int8"])
@pytest.mark.parametrize("quant", ["int4", "int8", "none"])
def test_the_logits_have_the_resident_models_bits(folders: dict[str, Path], quant: str, kv: str) -> None:
    model, bus = crossing_model(folders[quant], kv=kv)
    resident = load(folders[quant], kv=kv)
    for _ in range(2):
        for got, want in zip(logits_of(model), logits_of(resident), strict=True):
            assert torch.equal(got, want)
    assert bus.bytes_sent > 0


def test_only_long_prompts_cross_and_each_layer_once(folders: dict[str, Path]) -> None:
    model, bus = crossing_model(folders["int4"])
    logits_of(model, PIECES[:1])
    once = bus.bytes_sent
    assert once == 4 * bus_bytes(model)
    logits_of(model, [IDS[:, :1], IDS[:, 1:4]])
    assert bus.bytes_sent == once
    logits_of(model, PIECES)
    assert bus.bytes_sent == 3 * once


def test_every_cache_is_complete_after_a_pass(folders: dict[str, Path]) -> None:
    model, _ = crossing_model(folders["int4"])
    cache = model.new_cache()
    with torch.inference_mode():
        model(IDS, past_key_values=cache)
    assert [layer.length for layer in cache.layers] == [40] * LAYERS


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("kv", ["float", "int8"])
def test_a_step_of_several_sequences_crosses_with_the_resident_models_bits(
    folders: dict[str, Path], kv: str, pooled: bool
) -> None:
    model, bus = crossing_model(folders["int4"], kv=kv)
    prompts = random_prompts(model, 5, 40, seed=6)
    new_cache = KVPool(model, 400).new if pooled else model.new_cache
    resident = company(load(folders["int4"], kv=kv), prompts, 6)
    each = zip(company(model, prompts, 6, new_cache), resident, strict=True)
    for (number, rows, got), (other, other_rows, want) in each:
        assert (number, rows) == (other, other_rows)
        assert torch.equal(got, want)
    sent = bus.bytes_sent
    model.step([Span(ids[:1], model.new_cache()) for ids in prompts])
    assert bus.bytes_sent - sent == 4 * bus_bytes(model)


def bus_bytes(model: Glm4ForCausalLM) -> int:
    """Of one layer."""
    return sum(t.nbytes for t in (*model.model.layers[0].parameters(), *model.model.layers[0].buffers()))


def test_layers_on_disk_cross_too(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm4lite.memory.placement.CPU_RESERVE", 0)
    monkeypatch.setattr("glm4lite.memory.placement.RING_BUFFERS", 0)
    resident, model = load(folders["int4"]), None
    whole = sum(held["weights"] for held in devices(resident).values())
    for ram in range(whole + (1 << 20), 0, -(64 << 10)):
        model = load(folders["int4"], ram=ram, context=48, kv="float")
        if "disk" in devices(model):
            break
    assert model is not None
    before = devices(model), kernel_names(model)
    prefetch_long_prompts(list(model.model.layers), torch.device("cpu"), torch.float32, THRESHOLD)
    assert (devices(model), kernel_names(model)) == before
    for _ in range(2):
        for got, want in zip(logits_of(model), logits_of(resident), strict=True):
            assert torch.equal(got, want)


def test_a_stop_in_mid_pass_leaves_a_cache_to_go_on_from(folders: dict[str, Path]) -> None:
    model, _ = crossing_model(folders["int4"])
    prompt, cancel, cache = IDS[0].tolist(), threading.Event(), PrefixCache(model.new_cache())
    handle = model.model.layers[2].register_forward_pre_hook(lambda *_: cancel.set())
    assert list(Generation(model, prompt, GREEDY, cache=cache, cancel=cancel)) == []
    handle.remove()
    assert list(Generation(model, prompt, GREEDY, cache=cache)) == list(
        Generation(load(folders["int4"]), prompt, GREEDY)
    )


def test_a_failure_in_a_layer_is_not_the_end(folders: dict[str, Path]) -> None:
    model, _ = crossing_model(folders["int4"])

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        logits_of(model, PIECES[:1])
    handle.remove()
    for got, want in zip(logits_of(model), logits_of(load(folders["int4"])), strict=True):
        assert torch.equal(got, want)


def test_a_model_whose_prompts_cross_is_saved_as_any_other(folders: dict[str, Path], tmp_path: Path) -> None:
    model, _ = crossing_model(folders["int4"])
    logits_of(model)
    model.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits_of(load(tmp_path / "copy"))[0], logits_of(model)[0])


def test_without_pinned_memory_it_goes_on_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., torch.Tensor] = torch.empty

    def empty(*args: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of host memory\nmore")
        return real(*args, **more)

    monkeypatch.setattr(torch, "empty", empty)
    gpu_prefetch._say_unpinned.cache_clear()
    with caplog.at_level(logging.WARNING, "glm4lite"):
        assert gpu_prefetch._pinned(16).shape == (16,)
        gpu_prefetch._pinned(16)
    (said,) = caplog.records
    assert said.message == (
        "no pinned memory can be had (CUDA error: out of host memory): weights cross the bus more slowly"
    )


def test_a_script_may_change_between_inference_mode_and_no_grad(folders: dict[str, Path]) -> None:
    model, _ = crossing_model(folders["int4"])
    want = logits_of(model)
    with torch.no_grad():
        cache = model.new_cache()
        got = [model(piece, past_key_values=cache).logits for piece in PIECES]
    assert all(map(torch.equal, got, want))


def test_what_a_gpu_computed_in_bfloat16_is_stored_in_the_layers_own_type(folders: dict[str, Path]) -> None:
    model = load(folders["int4"])
    layers = list(model.model.layers)
    for layer in layers:
        layer.dtype = torch.float32
    prefetch_long_prompts(layers, torch.device("cpu"), torch.bfloat16, THRESHOLD)
    both = IDS.view(2, 20)
    with torch.inference_mode():
        cache = model.model.new_cache(batch=2)
        model(both[:, :10], past_key_values=cache)
        model(both[:, 10:11], past_key_values=cache)  # by the CPU, in float32
    for stored in cache.layers:
        assert isinstance(stored, LayerCache)
        assert stored.keys is not None
        assert stored.keys.dtype == torch.float32


def test_a_model_that_is_let_go_is_gone_at_once(folders: dict[str, Path]) -> None:
    model, _ = crossing_model(folders["int4"])
    logits_of(model)
    gone = weakref.ref(model.model.layers[1].mlp.down_proj)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# --- which layers, and from how many tokens on


@pytest.fixture
def needs(folders: dict[str, Path]) -> Any:
    from glm4lite.checkpoint.checkpoint import Checkpoint
    from glm4lite.loading.requirements import requirements_of

    return requirements_of(Checkpoint.open(folders["int4"]))


def test_the_threshold_is_where_the_bus_takes_less_time_than_the_cpu(needs: Any) -> None:
    """3.2 of performance.md: 4.25 bits at 12 GB/s beside 1 TFLOP/s, some 22 tokens."""
    nbytes = int(needs.layer_parameters * 4.25 / 8)
    tokens = prefetch_tokens(nbytes, needs, Machine(0, bus_bandwidth=12e9, cpu_rate=1e12, gpu_rate=1e15))
    assert tokens == pytest.approx(22.1, rel=0.01)
    assert prefetch_tokens(nbytes, needs, Machine(0, cpu_rate=2e12, gpu_rate=1e12)) == float("inf")


@pytest.mark.parametrize(("cpu_rate", "crosses"), [(1e12, True), (1e9, True), (1e18, False)])
def test_the_layers_off_the_gpu_cross_where_that_is_faster(
    needs: Any, monkeypatch: pytest.MonkeyPatch, cpu_rate: float, crosses: bool
) -> None:
    monkeypatch.setattr(
        "glm4lite.loading.device_map.prefetch_speeds", lambda quantized: Machine(0, cpu_rate=cpu_rate, gpu_rate=3e13)
    )
    shares = (Share("cuda:0", (4, 5), 0), Share("cpu", (0, 2), 0), Share("disk", (1, 3), 0))
    route = _bus(needs, Placement(shares, "cuda:0", 64, "float", 0, 0), torch.bfloat16)
    if not crosses:
        assert route is None
        return
    assert route is not None
    assert (route.layers, str(route.device), route.dtype) == ((0, 1, 2, 3), "cuda:0", torch.bfloat16)
    assert 0 < route.threshold <= 512
    assert _bus(needs, Placement(shares[1:], "cpu", 64, "float", 0, 0), torch.bfloat16) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu_computes_a_prompt_of_layers_in_ram(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    resident = load(folders["int4"], device="cuda", dtype=torch.bfloat16)
    model = load(folders["int4"], device="cuda", dtype=torch.bfloat16)
    layers = list(model.model.layers)[:4]
    for layer in layers:
        layer.to("cpu")
        layer.dtype = torch.float32
    for layer in list(model.model.layers)[4:]:
        layer.dtype = torch.bfloat16
    prefetch_long_prompts(layers, torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, THRESHOLD)
    ids = IDS.cuda()
    for _ in range(3):
        assert torch.equal(
            logits_of(model, [ids[:, :20], ids[:, 20:]])[1], logits_of(resident, [ids[:, :20], ids[:, 20:]])[1]
        )
