"""Decoder layers in one native call: the same numbers as torch's code, and every case it is not made for goes there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm4lite import Glm4ForCausalLM, KVCache, load
from glm4lite.model.attention import Visibility
from glm4lite.model.layer_cache import LayerCache
from glm4lite.model.packed_cache import PackedLayerCache
from glm4lite.runtime.runner import STEP_TOKENS
from glm4lite_quant.kernels import decoder, native
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint

pytestmark = pytest.mark.skipif(native.backend() is None, reason="the native library was not built")


@pytest.fixture(scope="module")
def nano() -> Glm4ForCausalLM:
    return load("nano", quant="int4")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each native call."""
    made: list[int] = []
    run = decoder.run

    def counted(kernels: Sequence[Any], *rest: Any) -> None:
        made.append(len(kernels))
        run(kernels, *rest)

    monkeypatch.setattr(decoder, "run", counted)
    return made


def ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1280, (1, count), generator=torch.Generator().manual_seed(seed))


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def logits(model: Glm4ForCausalLM, tokens: Tensor, **arguments: Any) -> Tensor:
    with torch.inference_mode():
        return model(tokens, **arguments).logits


def test_a_quantized_model_on_the_cpu_keeps_the_native_cache(nano: Glm4ForCausalLM) -> None:
    assert all(isinstance(layer, PackedLayerCache) for layer in nano.new_cache().layers)
    assert all(isinstance(layer, LayerCache) for layer in load("nano").new_cache().layers)


def test_one_layer_gives_the_torch_codes_numbers(nano: Glm4ForCausalLM) -> None:
    # A rounding difference of 1e-7 may move an int8 code of the activations, of one row in many and in one layer.
    layer, x = nano.model.layers[0], torch.randn(8, 1, 5, 256, generator=torch.Generator().manual_seed(1))
    rotary = nano.model.rotary_emb(torch.arange(5)[None], torch.float32)
    visible = Visibility(None, 0, 5, x.device)
    off = []
    with torch.inference_mode():
        for one in x:
            fused, _ = layer(one, torch.float32, rotary, visible, PackedLayerCache(int8=False), False)
            plain, _ = layer(one, torch.float32, rotary, visible, LayerCache(), False)
            off += (fused - plain).abs().amax(-1).flatten().tolist()
    assert sum(row > 2e-5 for row in off) <= 2
    assert max(off) < 0.03


def test_a_model_differs_from_torchs_code_by_the_rounding_of_activations_only(nano: Glm4ForCausalLM) -> None:
    plain = logits(nano, ids(300), past_key_values=KVCache(5))
    assert distance(logits(nano, ids(300)), plain) < 0.03


def test_a_prompt_in_parts_gives_the_bits_of_the_whole(nano: Glm4ForCausalLM) -> None:
    cache = nano.new_cache()
    edges = (0, 1, 3, 200, 201, 260)
    parts = [logits(nano, ids(260)[:, a:b], past_key_values=cache) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(parts, 1), logits(nano, ids(260)))


def test_few_tokens_go_through_all_layers_in_one_call_and_many_layer_by_layer(
    nano: Glm4ForCausalLM, calls: list[int]
) -> None:
    cache = nano.new_cache()
    logits(nano, ids(STEP_TOKENS + 1), past_key_values=cache)
    assert calls == [1] * 5
    logits(nano, ids(1), past_key_values=cache)
    assert calls == [1] * 5 + [5]


def test_a_hook_on_a_layer_is_still_called(nano: Glm4ForCausalLM) -> None:
    seen = []
    handle = nano.model.layers[2].register_forward_hook(lambda *_: seen.append(1))
    logits(nano, ids(1))
    handle.remove()
    assert seen == [1]


def test_what_the_native_call_is_not_made_for_goes_to_torch(nano: Glm4ForCausalLM, calls: list[int]) -> None:
    padding = torch.ones(1, 20)
    padding[0, :3] = 0
    logits(nano, ids(20), attention_mask=padding)
    logits(nano, ids(20), output_attentions=True)
    logits(nano, ids(40).view(2, 20))
    logits(nano, ids(20), past_key_values=KVCache(5))
    logits(nano, ids(20), use_cache=False)
    embeds = nano.model.embed_tokens(ids(20)).requires_grad_()
    nano(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None
    assert calls == []


def test_another_activation_than_silu_goes_to_torch(tmp_path: Path) -> None:
    for name in ("silu", "gelu"):
        write_checkpoint(tmp_path / name, tiny_config(hidden_act=name))
    silu, gelu = (load(tmp_path / name, quant="int8") for name in ("silu", "gelu"))
    assert silu.model.runner.fuses(silu.model.layers[0])
    assert not gelu.model.runner.fuses(gelu.model.layers[0])
    assert distance(logits(gelu, ids(20) % 100), logits(silu, ids(20) % 100)) > 1e-3


def test_an_all_ones_mask_changes_nothing(nano: Glm4ForCausalLM) -> None:
    assert torch.equal(logits(nano, ids(20), attention_mask=torch.ones(1, 20)), logits(nano, ids(20)))


def test_given_embeddings_are_not_written_into(nano: Glm4ForCausalLM) -> None:
    with torch.inference_mode():
        embeds = nano.model.embed_tokens(ids(4))
        kept = embeds.clone()
        nano(inputs_embeds=embeds)
    assert torch.equal(embeds, kept)


def test_weights_that_moved_are_found_again(nano: Glm4ForCausalLM) -> None:
    before = logits(nano, ids(3))
    nano.share_memory()
    assert torch.equal(logits(nano, ids(3)), before)


def test_an_int8_cache_costs_little_and_takes_a_quarter(nano: Glm4ForCausalLM) -> None:
    whole = nano.new_cache()
    plain = logits(nano, ids(300), past_key_values=whole)
    nano.model.kv = "int8"
    try:
        cache = nano.new_cache()
        assert distance(logits(nano, ids(300), past_key_values=cache), plain) < 0.05
    finally:
        nano.model.kv = "float"
    assert cache.nbytes < 0.3 * whole.nbytes
