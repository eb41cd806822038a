"""Caches whose blocks a pool lends: they read as caches of their own do, share what they can, and lose no block."""

from __future__ import annotations

import gc
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glm4lite import Glm4ForCausalLM, load
from glm4lite.memory.system import resident
from glm4lite.model.cache import KVCache
from glm4lite.model.layer_cache import LayerCache
from glm4lite.model.packed_cache import PackedLayerCache, stored_forms
from glm4lite.model.step import Span
from glm4lite.runtime import cuda_graph
from glm4lite.runtime.block_table import PoolFull
from glm4lite.runtime.cuda_graph import StepGraphs
from glm4lite.runtime.fused import FusedLayers
from glm4lite.runtime.kv_pool import KVPool, PoolCache, PooledLayerCache
from glm4lite_quant.kernels import native
from glm4lite_quant.kernels.decoder import BLOCK
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint
from tests.glm4lite.company import company, random_prompts

KINDS = ["float", "int8", "a GPU's float"]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Glm4ForCausalLM:
    if request.param == "a GPU's float":
        pytest.importorskip("triton", reason="triton is not installed: nothing reads a GPU's blocks")
        standing_for_a_gpu(monkeypatch)
        return load("nano", quant="none", device="cpu", dtype="float32")
    if native.backend() is None:
        pytest.skip(native.status())
    return load("nano", quant="int4", device="cpu", kv=request.param)


def standing_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's layers get a GPU's blocks, and torch's code computes them."""
    monkeypatch.setattr(cuda_graph, "records", lambda device: True)
    monkeypatch.setattr("glm4lite_quant.kernels.gpu.problem", lambda name, device: "")
    monkeypatch.setattr(StepGraphs, "run", lambda *_: None)


def needs(cache: PoolCache, tokens: int) -> int:
    """Blocks that `reserve` would take."""
    length = cache.get_seq_length()
    return cache._table.missing(length + tokens) + cache._table.held_by_others(length)


def step(model: Glm4ForCausalLM, *spans: tuple[list[int], KVCache]) -> list[Tensor]:
    return model.step([Span(ids, cache, len(ids)) for ids, cache in spans])


def same(got: Tensor, wanted: Tensor, model: Glm4ForCausalLM) -> bool:
    """To the bit; of unquantized layers up to rounding, since torch adds otherwise in products of other sizes."""
    if isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear):
        return float((got - wanted).norm()) <= 2e-6 * float(wanted.norm())
    return torch.equal(got, wanted)


@pytest.mark.parametrize("natively", [True, False])
def test_a_model_computes_the_bits_it_computes_over_caches_of_their_own(
    model: Glm4ForCausalLM, natively: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not natively:
        monkeypatch.setattr(FusedLayers, "run", lambda *_: None)
    pool, prompts = KVPool(model, 4000), random_prompts(model, 6, 300, seed=1)
    own = company(model, prompts, 1)
    for (number, rows, got), (_, _, wanted) in zip(company(model, prompts, 1, pool.new), own, strict=True):
        assert same(got, wanted, model), (number, rows)
    assert pool.free == pool.blocks


def test_forward_takes_a_pools_cache_too(model: Glm4ForCausalLM) -> None:
    ids = torch.randint(0, 1280, (1, 150), generator=torch.Generator().manual_seed(1))
    cache = KVPool(model, 200).new()
    with torch.inference_mode():
        first, second = (model(part, past_key_values=cache).logits for part in (ids[:, :100], ids[:, 100:]))
        assert same(torch.cat((first, second), 1), model(ids).logits, model)


def test_a_copy_shares_whole_blocks_and_each_writes_its_own(model: Glm4ForCausalLM) -> None:
    pool = KVPool(model, 1000)
    (ids,) = random_prompts(model, 1, 1, seed=2)
    ids = ids * 200
    cache = pool.new()
    step(model, (ids, cache))
    before = pool.free
    other = cache.copy(3 * BLOCK - 1)
    assert before - pool.free == 1  # two blocks are shared, what is left of the third was copied
    assert other.get_seq_length() == 3 * BLOCK - 1
    assert other.nbytes == 3 * pool.block_bytes
    for more in ([5] * 70, [6] * 70):
        fresh = model.new_cache()
        wanted = step(model, (ids[: 3 * BLOCK - 1] + more, fresh))[0][-70:]
        assert same(step(model, (more, other))[0], wanted, model)
        other.truncate(3 * BLOCK - 1)
    assert same(step(model, ([9], cache))[0][-1], step(model, ([*ids, 9], model.new_cache()))[0][-1], model)


def test_a_shared_block_is_copied_before_it_is_written(model: Glm4ForCausalLM) -> None:
    pool, cache = KVPool(model, 1000), None
    ids = random_prompts(model, 1, 1, seed=3)[0] * (2 * BLOCK)
    cache = pool.new()
    step(model, (ids, cache))
    other = cache.copy(2 * BLOCK)
    kept = [layer.past() for layer in other.layers]
    cache.truncate(BLOCK + 10)
    assert needs(cache, 5) == 1
    step(model, ([7] * 5, cache))
    for layer, past in zip(other.layers, kept, strict=True):
        assert all(map(torch.equal, layer.past() or (), past or ()))
    wanted = step(model, (ids[: BLOCK + 10] + [7] * 5 + [1], model.new_cache()))[0][-1:]
    assert same(step(model, ([1], cache))[0], wanted, model)


def test_a_full_pool_is_told_before_anything_is_computed(model: Glm4ForCausalLM) -> None:
    pool = KVPool(model, 3 * BLOCK)
    first, second = pool.new(), pool.new()
    step(model, ([1] * BLOCK, first), ([2] * BLOCK, second))
    with pytest.raises(PoolFull, match="1 more blocks of the KV pool are needed, 0 are free"):
        step(model, ([3], first), ([4], second))
    assert pool.free == 1
    assert [cache.get_seq_length() for cache in (first, second)] == [BLOCK, BLOCK]
    assert all(layer.length == BLOCK for cache in (first, second) for layer in cache.layers)
    step(model, ([3], first))
    with pytest.raises(PoolFull):
        second.copy(BLOCK - 1)
    del second  # whoever is preempted gives way
    assert pool.free == 1
    alone = step(model, ([1] * BLOCK, model.new_cache()))[0]
    assert same(step(model, ([1] * BLOCK, pool.new()))[0], alone, model)


def test_blocks_come_back_whatever_happens(model: Glm4ForCausalLM) -> None:
    pool = KVPool(model, 1000)

    def fail() -> None:
        raise InterruptedError

    def attempt() -> None:
        cache = pool.new()
        step(model, ([1] * 100, cache))
        copied = cache.copy(70)
        model.model.interrupt = fail
        step(model, ([2] * 100, copied))

    for _ in range(3):
        with pytest.raises(InterruptedError):
            attempt()
    model.model.interrupt = None
    gc.collect()
    assert pool.free == pool.blocks


def test_memory_is_taken_as_blocks_are_used(model: Glm4ForCausalLM) -> None:
    before = resident()
    pool = KVPool(model, (1 << 30) // model.model.cache_bytes)
    assert pool.blocks * pool.block_bytes > 1 << 29
    for _ in range(3):
        cache = pool.new()
        step(model, ([1] * 300, cache))
        del cache  # its blocks are the next one's
    assert resident() - before < 100 << 20


def test_layers_that_the_pool_has_no_memory_for_are_counted_by_tokens_alone(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path / "tiny", tiny_config()), quant="none", device="cpu")
    pool = KVPool(model, 2 * BLOCK)
    cache, own = pool.new(), model.new_cache()
    assert all(type(layer) is LayerCache for layer in cache.layers)
    ids = random_prompts(model, 1, 1, seed=1)[0] * 70
    assert torch.equal(step(model, (ids, cache))[0], step(model, (ids, own))[0])
    copied = cache.copy(64)
    assert copied.get_seq_length() == 64
    assert (pool.free, pool.block_bytes) == (0, 0)
    with pytest.raises(PoolFull):
        step(model, (ids, copied))


@pytest.mark.parametrize("kv", ["float", "int8"])
def test_what_is_stored_of_a_gpus_blocks_comes_back_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv: str
) -> None:
    """Into blocks again, or into caches of their own: kept prefixes have one form."""
    pytest.importorskip("triton", reason="triton is not installed: nothing reads a GPU's blocks")
    standing_for_a_gpu(monkeypatch)
    model = load(
        write_checkpoint(tmp_path / "tiny", tiny_config()), quant="none", device="cpu", dtype="bfloat16", kv=kv
    )
    pool = KVPool(model, 8 * BLOCK)
    cache = pool.new()
    assert all(isinstance(layer, PooledLayerCache) for layer in cache.layers)
    step(model, (random_prompts(model, 1, 1, seed=1)[0] * 150, cache))
    for other in (pool.new(), model.new_cache()):
        for layer, copied in zip(cache.layers, other.layers, strict=True):
            for begin, end in ((0, 70), (70, 150)):
                parts = layer.stored(begin, end)
                forms = [(tuple(part.shape), part.dtype) for part in parts]
                assert forms == stored_forms(model.config, model.model.kv, torch.bfloat16, end - begin)
                copied.restore(parts, 100)
            assert all(map(torch.equal, copied.past() or (), layer.past() or ()))


class Plain:
    """What a sequence should hold: the keys and values of each layer."""

    def __init__(self, layers: int, int8: bool) -> None:
        self.layers = [PackedLayerCache(int8) for _ in range(layers)]

    def copy(self, length: int) -> Plain:
        made = Plain(0, False)
        made.layers = [layer.copy(length) for layer in self.layers]
        return made


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_random_operations_keep_every_sequence_and_count_every_block(model: Glm4ForCausalLM, seed: int) -> None:
    """Against caches of their own; and a block is free, or has as many users as tables hold it."""
    pool, chance, heads = KVPool(model, 12 * BLOCK), random.Random(seed), model.model.layers[0].self_attn.heads
    generator, count = torch.Generator().manual_seed(seed), len(model.model.layers)
    held: list[tuple[PoolCache, Plain]] = []
    refused = 0
    for _ in range(250):
        what = chance.choice(("new", "write", "write", "write", "truncate", "copy", "drop"))
        if what == "new" or not held:
            held.append((pool.new(), Plain(count, model.model.kv == "int8")))
        at = chance.randrange(len(held))
        cache, plain = held[at]
        before, free = cache.get_seq_length(), pool.free
        length = chance.randint(0, before)
        if what == "write":
            tokens = chance.choice((1, 3, 64, 100))
            if needs(cache, tokens) > free:
                with pytest.raises(PoolFull):
                    cache.reserve(tokens)
                refused += 1
            else:
                write(cache, plain, tokens, heads.key_value, heads.dim, generator)
        elif what == "truncate":
            cache.truncate(length)
            for layer in plain.layers:
                layer.length = length
        elif what == "copy" and (length % BLOCK == 0 or free):
            held.append((cache.copy(length), plain.copy(length)))
        elif what == "copy":
            with pytest.raises(PoolFull):
                cache.copy(length)
        elif what == "drop":
            del held[at]
        del cache
        agree(pool, held)
    assert refused
    held.clear()
    gc.collect()
    assert pool.free == pool.blocks


def write(cache: PoolCache, plain: Plain, tokens: int, kv_heads: int, dim: int, generator: torch.Generator) -> None:
    needed, free = needs(cache, tokens), cache._table.blocks.free
    cache.reserve(tokens)
    assert free - cache._table.blocks.free == needed
    assert needs(cache, tokens) == 0
    for layer, own in zip(cache.layers, plain.layers, strict=True):
        keys, values = (torch.randn(1, kv_heads, tokens, dim, generator=generator) for _ in range(2))
        assert all(map(torch.equal, layer.append(keys, values), own.append(keys, values)))


def agree(pool: KVPool, held: list[tuple[PoolCache, Plain]]) -> None:
    users = Counter(number for cache, _ in held for number in cache._table.numbers.tolist())
    assert pool._blocks.users == [users[number] for number in range(pool.blocks)]
    assert pool.free == sum(not users[number] for number in range(pool.blocks))
    for cache, plain in held:
        assert isinstance(cache.layers[0], PooledLayerCache)
        assert len(cache._table) * BLOCK >= cache.get_seq_length() == plain.layers[0].length
        for layer, own in ((cache.layers[0], plain.layers[0]), (cache.layers[-1], plain.layers[-1])):
            for got, wanted in zip(layer.past() or (), own.past() or (), strict=True):
                assert torch.equal(got, wanted)
