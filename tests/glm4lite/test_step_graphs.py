"""Several sequences through a GPU's layers at once, over blocks of a KV pool: the torch code's numbers, one recording a
number of rows for as long as the pool lives, and no sequence that reads or writes another's blocks.

Where there is no GPU the recording is that of tests.glm4lite.recorder, and Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm4lite import Glm4ForCausalLM, KVCache, SamplingParams, load
from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import _usual_parallel
from glm4lite.engine.prefix_pool import PrefixPool
from glm4lite.engine.scheduler import PARALLEL, Scheduler
from glm4lite.engine.speculation import Speculation
from glm4lite.model.step import Span
from glm4lite.runtime import cuda_graph, kv_pool
from glm4lite.runtime.cuda_graph import StepGraphs
from glm4lite.runtime.kv_pool import KVPool, PooledLayerCache
from glm4lite.runtime.runner import FastRunner
from glm4lite_quant.kernels.decoder import BLOCK
from glm4lite_quant.kernels.picking import REFERENCE
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint
from tests.glm4lite.company import company, random_prompts

pytest.importorskip("triton", reason="triton is not installed: recorded decoding is not tested")
CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set (tests/conftest.py does)", allow_module_level=True)

from tests.glm4lite.recorder import Recorder, recorded  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
SIZES = (1, 2, 4, 8)
TOLERANCE = {(torch.float32, "float"): 5e-6, (torch.bfloat16, "float"): 3e-2, (torch.float32, "int8"): 2e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("steps") / "tiny", tiny_config(num_attention_heads=6))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setattr(cuda_graph, "SIZES", SIZES)  # the interpreter takes seconds for more rows
    return recorded(monkeypatch)


@pytest.fixture
def model(folder: Path, recorder: Recorder) -> Glm4ForCausalLM:
    return load(folder, None, device=DEVICE, dtype=torch.float32)


def eagerly(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr(StepGraphs, "run", lambda *_: None)
        return work()


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def step(model: Glm4ForCausalLM, *spans: tuple[list[int], KVCache]) -> list[Tensor]:
    return model.step([Span(ids, cache, len(ids)) for ids, cache in spans])


def graphs(model: Glm4ForCausalLM) -> StepGraphs:
    assert isinstance(model.model.runner, FastRunner)
    return model.model.runner.graphs


def sizes(model: Glm4ForCausalLM) -> list[tuple[int, bool]]:
    """What is recorded: rows, and whether those of one sequence share what they read."""
    return sorted((size, tile > 1) for _, size, tile in graphs(model)._steps)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "kv"), list(TOLERANCE), ids=str)
def test_each_of_several_sequences_has_the_torch_codes_numbers(
    folder: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kv: str
) -> None:
    """Single ids, rows to verify and parts of prompts, in random company that joins and leaves."""
    model = load(folder, None, device=DEVICE, dtype=dtype, kv=kv)
    pool, prompts = KVPool(model, 600), random_prompts(model, 5, 90, seed=4)
    got = list(company(model, prompts, 4, pool.new))
    wanted = eagerly(monkeypatch, lambda: list(company(model, prompts, 4)))
    for (number, rows, logits), (other, other_rows, expected) in zip(got, wanted, strict=True):
        assert (number, rows) == (other, other_rows)
        if len(expected):
            assert distance(logits, expected) < TOLERANCE[dtype, kv], (number, rows)
    assert pool.free == pool.blocks
    assert CUDA or recorder.replays > 5


@pytest.mark.slow
def test_quantized_layers_serve_several_rows(folder: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:  # Triton's products take a minute in the interpreter
        monkeypatch.setattr("glm4lite_quant.linear.pick", lambda weight: REFERENCE)
    model = load(folder, "int4", device=DEVICE, dtype=torch.bfloat16)
    pool = KVPool(model, 600)

    def together(new_cache: Callable[[], KVCache]) -> list[Tensor]:
        caches = [new_cache() for _ in range(3)]
        return [logits for at in range(3) for logits in step(model, *(([at + 5], cache) for cache in caches))]

    wanted = eagerly(monkeypatch, lambda: together(model.new_cache))
    for got, expected in zip(together(pool.new), wanted, strict=True):
        assert distance(got, expected) < 3e-2
    assert sizes(model) == [(4, False)]


@pytest.mark.slow
def test_a_number_of_rows_is_recorded_once_however_contexts_grow_and_conversations_change(
    model: Glm4ForCausalLM, recorder: Recorder
) -> None:
    pool = KVPool(model, 1500)
    for conversation in range(3):
        caches = [pool.new() for _ in range(5)]
        step(model, ([conversation + 3] * (BLOCK - 2), caches[0]))
        for count in (1, 2, 3, 5, 4, 1):
            step(model, *(([9], cache) for cache in caches[:count]))
        step(model, ([1, 2, 3], caches[0]), ([4], caches[1]))
        step(model, ([1, 2, 3, 4], caches[2]))
        assert caches[0].get_seq_length() > BLOCK
        if not CUDA:
            assert recorder.recordings == 5
            assert recorder.replays == 8 * (conversation + 1)
        assert sizes(model) == [(1, False), (2, False), (4, False), (4, True), (8, False)]
    assert len({made.memory for made in graphs(model)._steps.values()}) == 1


@pytest.mark.slow
def test_the_least_size_that_holds_the_rows_is_taken(model: Glm4ForCausalLM) -> None:
    pool = KVPool(model, 600)
    caches = [pool.new() for _ in range(3)]
    for rows, recorded_sizes in (
        ([1, 2], [(4, True)]),
        ([2, 5, 1], [(4, True), (8, True)]),
        ([9], [(4, True), (8, True)]),
    ):
        step(model, *(([5] * count, cache) for count, cache in zip(rows, caches, strict=False)))
        assert sizes(model) == recorded_sizes
    assert cuda_graph.status(torch.device(DEVICE)).endswith("of 1 to 8 rows")


def places(cache: Any, begin: int) -> set[tuple[int, int]]:
    """Blocks and places of a cache's positions from `begin` on."""
    return {(cache.blocks[at // BLOCK], at % BLOCK) for at in range(begin, cache.get_seq_length())}


def test_rows_of_padding_and_other_sequences_touch_no_block_but_their_own(model: Glm4ForCausalLM) -> None:
    pool = KVPool(model, 10 * BLOCK)
    bystander, *caches = [pool.new() for _ in range(4)]
    for cache, tokens in zip((bystander, *caches), (70, 63, 64, 30), strict=True):
        step(model, ([7] * tokens, cache))
    memories = [memory for memory in pool._memory if memory is not None]
    mine = {number for cache in (bystander, *caches) for number in cache.blocks}
    for memory in memories:
        for number in set(range(pool.blocks)) - mine:
            memory.keys[number] = memory.values[number] = float("nan")  # whoever reads them, shows it
    lengths = [cache.get_seq_length() for cache in caches]
    for _ in range(2):
        before = [(memory.keys.clone(), memory.values.clone()) for memory in memories]
        for logits in step(model, *(([5], cache) for cache in caches)):  # three rows, and one of padding
            assert bool(logits.isfinite().all())
        written = set().union(*(places(cache, length) for cache, length in zip(caches, lengths, strict=True)))
        for memory, (keys, values) in zip(memories, before, strict=True):
            for old, new in ((keys, memory.keys), (values, memory.values)):
                changed = (old.nan_to_num(3) != new.nan_to_num(3)).any(-1).any(1).nonzero()
                assert {(block, place) for block, place in changed.tolist()} <= written
        lengths = [cache.get_seq_length() for cache in caches]
    assert sizes(model) == [(4, False)]


def test_what_two_sequences_share_is_read_by_both_and_written_by_neither(
    model: Glm4ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both(new_cache: Callable[[], KVCache]) -> list[Tensor]:
        first = new_cache()
        step(model, ([3] * (BLOCK + 4), first))
        second = first.copy(BLOCK + 2)
        found = step(model, ([10], first), ([20], second))
        first.truncate(BLOCK - 1)  # in what is shared: a copy of its own comes first
        return [*found, *step(model, ([30], first), ([31], second)), *step(model, ([32], second))]

    pool = KVPool(model, 600)
    wanted = eagerly(monkeypatch, lambda: both(model.new_cache))
    for got, expected in zip(both(pool.new), wanted, strict=True):
        assert distance(got, expected) < 5e-6
    assert pool.free == pool.blocks


@pytest.mark.slow
def test_caches_of_their_own_in_one_step_take_the_torch_code(
    model: Glm4ForCausalLM, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [model.new_cache() for _ in range(2)]
    for at in range(2):
        got = step(model, *(([at + 5], cache) for cache in caches))
    assert recorder.recordings == 0
    assert distance(got[0], step(model, ([5, 6], KVPool(model, 64).new()))[0][-1:]) < 5e-6


@pytest.mark.slow
def test_a_pool_that_came_in_place_of_another_is_recorded_anew(
    model: Glm4ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        pool = KVPool(model, 300)
        caches = [pool.new() for _ in range(2)]
        for at in range(2):
            got = step(model, *(([at + 5], cache) for cache in caches))
        wanted = eagerly(monkeypatch, lambda: step(model, ([5, 6], model.new_cache())))[0][-1:]
        assert all(distance(logits, wanted) < 5e-6 for logits in got)
        del pool, caches
    assert sizes(model) == [(2, False)]


@pytest.mark.slow
def test_weights_that_moved_are_noticed_where_a_sequence_begins(
    model: Glm4ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = KVPool(model, 300)
    step(model, *(([5], pool.new()) for _ in range(2)))
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight.detach() * 2, requires_grad=False)
    got = step(model, *(([5], pool.new()) for _ in range(2)))
    wanted = eagerly(monkeypatch, lambda: step(model, ([5], model.new_cache())))
    assert distance(got[1], wanted[0]) < 5e-6


@pytest.mark.slow
def test_where_several_rows_cannot_be_recorded_one_still_is(
    model: Glm4ForCausalLM, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Asking(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[0] < 2 or float(x.sum()) != 1e30 else x

    for layer in model.model.layers:
        layer.self_attn.o_proj.__class__ = Asking
    pool = KVPool(model, 300)
    with caplog.at_level(logging.WARNING, "glm4lite"):
        for count in (1, 2, 4, 2, 1):
            got = step(model, *(([5], pool.new()) for _ in range(count)))
    wanted = eagerly(monkeypatch, lambda: step(model, ([5], model.new_cache())))
    assert distance(got[0], wanted[0]) < 5e-6
    assert CUDA or recorder.replays == 2
    assert sizes(model) == [(1, False)]
    assert caplog.text.count("without a CUDA graph") == 1


class Eager(Speculation):
    """Guesses whatever it can."""

    def length(self, agreed: int, most: int, sequences: int = 1, rows: int = 1) -> int:
        return min(most, 3)


@pytest.mark.slow
@pytest.mark.parametrize("speculation", [None, Eager()], ids=["plain", "guessing"])
def test_answers_at_once_are_what_each_is_alone(
    model: Glm4ForCausalLM, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, speculation: Speculation | None
) -> None:
    chance = random.Random(2)
    asked = [[chance.choice((5, 6, 7, 8)) for _ in range(chance.randint(20, 80))] for _ in range(5)]
    params = SamplingParams(temperature=0, max_new_tokens=8)
    wanted = eagerly(monkeypatch, lambda: [list(Generation(model, prompt, params)) for prompt in asked])
    pool = PrefixPool(model, memory=model.model.cache_bytes * 64 * 8)
    scheduler = Scheduler(model, pool, parallel=3, speculation=speculation)
    made = [Generation(model, ids, params, scheduler=scheduler, speculation=speculation) for ids in asked]
    reading: list[tuple[Iterator[int], list[int]]] = []
    for generation in made:
        generation.begin()
        reading.append((iter(generation), []))
    open_ = list(reading)
    while open_:
        one = chance.choice(open_)
        token = next(one[0], None)
        if token is None:
            open_.remove(one)
        else:
            one[1].append(token)
    assert [ids for _, ids in reading] == wanted
    assert pool.blocks is not None
    assert CUDA or recorder.replays > 8
    assert any(size == 4 for size, _ in sizes(model))
    if speculation is not None:
        assert any(shared for _, shared in sizes(model))


def test_a_model_whose_layers_are_recorded_answers_several_at_once_and_another_one(
    model: Glm4ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _usual_parallel(model) == PARALLEL
    pool = PrefixPool(model).blocks
    assert pool is not None
    assert all(isinstance(part, PooledLayerCache) for part in pool.new().layers)
    monkeypatch.setenv("GLM4LITE_GPU_DECODE", "eager")
    assert _usual_parallel(model) == 1
    assert PrefixPool(model).blocks is None


def test_a_pool_that_finds_no_room_on_the_gpu_is_told_and_answers_go_on(
    model: Glm4ForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB")

    monkeypatch.setattr(kv_pool._LayerMemory, "of", full)
    with caplog.at_level(logging.WARNING, "glm4lite"):
        prefixes = PrefixPool(model)
    assert prefixes.blocks is None
    assert "finds no room (CUDA out of memory. Tried to allocate 40.00 GiB)" in caplog.text
    scheduler, params = Scheduler(model, prefixes, parallel=2), SamplingParams(temperature=0, max_new_tokens=3)
    assert len(list(Generation(model, [5, 6, 7], params, scheduler=scheduler))) == 3
