"""KVCache and its layers: what is appended is read back, kept over growth and cutting, in float32 and in int8."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from glm4lite.model.cache import KVCache
from glm4lite.model.config import Glm4Config
from glm4lite.model.layer_cache import STEP, LayerCache
from glm4lite.model.packed_cache import PackedLayerCache, bytes_per_token, stored_forms
from glm4lite_quant import QuantConfig, QuantTensor
from glm4lite_quant.kernels import native
from glm4lite_quant.kernels.decoder import DecoderKernel, Heads, SpanRows, run

HEADS, HIDDEN = Heads(query=4, key_value=2, dim=16, rotary_dim=8), 64
KINDS: dict[str, Callable[[], LayerCache | PackedLayerCache]] = {
    "plain": LayerCache,
    "packed": lambda: PackedLayerCache(False),
    "int8": lambda: PackedLayerCache(True),
}
needs_library = pytest.mark.skipif(native._library().cdll is None, reason="the native library was not built")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tokens(count: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, count, 16), torch.randn(batch, 2, count, 16)


def close(got: Tensor, want: Tensor, int8: bool) -> bool:
    """Exact, or within half a step of each token's and head's largest value."""
    bound = want.abs().amax(-1, keepdim=True) / 127 * 0.5001 if int8 else torch.zeros(())
    return bool(((got - want).abs() <= bound + 1e-7).all())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_appended_is_read_back_over_growth(kind: str, batch: int) -> None:
    cache, parts = KINDS[kind](), []
    for count in (1, 1, 15, 3, STEP, 1, 2 * STEP + 5):
        parts.append(tokens(count, batch))
        got = cache.append(*parts[-1])
        for which in (0, 1):
            want = torch.cat([part[which] for part in parts], 2)
            assert got[which].shape == want.shape
            assert close(got[which], want, kind == "int8")
    assert cache.length == sum(part[0].shape[2] for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_after_cutting_back_it_goes_on_from_there(kind: str) -> None:
    cache = KVCache(2, KINDS[kind])
    first, second = tokens(40), tokens(7)
    for layer in cache.layers:
        layer.append(*first)
    cache.truncate(21)
    assert cache.get_seq_length() == 21
    for layer in cache.layers:
        got = layer.append(*second)
        for which in (0, 1):
            assert close(got[which], torch.cat((first[which][:, :, :21], second[which]), 2), kind == "int8")
    cache.truncate(100)
    assert cache.get_seq_length() == 28


@pytest.mark.parametrize("fewer", [1, 19, 40, 100])
def test_crop_forgets_as_transformers_does_and_takes_a_length_as_its_older_versions_did(fewer: int) -> None:
    ours, theirs = KVCache(1), DynamicCache()
    keys, values = tokens(40)
    ours.layers[0].append(keys, values)
    theirs.update(keys, values, 0)
    ours.crop(50)
    assert ours.get_seq_length() == 40
    ours.crop(-fewer)
    theirs.crop(-fewer)
    assert ours.get_seq_length() == theirs.get_seq_length()
    ours.crop(0)
    assert ours.get_seq_length() == 0


@pytest.mark.parametrize("int8", [False, True])
def test_room_grows_in_steps_and_int8_takes_little_more_than_a_quarter(int8: bool) -> None:
    cache = PackedLayerCache(int8)
    assert cache.nbytes == 0
    cache.append(*tokens(1))
    assert cache.nbytes == 2 * 2 * STEP * (16 + 4 if int8 else 64)
    before = cache.nbytes
    cache.append(*tokens(STEP - 1))
    assert cache.nbytes == before
    cache.append(*tokens(1))
    assert cache.nbytes > before


def test_bfloat16_comes_back_as_bfloat16() -> None:
    for int8 in (False, True):
        keys, values = (part.bfloat16() for part in tokens(5))
        got = PackedLayerCache(int8).append(keys, values)
        assert all(part.dtype == torch.bfloat16 for part in got)
        assert close(got[0].float(), keys.float(), False) or int8


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39, 1e-31, 1e30])
def test_int8_codes_of_the_smallest_and_largest_values_are_no_nonsense(value: float) -> None:
    keys, values = (torch.full((1, 2, 3, 16), value) for _ in range(2))
    for got in PackedLayerCache(True).append(keys, values):
        torch.testing.assert_close(got, keys, rtol=0.01, atol=1e-30)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_no_number_stays_none_and_spoils_no_other(bad: float) -> None:
    keys, values = tokens(3)
    keys[0, 1, 1, 5] = bad
    got = PackedLayerCache(True).append(keys, values)[0]
    assert bool(got[0, 1, 1].isnan().all())
    keys[0, 1, 1] = got[0, 1, 1] = 0
    assert close(got, keys, True)


def kernel() -> DecoderKernel:
    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "gate_up": (128, 64), "down": (64, 64)}
    weights = {name: QuantTensor.quantize(torch.randn(shape) / 8, QuantConfig(8, 32)) for name, shape in shapes.items()}
    norms = {"input": torch.ones(HIDDEN), "post_attention": torch.ones(HIDDEN)}
    made = DecoderKernel.of(weights, {}, norms, 1e-5, HEADS)
    assert made is not None
    return made


def step(layer: DecoderKernel, cache: PackedLayerCache, x: Tensor) -> Tensor:
    """What the native layer makes of x [T, hidden], nothing being rotated."""
    out, flat = x.clone(), torch.zeros(len(x), HEADS.rotary_dim // 2)
    run([layer], [SpanRows(len(x), [cache.view(len(x), HEADS, x.device, x.dtype)])], out, flat + 1, flat)
    cache.length += len(x)
    return out


def stored(cache: PackedLayerCache) -> list[Tensor]:
    """The codes, and scales where there are any, of the tokens held."""
    keys, values, scales = cache._buffers()
    parts = [keys.transpose(3, 4).flatten(2, 3)[:, :, : cache.length], values[:, :, : cache.length]]
    return parts if scales is None else [*parts, scales[..., : cache.length]]


@needs_library
@pytest.mark.parametrize("int8", [False, True])
def test_tokens_appended_from_torch_are_those_the_native_code_writes(int8: bool) -> None:
    layer, x = kernel(), torch.randn(40, HIDDEN)
    written, appended = PackedLayerCache(int8), PackedLayerCache(int8)
    step(layer, written, x[:33])
    keys, values = written.append(*(torch.zeros(1, 2, 0, 16) for _ in range(2)))
    appended.append(keys, values)
    for mine, theirs in zip(stored(appended), stored(written), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(step(layer, appended, x[33:]), step(layer, written, x[33:]), rtol=1e-5, atol=1e-5)


@needs_library
@pytest.mark.parametrize("int8", [False, True])
def test_the_native_code_goes_on_after_cutting_back_and_over_growth(int8: bool) -> None:
    layer, x = kernel(), torch.randn(STEP + 20, HIDDEN)
    once, often = PackedLayerCache(int8), PackedLayerCache(int8)
    want = step(layer, once, x)
    step(layer, often, x[:50])
    step(layer, often, torch.randn(9, HIDDEN))
    often.length = 50
    got = torch.cat([step(layer, often, part) for part in x[50:].split(90)])
    torch.testing.assert_close(got, want[50:], rtol=1e-4, atol=1e-4)


@needs_library
def test_a_batch_is_not_handed_to_the_native_code() -> None:
    cache = PackedLayerCache(False)
    cache.append(*tokens(3, batch=2))
    with pytest.raises(ValueError, match="holds a batch of 2, not of one"):
        cache.view(1, HEADS, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="the cache is empty"):
        PackedLayerCache(False)._buffers()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_and_restored_in_parts_of_any_length_has_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    one, other = KINDS[kind](), KINDS[kind]()
    keys, values = (part.to(dtype) for part in tokens(3 * STEP + 7))
    one.append(keys, values)
    ends = [1, 16, 17, 100, 256, 300, one.length]
    for begin, end in zip([0, *ends], ends, strict=False):
        stored = one.stored(begin, end)
        assert all(part.shape[:3] == (2, 2, end - begin) for part in stored)
        other.restore(stored, one.length - begin if begin == 17 else 0)
        assert other.length == end
    for ours, theirs in zip(one.past() or (), other.past() or (), strict=True):
        assert torch.equal(ours, theirs)
    more = tokens(3)
    for ours, theirs in zip(one.append(*more), other.append(*more), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_has_the_forms_that_are_told_of_it(kind: str) -> None:
    cache = KINDS[kind]()
    cache.append(*tokens(40))
    config = Glm4Config(num_key_value_heads=2, num_attention_heads=4, head_dim=16, hidden_size=64)
    told = stored_forms(config, "int8" if kind == "int8" else "float", torch.float32, 9)
    stored = cache.stored(20, 29)
    assert [(tuple(part.shape), part.dtype) for part in stored] == told
    nbytes = bytes_per_token(config, "int8" if kind == "int8" else "float", 4) // config.num_hidden_layers
    assert sum(part.nbytes for part in stored) == 9 * nbytes
