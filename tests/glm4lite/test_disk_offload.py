"""Layers that stream from disk: the same numbers as in memory, whatever the disk does, within the budget."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4lite import Glm4ForCausalLM, SamplingParams, load
from glm4lite.base.direct_io import DirectFile
from glm4lite.base.errors import CheckpointError, ConfigError, ContextLengthError, DeviceError
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import Engine
from glm4lite.engine.prefix_pool import PrefixCache
from glm4lite.engine.speculation import Speculation
from glm4lite.loading.device_map import DeviceMap
from glm4lite.loading.requirements import requirements_of
from glm4lite.measure.inventory import devices, kernel_names, rings
from glm4lite.memory.budget import Budget, place_within
from glm4lite.memory.placement import place
from glm4lite.memory.resources import Machine, Placement, Share
from glm4lite.model.layer_cache import LayerCache
from glm4lite.model.layers import layer_of
from glm4lite.model.step import Span
from glm4lite.runtime.disk_offload import DiskStore
from glm4lite_quant import QuantError
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint
from tests.glm4lite.company import alone, company, random_prompts

CONTEXT = 96
LAYERS = 7
GREEDY = SamplingParams(temperature=0, max_new_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized checkpoint in two shards, a layer of which lies in both."""
    root = tmp_path_factory.mktemp("offload")
    config = tiny_config() | {"num_hidden_layers": LAYERS, "hidden_size": 128, "intermediate_size": 256}
    source = write_checkpoint(root / "source", config)
    return quantize_checkpoint(source, root / "int4", "int4", shard_bytes=1 << 19)


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[[int], int]:
    """Bytes of RAM with which so many layers lie on disk (with no reserve: it is larger than all of the model)."""
    monkeypatch.setattr("glm4lite.memory.placement.CPU_RESERVE", 0)
    monkeypatch.setattr("glm4lite.memory.placement.RING_BUFFERS", 0)
    needs, huge = requirements_of(Checkpoint.open(folder)), Machine(1 << 40)

    def of(on_disk: int) -> int:
        whole = place(needs, huge, context=CONTEXT, kv="float").share("cpu").held
        for ram in range(whole, 0, -4096):
            found = place(needs, huge, context=CONTEXT, kv="float", ram=ram)
            if found.fits and len(found.share("disk").layers) == on_disk:
                return ram
        raise AssertionError(f"no budget puts {on_disk} layers on disk")

    return of


@pytest.fixture
def streamed(folder: Path, budget: Callable[[int], int]) -> Glm4ForCausalLM:
    return load(folder, ram=budget(4), context=CONTEXT, kv="float")


def on_disk(model: Glm4ForCausalLM) -> list[DiskStore]:
    return [layer.store for layer in model.model.layers if isinstance(layer.store, DiskStore)]


def logits_of(model: Glm4ForCausalLM, pieces: list[torch.Tensor], **more: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        cache = model.new_cache()
        return [model(piece, past_key_values=cache, **more).logits for piece in pieces]


IDS = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(5))
PIECES = [IDS[:, :20], IDS[:, 20:21], IDS[:, 21:24], IDS[:, 24:]]


@pytest.mark.parametrize("count", [1, 2, 4, LAYERS])
@pytest.mark.parametrize("kv", ["float", "int8"])
def test_the_logits_have_the_same_bits_wherever_the_layers_lie(
    folder: Path, budget: Callable[[int], int], count: int, kv: str
) -> None:
    resident = load(folder, kv=kv)
    model = load(folder, ram=budget(count), context=CONTEXT, kv=kv)
    if kv == "float":
        assert len(on_disk(model)) == count
    for _ in range(2):  # the second pass begins where the ring stands after the first
        for got, wanted in zip(logits_of(model, PIECES), logits_of(resident, PIECES), strict=True):
            assert torch.equal(got, wanted)


def test_a_read_of_the_disk_serves_all_sequences_of_a_step(folder: Path, streamed: Glm4ForCausalLM) -> None:
    prompts = random_prompts(streamed, 8, 60, seed=4)
    wanted = alone(load(folder, kv="float"), prompts)
    for number, rows, logits in company(streamed, prompts, seed=4):
        assert torch.equal(logits, wanted[number][rows])
    (ring,) = rings(streamed)
    before, caches = ring.bytes_read, [streamed.new_cache() for _ in prompts]
    for _ in range(3):
        streamed.step([Span([7], cache) for cache in caches])
    assert ring.bytes_read - before <= 3 * ring.layers_bytes + ring.nbytes


def test_code_that_knows_no_kernels_gets_the_weights_too(folder: Path, streamed: Glm4ForCausalLM) -> None:
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[0, :7] = 0  # padding takes the torch code
    with torch.inference_mode():
        wanted = load(folder)(IDS, attention_mask=mask, output_hidden_states=True)
        got = streamed(IDS, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(got.logits, wanted.logits)
    assert len(got.hidden_states) == LAYERS + 1


def test_whoever_looks_at_the_model_meanwhile_changes_nothing(folder: Path, streamed: Glm4ForCausalLM) -> None:
    wanted, over = logits_of(load(folder), PIECES), threading.Event()
    names, failed = kernel_names(streamed), []

    def look() -> None:
        while not over.is_set():
            if kernel_names(streamed) != names or devices(streamed)["disk"]["layers"] != 4:
                failed.append("other facts")

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(25):
            assert all(map(torch.equal, logits_of(streamed, PIECES), wanted))
    finally:
        over.set()
        looking.join()
    assert not failed


def test_a_layer_has_no_weights_between_its_turns(streamed: Glm4ForCausalLM) -> None:
    logits_of(streamed, PIECES[:1])
    layer = next(layer for layer in streamed.model.layers if isinstance(layer.store, DiskStore))
    with pytest.raises(QuantError, match="no weight yet"):
        layer.mlp.gate_up_proj(torch.zeros(1, 128))


def test_a_pass_reads_each_layer_once(streamed: Glm4ForCausalLM) -> None:
    (ring,) = rings(streamed)
    logits_of(streamed, PIECES)
    ahead = ring.nbytes  # the ring reads on for the pass after the last
    assert 4 * ring.layers_bytes <= ring.bytes_read <= 4 * ring.layers_bytes + ahead


def test_what_lies_where_is_told(streamed: Glm4ForCausalLM) -> None:
    assert {name: held["layers"] for name, held in devices(streamed).items()} == {"cpu": LAYERS - 4, "disk": 4}
    assert all("int" in name for name in kernel_names(streamed))
    assert sum(kernel_names(streamed).values()) == 6 * LAYERS + 1


def test_generating_goes_on_after_a_stop_in_mid_pass(folder: Path, streamed: Glm4ForCausalLM) -> None:
    prompt = IDS[0].tolist()
    wanted = list(Generation(load(folder), prompt, GREEDY))
    cancel = threading.Event()
    cache = PrefixCache(streamed.new_cache())
    stopped = Generation(streamed, prompt, GREEDY, cache=cache, cancel=cancel)
    third = streamed.model.layers[3]
    handle = third.register_forward_pre_hook(lambda *_: cancel.set())
    assert list(stopped) == []
    handle.remove()
    assert stopped.finish_reason == "cancelled"
    assert list(Generation(streamed, prompt, GREEDY, cache=cache)) == wanted


def test_guesses_share_a_read_of_the_disk(folder: Path, streamed: Glm4ForCausalLM) -> None:
    prompt, params = IDS[0].tolist(), replace(GREEDY, max_new_tokens=24)
    wanted = list(Generation(load(folder), prompt, params))
    speculation = Speculation()
    speculation.remember([*prompt, *wanted])  # the answer was given before, so what follows is known
    (ring,) = rings(streamed)
    before = ring.bytes_read
    assert list(Generation(streamed, prompt, params, speculation=speculation)) == wanted
    passes = (ring.bytes_read - before) / ring.layers_bytes
    assert passes < 0.7 * len(wanted)


def test_a_budget_limits_the_context(streamed: Glm4ForCausalLM) -> None:
    assert streamed.context == CONTEXT
    with pytest.raises(ContextLengthError, match=f"the model's context is {CONTEXT}"):
        Generation(streamed, [5] * CONTEXT, GREEDY)
    cache = streamed.new_cache()
    with torch.inference_mode():
        streamed(IDS.repeat(1, 2), past_key_values=cache)
    assert cache.nbytes <= streamed.model.config.num_hidden_layers * CONTEXT * 2 * 4 * kv_width(streamed)


def kv_width(model: Glm4ForCausalLM) -> int:
    return model.config.num_key_value_heads * model.config.head_dim


# --- what a disk may do


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`reads["do"](file, buffers, offset)` stands for the system's positional read."""
    own = DirectFile._read

    def real(file: DirectFile, buffers: list[memoryview], offset: int) -> int:
        return own(file, buffers[0], offset)

    doing: dict[str, Any] = {"do": real, "real": real}
    monkeypatch.setattr(DirectFile, "_read", lambda file, target, offset: doing["do"](file, [target], offset))
    return doing


def test_short_reads_are_read_on(folder: Path, streamed: Glm4ForCausalLM, reads: dict[str, Any]) -> None:
    def short(file: DirectFile, buffers: list[memoryview], offset: int) -> int:
        return reads["real"](file, [buffers[0][: max(4096, len(buffers[0]) // 3 // 4096 * 4096)]], offset)

    reads["do"] = short
    for got, wanted in zip(logits_of(streamed, PIECES), logits_of(load(folder), PIECES), strict=True):
        assert torch.equal(got, wanted)


def test_a_read_that_ends_within_a_block_is_begun_again_at_it(
    folder: Path, streamed: Glm4ForCausalLM, reads: dict[str, Any]
) -> None:
    def ragged(file: DirectFile, buffers: list[memoryview], offset: int) -> int:
        assert offset % 4096 == 0
        count = reads["real"](file, buffers, offset)
        return count - 100 if count > 8192 else count

    reads["do"] = ragged
    assert torch.equal(logits_of(streamed, PIECES)[0], logits_of(load(folder), PIECES)[0])


def test_an_error_of_the_disk_is_said_and_the_next_pass_tries_again(
    folder: Path, streamed: Glm4ForCausalLM, reads: dict[str, Any]
) -> None:
    def broken(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    reads["do"] = broken
    cache = PrefixCache(streamed.new_cache())
    with pytest.raises(CheckpointError, match=r"safetensors cannot be read: Input/output error"):
        list(Generation(streamed, IDS[0].tolist(), GREEDY, cache=cache))
    reads["do"] = reads["real"]
    wanted = list(Generation(load(folder), IDS[0].tolist(), GREEDY))
    assert list(Generation(streamed, IDS[0].tolist(), GREEDY, cache=cache)) == wanted


def test_a_slow_disk_is_waited_for(folder: Path, streamed: Glm4ForCausalLM, reads: dict[str, Any]) -> None:
    def slow(*args: Any) -> int:
        time.sleep(0.01)
        return reads["real"](*args)

    reads["do"] = slow
    assert torch.equal(logits_of(streamed, PIECES)[-1], logits_of(load(folder), PIECES)[-1])
    assert rings(streamed)[0].waited_s > 0.01


@pytest.fixture
def own(folder: Path, tmp_path: Path, budget: Callable[[int], int]) -> tuple[Path, Glm4ForCausalLM]:
    """A copy that a test may damage, loaded."""
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    return copy, load(copy, ram=budget(4), context=CONTEXT, kv="float")


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def test_a_file_changed_under_the_model_is_noticed(own: tuple[Path, Glm4ForCausalLM]) -> None:
    copy, model = own
    logits_of(model, PIECES[:1])
    with last_shard(copy).open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\1" * 64)
    with pytest.raises(CheckpointError, match="was changed while the model was in use; load the model again"):
        logits_of(model, PIECES[:1])


def test_a_file_that_became_shorter_is_noticed(own: tuple[Path, Glm4ForCausalLM]) -> None:
    copy, model = own
    logits_of(model, PIECES[:1])
    os.truncate(last_shard(copy), last_shard(copy).stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"ended at|was changed"):
        logits_of(model, PIECES)


def test_a_file_replaced_by_another_changes_nothing(folder: Path, own: tuple[Path, Glm4ForCausalLM]) -> None:
    copy, model = own
    wanted = logits_of(load(folder), PIECES)[0]
    other = copy / "other"
    other.write_bytes(b"\0" * last_shard(copy).stat().st_size)
    other.replace(last_shard(copy))
    assert torch.equal(logits_of(model, PIECES)[0], wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux' file systems refuse them")
def test_a_file_system_without_direct_reads_serves_too(
    folder: Path, budget: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    model = load(folder, ram=budget(4), context=CONTEXT, kv="float")
    assert torch.equal(logits_of(model, PIECES)[0], logits_of(load(folder), PIECES)[0])


def test_the_threads_end_with_the_model(folder: Path, budget: Callable[[int], int]) -> None:
    before = threading.active_count()
    model = load(folder, ram=budget(4), context=CONTEXT, kv="float")
    logits_of(model, PIECES)
    assert threading.active_count() > before
    del model
    assert threading.active_count() == before


# --- what is refused


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"ram": 1000}, CheckpointError, "does not fit: .* of RAM do not suffice: it takes"),
        ({"ram": "3 apples"}, ConfigError, "'3 apples' is not a size"),
        ({"ram": -1}, ConfigError, "a memory budget is a number of bytes"),
        ({"ram": "1GiB", "context": 10**9}, ContextLengthError, "the context is 1000000000 tokens; this model takes"),
        ({"context": 0}, ConfigError, "the context is 0; use a number of tokens"),
        ({"kv": "int2"}, ConfigError, "kv is 'int2'; use auto, float or int8"),
        ({"ram": "1GiB", "device": "cuda"}, ConfigError, "torch finds no CUDA device"),
    ],
)
def test_what_cannot_be_is_one_line(folder: Path, limits: dict[str, Any], error: type, message: str) -> None:
    if "device" in limits and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(error, match=message) as caught:
        load(folder, **limits)
    assert "\n" not in str(caught.value)


def test_only_stored_layers_can_lie_on_disk(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="does not fit"):
        load(source, quant="int4", ram="200MiB")


def test_a_streamed_model_is_saved_with_its_layers_also_over_its_own_files(
    folder: Path, tmp_path: Path, budget: Callable[[int], int]
) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    wanted = logits_of(load(folder), PIECES)[0]
    model = load(own, ram=budget(4), context=CONTEXT, kv="float")
    for target in (tmp_path / "out", own):
        model.save_pretrained(target)
        assert torch.equal(logits_of(load(target), PIECES)[0], wanted)
        assert torch.equal(logits_of(model, PIECES)[0], wanted)


def test_the_notice_says_that_the_cache_became_int8(
    folder: Path, budget: Callable[[int], int], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(folder, ram=budget(4), context=CONTEXT)
    assert model.model.kv == "int8"
    assert "the cache is int8, to leave memory for weights" in caplog.text


@pytest.mark.usefixtures("budget")
def test_the_cache_stays_as_it_is_where_int8_keeps_no_layer_from_the_disk(folder: Path) -> None:
    needs, machine, alike = requirements_of(Checkpoint.open(folder)), Machine(1 << 40), 0
    whole = place(needs, machine, context=4, kv="float").share("cpu").held
    for ram in range(whole - sum(needs.layers), whole, 4096):
        float_, int8, auto = (
            place_within(needs, machine, Budget(ram=ram, context=4, kv=kv)) for kv in ("float", "int8", "auto")
        )
        if float_.fits:
            layers = [len(found.share("disk").layers) for found in (float_, int8)]
            alike += layers[0] == layers[1] > 0
            assert auto.kv == ("int8" if layers[1] < layers[0] else "float")
    assert alike


def test_memory_that_runs_out_while_loading_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("glm4lite.loading.assembly.Assembly.fill", fail)
    with pytest.raises(CheckpointError, match=r"memory ran out while .* was loaded; free some"):
        load(folder)


def test_a_budget_for_a_gpu_that_may_not_be_used_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(folder, device="cpu", gpu_memory="8GiB", context=CONTEXT)
    assert "gpu_memory is of no use" in caplog.text


def test_a_chat_runs_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glm4lite.chat.session import ChatSession
    from glm4lite.tools.builtin.tools import BUILTIN_TOOLS

    monkeypatch.setattr("glm4lite.memory.placement.CPU_RESERVE", 0)
    monkeypatch.setattr("glm4lite.memory.placement.RING_BUFFERS", 0)
    nano = quantize_checkpoint("nano", tmp_path / "nano", "int8")
    whole = Engine.load(nano, ram="4GiB", context=1024, kv="float")
    needed = sum(held["weights"] for held in devices(whole.model).values())
    session = ChatSession.load(
        nano, tools=BUILTIN_TOOLS, ram=int(needed * 0.9) + (14 << 20), context=1024, kv="int8", temperature=0
    )
    text = "".join(getattr(event, "text", "") for event in session.send("What is 37 * 24?"))
    assert "888" in text


# --- layers of more than one kind in a model


def test_layers_compute_in_their_own_type_where_they_have_one(folder: Path) -> None:
    plain, mixed = load(folder), load(folder)
    for layer in mixed.model.layers[-3:]:
        layer.dtype = torch.bfloat16  # as the layers of a GPU do, beside float32 ones on the CPU
    cache = mixed.new_cache()
    kinds = [type(part).__name__ for part in cache.layers]
    assert kinds == ["PackedLayerCache"] * (LAYERS - 3) + ["LayerCache"] * 3
    with torch.inference_mode():
        got = torch.cat([mixed(piece, past_key_values=cache).logits for piece in PIECES], 1)
        at_once = mixed(IDS, use_cache=False).logits
        wanted = plain(IDS).logits
    for part in cache.layers[-3:]:
        assert isinstance(part, LayerCache)
        assert part.keys is not None
        assert part.keys.dtype == torch.bfloat16
    assert not torch.equal(got, wanted)
    scale = wanted.abs().max()
    assert (got - wanted).abs().max() < 0.05 * scale
    assert (got - at_once).abs().max() < 0.05 * scale


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.down_proj", (3, "mlp.down_proj")),
        ("layers.12.self_attn.q_proj.weight", (12, "self_attn.q_proj.weight")),
        ("model.layers.0", (0, "")),
        *((name, None) for name in ("model.norm", "model.layers", "model.layers.x.mlp", "visual.layers.3.mlp")),
        ("model.layers." + "9" * 5000 + ".mlp", None),  # a stranger's: no number of a layer, and none Python would read
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_number_of_a_layer_is_read_out_of_a_name(name: str, place: tuple[int, str] | None) -> None:
    assert layer_of(name) == place


def test_each_weight_goes_where_the_placement_says() -> None:
    shares = (
        Share("cuda:0", (5, 6), 0),
        Share("cpu", (0, 2, 4), 2, mapped=1),
        Share("disk", (1, 3), 0),
    )
    types = {"cpu": torch.float32, "cuda": torch.bfloat16}
    placement = Placement(shares, "cuda:0", CONTEXT, "float", 0, 0)
    found = DeviceMap(torch.device("cuda:0"), types, placement)
    names = ["model.embed_tokens", "model.layers.0.mlp.down_proj", "layers.1.self_attn.q_proj", "model.layers.6.mlp"]
    assert [str(found.device(name)) for name in (*names, "model.norm", "lm_head")] == [
        "cpu", "cpu", "cpu", "cuda:0", "cuda:0", "cuda:0",
    ]  # fmt: skip
    assert [found.on_disk(name) for name in names] == [False, False, True, False]
    assert [found.mapped(name) for name in names] == [True, False, False, False]
    assert found.dtype("model.layers.5") == torch.bfloat16
    assert found.dtype("layers.0") == found.dtype("model.layers.1") == torch.float32  # whole layers have a type too
    assert found.dtype("model.embed_tokens") == torch.float32
    tied = replace(placement, devices=(shares[0], replace(shares[1], mapped=0), shares[2]))
    assert not replace(found, placement=tied).mapped("model.embed_tokens")  # a head that reads all of it


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_and_the_cpu_share_a_model(folder: Path, budget: Callable[[int], int]) -> None:
    wanted = logits_of(load(folder, device="cpu"), PIECES)
    model = load(folder, gpu_memory="700MiB", context=CONTEXT, kv="float")
    assert "cuda:0" in devices(model)
    for got, of in zip(logits_of(model, PIECES), wanted, strict=True):
        assert (got.cpu() - of).abs().max() < 0.05 * of.abs().max()


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "the GPU's memory ran out at 40 tokens"),
        (MemoryError(), "memory ran out at 40 tokens; shorten the conversation"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
            "memory ran out at 40 tokens",
        ),
        (
            torch.AcceleratorError("CUDA error: unspecified launch failure\nmore"),
            r"the GPU failed \(CUDA error: unspec",
        ),
    ],
)
def test_a_device_that_fails_in_a_prompt_is_said_and_the_session_goes_on(
    folder: Path, failure: Exception, message: str
) -> None:
    model = load(folder)
    cache, prompt = PrefixCache(model.new_cache()), IDS[0].tolist()

    def fail(*_: Any) -> None:
        raise failure

    handle = model.model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(DeviceError, match=message) as caught:
        list(Generation(model, prompt, GREEDY, cache=cache))
    assert "\n" not in str(caught.value)
    handle.remove()
    assert list(Generation(model, prompt, GREEDY, cache=cache)) == list(Generation(load(folder), prompt, GREEDY))


def test_the_embedding_stays_on_the_cpu_whatever_computes() -> None:
    types = {"cpu": torch.float32, "cuda": torch.bfloat16}
    found = DeviceMap(torch.device("cuda:1"), types)
    assert str(found.device("model.embed_tokens")) == "cpu"
    assert {str(found.device(name)) for name in ("model.layers.3.mlp", "model.norm", "lm_head")} == {"cuda:1"}
