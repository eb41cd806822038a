"""QuantLinear and QuantEmbedding as modules: casts, moves, copies, state dicts, gradients, wrong inputs."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from glm4lite_quant import QuantConfig, QuantEmbedding, QuantError, QuantLinear, QuantTensor


def filled(n: int = 40, k: int = 128, bits: int = 4, bias: bool = True) -> QuantLinear:
    torch.manual_seed(0)
    own = QuantLinear(k, n, QuantConfig(bits), bias)
    own.load(QuantTensor.quantize(torch.randn(n, k), own.config))
    if own.bias is not None:
        own.bias.copy_(torch.randn(n))
    return own


def types(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: t.dtype for name, t in module.state_dict().items()}


def test_the_buffers_have_the_names_of_the_format() -> None:
    assert set(filled().state_dict()) == {"qweight", "scales", "mins", "row_scale", "row_min", "bias"}
    assert set(filled(bits=8, bias=False).state_dict()) == {"qweight", "scales", "row_scale"}
    assert not list(filled().parameters())


def test_a_layer_is_close_to_the_linear_it_replaces() -> None:
    torch.manual_seed(1)
    linear, x = nn.Linear(256, 96).requires_grad_(False), torch.randn(4, 7, 256)
    for bits, tolerance in ((4, 0.12), (8, 0.012)):
        own = QuantLinear(256, 96, QuantConfig(bits), bias=True)
        own.load(QuantTensor.quantize(linear.weight, own.config))
        own.bias = linear.bias
        want = linear(x)
        assert float((own(x) - want).norm() / want.norm()) < tolerance


@pytest.mark.parametrize("cast", ["bfloat16", "double", "float"])
def test_casting_a_model_leaves_the_stored_tensors_alone(cast: str) -> None:
    model = nn.Sequential(filled(), nn.LayerNorm(40))
    x = torch.randn(3, 128)
    before, want = types(model[0]), model[0](x)
    getattr(model, cast)()
    assert types(model[0]) == before
    assert torch.equal(model[0](x), want)
    assert model[1].weight.dtype == getattr(torch, cast)
    model.type(torch.float64)
    assert types(model[0]) == before


def test_float16_is_refused_with_the_reason() -> None:
    own = filled()
    for attempt in (own.half, lambda: own.to(torch.float16), lambda: own(torch.zeros(1, 128, dtype=torch.float16))):
        with pytest.raises(QuantError, match="float16 is refused: GLM-4 overflows it"):
            attempt()
    assert types(own)["row_scale"] == torch.float32
    with pytest.raises(QuantError, match="float16"):
        QuantEmbedding(8, 32, QuantConfig(8)).half()
    with pytest.raises(QuantError, match="float16"):
        QuantEmbedding(8, 32, QuantConfig(8), dtype=torch.float16)


def test_wrong_inputs_are_named() -> None:
    own = filled()
    with pytest.raises(QuantError, match="127 columns; expected 128"):
        own(torch.zeros(1, 127))
    with pytest.raises(QuantError, match=r"torch\.int64"):
        own(torch.zeros(1, 128, dtype=torch.long))
    with pytest.raises(QuantError, match="does not fit a layer"):
        own.load(QuantTensor.empty(41, 128, QuantConfig()))
    with pytest.raises(QuantError, match="does not fit a layer"):
        own.load(QuantTensor.empty(40, 128, QuantConfig(8)))
    with pytest.raises(QuantError, match="groups of 128"):
        QuantLinear(96, 16, QuantConfig(4, 128), bias=False)


def test_a_skeleton_on_meta_takes_a_weight_later() -> None:
    own = QuantLinear(128, 40, QuantConfig(), bias=True, device="meta")
    assert all(t.device.type == "meta" for t in own.buffers())
    with pytest.raises(QuantError, match="no weight yet"):
        own(torch.zeros(1, 128))
    source = filled()
    own.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 128)
    assert torch.equal(own(x), source(x))


def test_new_weights_are_used_at_once() -> None:
    own, other, x = filled(), filled(), torch.randn(2, 128)
    torch.manual_seed(9)
    other.load(QuantTensor.quantize(torch.randn(40, 128), other.config))
    first = own(x)
    own.load(other.weight_tensor)
    assert torch.equal(own(x), other(x))
    assert not torch.equal(own(x), first)
    own.load_state_dict(filled().state_dict())  # copies in place, into the tensors of `other` too
    assert torch.equal(own(x), first)


def test_copies_and_pickles_own_their_memory() -> None:
    own, x = filled(), torch.randn(2, 128)
    want = own(x)
    twin = copy.deepcopy(own)
    file = io.BytesIO()
    torch.save(own, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    own.qweight.zero_()
    assert torch.equal(twin(x), want)
    assert torch.equal(read(x), want)


def test_gradients_reach_the_input() -> None:
    own = filled()
    x = torch.randn(3, 128, requires_grad=True)
    own(x).square().sum().backward()
    dense = own.weight_tensor.dequantize()
    assert own.bias is not None
    y = x.detach() @ dense.T + own.bias
    torch.testing.assert_close(x.grad, 2 * y @ dense, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        assert not own(x).requires_grad


def test_head_and_embedding_share_one_weight() -> None:
    table = QuantTensor.quantize(torch.randn(50, 64), QuantConfig(8))
    head, embedding = QuantLinear(64, 50, QuantConfig(8), bias=False), QuantEmbedding(50, 64, QuantConfig(8))
    head.load(table)
    embedding.load(table)
    assert head.qweight.data_ptr() == embedding.qweight.data_ptr() == table.qweight.data_ptr()
    ids = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(embedding(ids), table.dequantize()[ids])


def test_an_embedding_follows_casts_in_what_it_gives() -> None:
    own = QuantEmbedding(20, 64, QuantConfig(8), dtype=torch.bfloat16)
    own.load(QuantTensor.quantize(torch.randn(20, 64), QuantConfig(8)))
    assert own(torch.tensor([1])).dtype == torch.bfloat16
    before = types(own)
    own.float()
    assert own(torch.tensor([1])).dtype == torch.float32
    assert types(own) == before
    for bad in (-1, 20, 31):
        with pytest.raises(IndexError):
            own(torch.tensor([bad]))


def test_repr_says_bits_and_group() -> None:
    assert "int4, group=32" in repr(filled())
    assert "in=128, out=40" in repr(filled())
    assert "int8, group=32" in repr(QuantEmbedding(20, 64, QuantConfig(8)))


def test_a_layer_whose_memory_moved_computes_the_same() -> None:
    torch.manual_seed(0)
    layer = QuantLinear(64, 48, QuantConfig(4, 32), bias=False)
    layer.load(QuantTensor.quantize(torch.randn(48, 64), QuantConfig(4, 32)))
    x = torch.randn(2, 64)
    before = layer(x)
    layer.share_memory()  # moves the storage inside the same tensors
    junk = [torch.randn(48, 64) for _ in range(50)]
    assert torch.equal(layer(x), before), len(junk)
