"""Where layers go: figures of the six 0414 models by hand, budgets that hold, and more memory that never does harm."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from glm4lite.base.errors import ContextLengthError
from glm4lite.loading.requirements import imagined, requirements_of
from glm4lite.memory.placement import place
from glm4lite.memory.resources import Machine, Placement, Requirements

GIB = 1 << 30

NINE: dict[str, Any] = {
    "model_type": "glm4",
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_bias": True,
    "max_position_embeddings": 32768,
}
THIRTY_TWO: dict[str, Any] = NINE | {
    "hidden_size": 6144,
    "intermediate_size": 23040,
    "num_hidden_layers": 61,
    "num_attention_heads": 48,
    "attention_bias": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "GLM-4-9B-0414": NINE,
    "GLM-Z1-9B-0414": NINE,
    "GLM-4-32B-0414": THIRTY_TWO,
    "GLM-4-32B-Base-0414": THIRTY_TWO,
    "GLM-Z1-32B-0414": THIRTY_TWO,
    "GLM-Z1-Rumination-32B-0414": THIRTY_TWO | {"num_key_value_heads": 8, "max_position_embeddings": 131072},
}


def needs(name: str, folder: Path, quant: str | None = "int4") -> Requirements:
    """Of a folder with nothing but config.json, as if the weights lay quantized in it."""
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    return replace(requirements_of(imagined(folder), quant), stored=True, loading=0)


@pytest.fixture
def nine(tmp_path: Path) -> Requirements:
    return needs("GLM-4-9B-0414", tmp_path)


@pytest.fixture
def thirty_two(tmp_path: Path) -> Requirements:
    return needs("GLM-4-32B-0414", tmp_path)


# --- by hand


# int4, groups of 32: half a byte a code, a byte of scale and one of minimum a group, 2 x 4 bytes a row.
#   n x k weights: n*k/2 + 2*n*k/32 + 8*n = n*k*9/16 + 8*n
# int8: n*k + n*k/32 + 4*n = n*k*33/32 + 4*n. Norms and biases: float32.
#
# 9B layer: q 4096 x 4096      16 777 216 * 9/16 + 8*4096  =  9 469 952
#           o the same                                        9 469 952
#           k, v 256 x 4096   2 * (1 048 576 * 33/32 + 4*256) =  2 164 736
#           gate_up 27392 x 4096  112 197 632 * 9/16 + 8*27392 = 63 330 304
#           down 4096 x 13696  56 098 816 * 9/16 + 8*4096  = 31 588 352
#           4 norms of 4096, biases of 4096 + 2*256: 4 * (16384 + 4608) = 83 968
#                                                     together 116 107 264
# 9B head = embedding, 151552 x 4096 int8: 620 756 992 * 33/32 + 4*151552 = 640 761 856; last norm 16 384
#
# 32B layer: q, o 6144 x 6144   2 * (37 748 736 * 9/16 + 8*6144) = 42 565 632
#            k, v 256 x 6144    2 * (1 572 864 * 33/32 + 4*256)  =  3 246 080
#            gate_up 46080 x 6144  283 115 520 * 9/16 + 8*46080  = 159 621 120
#            down 6144 x 23040     141 557 760 * 9/16 + 8*6144   =  79 675 392
#            4 norms of 6144: 98 304                      together 285 206 528
# 32B head = embedding, 151552 x 6144: 931 135 488 * 33/32 + 4*151552 = 960 839 680; last norm 24 576
# Rumination: k, v 1024 x 6144   2 * (6 291 456 * 33/32 + 4*1024) = 12 984 320: a layer of 294 944 768
NINE_BYTES = 40 * 116_107_264 + 2 * 640_761_856 + 16_384
THIRTY_TWO_BYTES = 61 * 285_206_528 + 2 * 960_839_680 + 24_576
RUMINATION_BYTES = 61 * 294_944_768 + 2 * 960_839_680 + 24_576
WEIGHTS = {
    "GLM-4-9B-0414": NINE_BYTES,
    "GLM-Z1-9B-0414": NINE_BYTES,
    "GLM-4-32B-0414": THIRTY_TWO_BYTES,
    "GLM-4-32B-Base-0414": THIRTY_TWO_BYTES,
    "GLM-Z1-32B-0414": THIRTY_TWO_BYTES,
    "GLM-Z1-Rumination-32B-0414": RUMINATION_BYTES,
}


@pytest.mark.parametrize("name", MODELS)
def test_int4_bytes_are_those_of_the_format(name: str, tmp_path: Path) -> None:
    found = needs(name, tmp_path)
    assert found.weight_bytes == WEIGHTS[name]
    assert found.quant == "int4"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("GLM-4-9B-0414", 9_400_279_040),
        ("GLM-4-32B-0414", 32_566_081_536),
        ("GLM-Z1-Rumination-32B-0414", 33_141_749_760),
    ],
)
def test_bfloat16_bytes_are_two_a_parameter(name: str, parameters: int, tmp_path: Path) -> None:
    assert needs(name, tmp_path, "none").weight_bytes == 2 * parameters


def test_nf4_is_half_a_byte_and_a_float_for_64_weights(tmp_path: Path) -> None:
    # linears of a 9B layer: 203 948 032 weights of 9/16 byte, a table of 16 floats for each of the six; norms and
    # biases float32; embedding and head int8 with a scale for 32 and a float for each row
    found = needs("GLM-4-9B-0414", tmp_path, "nf4")
    assert found.layers[0] == 203_948_032 * 9 // 16 + 6 * 64 + 4 * (4 * 4096 + 4096 + 2 * 256)
    assert found.embedding == found.head == 620_756_992 * 33 // 32 + 4 * 151_552


# Two kinds (keys, values) x layers x heads x 128 numbers x 8192 tokens: float32 beside quantized layers on a CPU,
# bfloat16 on a GPU; int8 has a float32 scale for each head's 128 numbers.
@pytest.mark.parametrize(
    ("name", "on_cpu", "on_gpu", "int8"),
    [
        ("GLM-4-9B-0414", 2 * 40 * 2 * 512 * 8192, 40_960 * 8192, 2 * 40 * 2 * 132 * 8192),
        ("GLM-4-32B-0414", 2 * 61 * 2 * 512 * 8192, 62_464 * 8192, 2 * 61 * 2 * 132 * 8192),
        ("GLM-Z1-Rumination-32B-0414", 2 * 61 * 8 * 512 * 8192, 249_856 * 8192, 2 * 61 * 8 * 132 * 8192),
    ],
)
def test_the_cache_of_8192_tokens(name: str, on_cpu: int, on_gpu: int, int8: int, tmp_path: Path) -> None:
    found = needs(name, tmp_path)
    large = Machine(80 * GIB)
    with_gpu = replace(large, gpus=(80 * GIB,))
    assert place(found, large, context=8192).kv_bytes == on_cpu
    assert place(found, with_gpu, context=8192).kv_bytes == on_gpu
    assert place(found, large, context=8192, kv="int8").kv_bytes == int8


# 8 GiB = 8 589 934 592 bytes of GPU memory at 8192 tokens.
# 9B: 40 layers 4 644 290 560, head and norm 640 778 240, cache 335 544 320, reserve 536 870 912,
#     activations 2048 * (3*4*4096 + 2*(8192 + 12288 + 512 + 41088) + 3*8192) + 20*151552 = 408 305 664,
#     keys and values of 32 heads 2*8192*4096*2 = 134 217 728: 6 700 007 424 fit: all 40.
# 32B: head and norm 960 864 256, reserve 536 870 912, two layers from the bus 570 413 056,
#     activations 2048 * (3*4*6144 + 2*(12288 + 18432 + 512 + 69120) + 3*8192) + 20*151552 = 615 399 424,
#     keys and values of 48 heads 201 326 592:
#     5 705 060 352 are left; a layer and its cache (8 388 608) are 293 595 136: 19 fit (5 578 307 584), 20 do not.
# Rumination: 2048 in the place of 512 in the activations (621 690 880), two layers from the bus 589 889 536:
#     5 679 292 416 are left; a layer and its cache (33 554 432) are 328 499 200: 17 fit (5 584 486 400), 18 do not.
#     The other 44, 12 977 569 792, and their cache of 2 952 790 016 in float32 fit 16 GiB beside a reserve of
#     536 870 912, activations 512 * (3*4*6144 + 4*(12288 + 18432 + 2048 + 69120)) + 20*151552 = 249 446 400 and two
#     pinned blocks of 16 MiB: 16 750 231 552 of 17 179 869 184.
@pytest.mark.parametrize(
    ("name", "on_gpu", "in_ram", "on_disk"),
    [
        ("GLM-4-9B-0414", 40, 0, 0),
        ("GLM-Z1-9B-0414", 40, 0, 0),
        ("GLM-4-32B-0414", 19, 42, 0),
        ("GLM-4-32B-Base-0414", 19, 42, 0),
        ("GLM-Z1-32B-0414", 19, 42, 0),
        ("GLM-Z1-Rumination-32B-0414", 17, 44, 0),
    ],
)
def test_layers_on_a_gpu_of_8_gib_beside_16_gib_of_ram(
    name: str, on_gpu: int, in_ram: int, on_disk: int, tmp_path: Path
) -> None:
    found = needs(name, tmp_path)
    placed = place(found, Machine(16 * GIB, gpus=(8 * GIB,)), context=8192)
    count = len(found.layers)
    assert placed.fits
    assert placed.share("cuda:0").layers == tuple(range(count - on_gpu, count))
    assert (len(placed.share("cpu").layers), len(placed.share("disk").layers)) == (in_ram, on_disk)
    assert (placed.head, placed.embedding) == ("cuda:0", "cpu")
    assert placed.advice == ""
    assert placed.weight_bytes == found.weight_bytes


# 9B in 3 GiB = 3 221 225 472 bytes of RAM at 1024 tokens: reserve 536 870 912, head and norm 640 778 240, cache
# 83 886 080, activations 512 * (3*4*4096 + 4*(8192 + 12288 + 512 + 41088)) + 20*151552 = 155 336 704,
# three buffers 348 321 792: 1 456 031 744 are left for layers of 116 107 264: 12. The embedding is only looked up.
def test_layers_of_a_9b_in_3_gib_of_ram(nine: Requirements) -> None:
    placed = place(nine, Machine(24 * GIB), context=1024, ram=3 * GIB)
    cpu, disk = placed.share("cpu"), placed.share("disk")
    assert (len(cpu.layers), len(disk.layers)) == (12, 28)
    assert cpu.mapped == 640_761_856
    assert cpu.buffers == 3 * 116_107_264
    assert disk.weights == 28 * 116_107_264
    assert cpu.held <= 3 * GIB


# --- promises


def held_within(placed: Placement, gpus: tuple[int, ...], ram: int) -> bool:
    on_gpus = all(share.held <= gpus[int(share.device.removeprefix("cuda:"))] for share in placed.gpus)
    return on_gpus and placed.share("cpu").held <= ram


def sizes() -> list[int]:
    return [int(1.12**step * GIB) for step in range(1, 34)]  # 1.1 to 42 GiB


@pytest.mark.parametrize("kv", ["float", "int8"])
@pytest.mark.parametrize("name", ["GLM-4-9B-0414", "GLM-4-32B-0414", "GLM-Z1-Rumination-32B-0414"])
def test_budgets_hold_and_every_layer_has_one_place(name: str, kv: Any, tmp_path: Path) -> None:
    found = needs(name, tmp_path)
    for gpus in ((), (3 * GIB,), (8 * GIB,), (8 * GIB, 12 * GIB), (40 * GIB,)):
        for ram in sizes():
            placed = place(found, Machine(ram, gpus=gpus), context=8192, kv=kv)
            assert sorted(layer for share in placed.devices for layer in share.layers) == list(range(len(found.layers)))
            assert placed.weight_bytes == found.weight_bytes
            assert placed.fits == held_within(placed, gpus, ram)
            assert placed.fits == (placed.decode_tokens_per_s > 0)
            assert placed.fits or placed.advice


def test_more_ram_never_holds_fewer_layers_nor_is_slower(thirty_two: Requirements) -> None:
    for gpus in ((), (8 * GIB,)):
        plans = [place(thirty_two, Machine(ram, gpus=gpus), context=8192) for ram in sizes()]
        for less, more in pairwise(plans):
            assert not less.fits or more.fits
            assert not less.fits or len(less.share("cpu").layers) <= len(more.share("cpu").layers)
            assert less.decode_tokens_per_s <= more.decode_tokens_per_s
            assert less.prefill_tokens_per_s <= more.prefill_tokens_per_s


def test_more_gpu_memory_never_holds_fewer_layers_nor_is_slower(thirty_two: Requirements) -> None:
    for ram in (8 * GIB, 24 * GIB):
        plans = [place(thirty_two, Machine(ram, gpus=(size,)), context=8192) for size in sizes()]
        assert plans[0].gpus == ()
        assert len(plans[-1].share("cuda:0").layers) == 61
        for less, more in pairwise(plans):
            assert len(less.share("cuda:0").layers) <= len(more.share("cuda:0").layers)
            assert less.decode_tokens_per_s <= more.decode_tokens_per_s


def test_a_second_gpu_takes_the_layers_before_those_of_the_first(thirty_two: Requirements) -> None:
    placed = place(thirty_two, Machine(32 * GIB, gpus=(8 * GIB, 8 * GIB)), context=8192)
    first, second = placed.gpus
    assert first.layers[-1] == 60
    assert second.layers[-1] == first.layers[0] - 1
    assert placed.share("cpu").layers[-1] == second.layers[0] - 1
    assert [placed.device_of(layer) for layer in (0, second.layers[0], 60)] == ["cpu", "cuda:1", "cuda:0"]


def test_layers_on_disk_lie_between_those_in_ram(thirty_two: Requirements) -> None:
    placed = place(thirty_two, Machine(24 * GIB), context=8192, ram=10 * GIB)
    held, read = placed.share("cpu").layers, placed.share("disk").layers
    assert len(held) > 15
    assert all(later - earlier <= len(read) // len(held) + 2 for earlier, later in pairwise(held))


def test_no_layers_on_disk_where_ram_holds_all(nine: Requirements) -> None:
    assert not place(nine, Machine(24 * GIB), context=8192).share("disk").layers


def test_no_gpu_memory_means_no_gpu(nine: Requirements) -> None:
    machine = Machine(24 * GIB, gpus=(8 * GIB,))
    assert place(nine, machine, context=8192, gpu_memory=0) == place(nine, replace(machine, gpus=()), context=8192)


# --- what the predictions are


def test_decoding_is_bytes_over_bandwidth(nine: Requirements) -> None:
    machine = Machine(24 * GIB, ram_bandwidth=40e9)
    placed = place(nine, machine, context=8192)
    read = 40 * 116_107_264 + 640_778_240 + 2 * 40 * 2 * 512 * 4096  # the cache half full
    assert placed.decode_tokens_per_s == pytest.approx(0.9 * 40e9 / read)


def test_a_disk_that_is_slower_than_ram_bounds_decoding(nine: Requirements) -> None:
    machine = Machine(24 * GIB, ram_bandwidth=40e9, disk_bandwidth=1e9)
    placed = place(nine, machine, context=1024, ram=3 * GIB)
    assert placed.decode_tokens_per_s == pytest.approx(0.95 * 1e9 / placed.share("disk").weights)


def test_a_prompt_is_bound_by_operations_or_by_the_bus(thirty_two: Requirements) -> None:
    # 503 316 480 weights a layer, two operations each, 61 layers
    slow = place(thirty_two, Machine(24 * GIB, cpu_rate=1e12), context=8192)
    assert slow.prefill_tokens_per_s == pytest.approx(1e12 / (2 * 503_316_480 * 61))
    machine = Machine(24 * GIB, gpus=(8 * GIB,), gpu_rate=1e15, bus_bandwidth=12e9)
    placed = place(thirty_two, machine, context=8192)
    assert placed.prefill_tokens_per_s == pytest.approx(2048 * 12e9 / (42 * 285_206_528))


# --- what does not fit


def test_ram_for_less_than_one_layer_and_the_cache_is_refused_with_what_would_do(nine: Requirements) -> None:
    placed = place(nine, Machine(24 * GIB), context=8192, ram=GIB)
    assert not placed.fits
    assert (placed.decode_tokens_per_s, placed.prefill_tokens_per_s) == (0, 0)
    assert placed.advice == "1.0 GiB of RAM do not suffice: it takes 2.2GiB of RAM"
    assert place(nine, Machine(24 * GIB), context=8192, ram=int(2.2 * GIB)).fits


def test_a_smaller_cache_is_advised_where_it_is_enough(thirty_two: Requirements) -> None:
    placed = place(thirty_two, Machine(24 * GIB), context=8192, ram=3 * GIB)
    assert placed.advice == ("3.0 GiB of RAM do not suffice: it takes 3.4GiB of RAM, or --kv int8, or --context 4096")
    assert place(thirty_two, Machine(24 * GIB), context=8192, ram=3 * GIB, kv="int8").fits
    assert place(thirty_two, Machine(24 * GIB), context=4096, ram=3 * GIB).fits


def test_gpu_memory_that_holds_nothing_is_refused_with_what_would_do(thirty_two: Requirements) -> None:
    machine = Machine(24 * GIB, gpus=(8 * GIB,))
    placed = place(thirty_two, machine, context=8192, gpu_memory=GIB)
    assert not placed.fits
    assert placed.advice == (
        "the GPU memory given holds not even the head and one layer: give --gpu-memory 3.0GiB, or leave it out"
    )
    assert place(thirty_two, machine, context=8192, gpu_memory=int(3.0 * GIB)).fits


def test_a_gpu_that_happens_to_be_full_is_left_out_and_said(nine: Requirements) -> None:
    placed = place(nine, Machine(24 * GIB, gpus=(GIB,)), context=8192)
    assert placed.fits
    assert placed.gpus == ()
    assert placed.advice.startswith("the GPU is not used: it takes 2.0GiB of its memory")


def test_unstored_layers_cannot_lie_on_disk(nine: Requirements) -> None:
    made = replace(nine, stored=False, loading=GIB // 2)
    placed = place(made, Machine(24 * GIB), context=1024, ram=3 * GIB)
    assert not placed.fits
    assert "`glm4lite quantize` writes" in placed.advice
    assert not place(made, Machine(24 * GIB), context=1024, ram=6 * GIB).fits  # what loading takes counts too
    assert place(made, Machine(24 * GIB), context=1024, ram=7 * GIB).fits


def test_more_than_the_models_context_is_refused(nine: Requirements) -> None:
    for context in (0, 32769):
        with pytest.raises(
            ContextLengthError, match=rf"^the context is {context} tokens; this model takes 1 to 32768$"
        ):
            place(nine, Machine(24 * GIB), context=context)


def test_a_tied_head_takes_its_memory_once_on_a_cpu_and_again_on_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NINE | {"tie_word_embeddings": True}))
    found = replace(requirements_of(imagined(tmp_path), "int4"), stored=True, loading=0)
    assert (found.head, found.embedding) == (0, 640_761_856)
    on_cpu = place(found, Machine(24 * GIB), context=1024)
    assert (on_cpu.weight_bytes, on_cpu.share("cpu").mapped) == (found.weight_bytes, 0)
    on_gpu = place(found, Machine(24 * GIB, gpus=(24 * GIB,)), context=1024)
    assert on_gpu.weight_bytes == found.weight_bytes + 640_761_856
