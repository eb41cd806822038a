"""bitsandbytes' format: decoded as it does bit for bit, quantized as it does, multiplied with what is held."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from glm4lite_quant import BnbConfig, BnbLinear, BnbTensor, QuantConfig, QuantError
from glm4lite_quant.bnb import QUANT_MAPS, library, quant_map

KINDS = ("nf4", "fp4")


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def from_library(weight: torch.Tensor, kind: str, double: bool, blocksize: int = 64) -> tuple[BnbTensor, Any]:
    """A weight quantized by bitsandbytes alone, and its QuantState."""
    codes, state = library().functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type=kind, compress_statistics=double
    )
    nested = (state.state2.absmax, state.state2.code, state.offset) if double else ()
    shape = (weight.shape[0], weight.shape[1])
    return BnbTensor(kind, shape, blocksize, codes.flatten(), state.absmax, quant_map(kind), *nested), state


def quantized(weight: torch.Tensor, config: BnbConfig, step: int = 16) -> BnbTensor:
    """A weight quantized by blocks of rows, as a checkpoint streams by."""
    out = BnbTensor.empty(weight.shape[0], weight.shape[1], config)
    for start in range(0, weight.shape[0], step):
        out.quantize_rows(start, weight[start : start + step])
    return out.double_quantized() if config.double_quant else out


@pytest.mark.parametrize("kind", KINDS)
def test_the_codes_mean_what_they_mean_to_bitsandbytes(kind: str) -> None:
    assert torch.equal(quant_map(kind), library().functional.get_4bit_type(kind, device="cpu"))
    assert len(QUANT_MAPS[kind]) == 16


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "blocksize"),
    [
        *(((64, 64), size) for size in (32, 64)),
        *(((257, 128), size) for size in (32, 64, 128)),
        *((shape, size) for shape in ((48, 100), (3, 33), (7, 5), (1, 1)) for size in (32, 64, 1024)),
    ],
    ids=str,
)
def test_decoding_equals_bitsandbytes_bit_for_bit(
    shape: tuple[int, int], kind: str, double: bool, blocksize: int
) -> None:
    weight, state = from_library(values(*shape), kind, double, blocksize)
    wanted = library().functional.dequantize_4bit(weight.packed[:, None], state)
    assert torch.equal(weight.dequantize(), wanted.view(shape))


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_cross_rows_are_decoded_too(kind: str, double: bool) -> None:
    """bitsandbytes 0.50.2 decodes these wrongly on a CPU with AVX-512, so it is asked with a block in each row."""
    source = values(80, 96)
    weight, _ = from_library(source, kind, double)
    flat, state = from_library(source.view(120, 64), kind, double)  # the same blocks, one a row
    wanted = library().functional.dequantize_4bit(flat.packed[:, None], state).view(80, 96)
    assert torch.equal(weight.dequantize(), wanted)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("shape", [(130, 64), (80, 96), (9, 33)], ids=str)
def test_any_rows_can_be_decoded_alone(shape: tuple[int, int], double: bool) -> None:
    weight, _ = from_library(values(*shape), "nf4", double)
    whole = weight.dequantize()
    for start, stop in ((0, 1), (1, 4), (5, shape[0]), (3, 3)):
        assert torch.equal(weight.rows(start, stop), whole[start:stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_by_blocks_of_rows_equals_bitsandbytes_on_the_whole(
    kind: str, double: bool, dtype: torch.dtype
) -> None:
    source = values(72, 192).to(dtype)
    found, (wanted, _) = quantized(source, BnbConfig(kind, double)), from_library(source, kind, double)
    assert found.tensors().keys() == wanted.tensors().keys()
    for name, tensor in found.tensors().items():
        assert torch.equal(tensor, wanted.tensors()[name]), name


def test_double_quantization_takes_an_eighth_off_and_costs_little() -> None:
    source = values(512, 512)
    plain, double = (quantized(source, BnbConfig("nf4", flag)) for flag in (False, True))
    assert 8 * plain.nbytes / source.numel() == pytest.approx(4.5, abs=0.01)
    assert 8 * double.nbytes / source.numel() == pytest.approx(4.16, abs=0.01)
    errors = [float((weight.dequantize() - source).square().mean()) for weight in (plain, double)]
    assert errors[0] <= errors[1] < 1.01 * errors[0]


def test_what_is_not_finite_is_refused_with_its_place() -> None:
    source = values(32, 64)
    source[17, 5] = float("nan")
    with pytest.raises(QuantError, match="row 17, column 5 is not a finite number"):
        quantized(source, BnbConfig())


@pytest.mark.parametrize(("start", "rows", "columns"), [(0, 16, 65), (-1, 16, 64), (24, 16, 64)])
def test_rows_that_do_not_fit_are_refused(start: int, rows: int, columns: int) -> None:
    with pytest.raises(QuantError, match="do not fit a weight of 32 x 64"):
        BnbTensor.empty(32, 64, BnbConfig()).quantize_rows(start, values(rows, columns))


def test_rows_that_cut_a_block_are_refused() -> None:
    with pytest.raises(QuantError, match="do not begin and end with blocks of 64 values"):
        BnbTensor.empty(32, 96, BnbConfig()).quantize_rows(0, values(3, 96))


# --- the layer


def layer(shape: tuple[int, int], config: BnbConfig | None = None, bias: bool = True) -> BnbLinear:
    weight, _ = from_library(values(*shape), (config or BnbConfig()).kind, (config or BnbConfig()).double_quant)
    made = BnbLinear(weight, bias)
    if made.bias is not None:
        made.bias.copy_(values(shape[0], seed=1))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [BnbConfig(k, d) for k in KINDS for d in (False, True)], ids=str)
@pytest.mark.parametrize(("shape", "kernel"), [((80, 128), "bitsandbytes"), ((80, 96), "torch")], ids=str)
def test_it_multiplies_with_the_decoded_weight(
    shape: tuple[int, int], kernel: str, config: BnbConfig, dtype: torch.dtype
) -> None:
    made, x = layer(shape, config), values(2, 3, shape[1], seed=2).to(dtype)
    assert made.bias is not None
    wanted = F.linear(x.double(), made.weight_tensor.dequantize(dtype).double(), made.bias.double())
    found = made(x)
    assert (made.kernel, found.dtype, found.shape) == (kernel, dtype, (2, 3, 80))
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert float((found.double() - wanted).norm() / wanted.norm()) < bound
    assert torch.equal(made(x[:1, :1]), made(x[:1, :1].clone()))


def test_gradients_reach_the_input() -> None:
    made, x = layer((16, 64)), values(3, 64).requires_grad_()
    made(x).sum().backward()
    torch.testing.assert_close(x.grad, made.weight_tensor.dequantize().sum(0).expand(3, 64))
    assert not list(made.parameters())


def test_casts_leave_the_stored_tensors_as_they_are() -> None:
    made, x = layer((16, 64), BnbConfig("nf4", True)), values(2, 64)
    before = made(x)
    assert torch.equal(made.to(torch.bfloat16)(x), before)
    assert torch.equal(copy.deepcopy(made)(x), before)


def test_float16_and_wrong_widths_are_refused() -> None:
    made = layer((16, 64))
    with pytest.raises(QuantError, match="float16 is refused: GLM-4 overflows it"):
        made(values(1, 64).half())
    with pytest.raises(QuantError, match="float16 is refused"):
        made.half()
    with pytest.raises(QuantError, match="has 32 columns; expected 64"):
        made(values(1, 32))


# --- the config and the package


def test_head_and_embedding_become_int8_and_the_rest_stays() -> None:
    config = BnbConfig("fp4", True)
    assert config.for_module("model.layers.0.self_attn.k_proj") == config
    assert config.for_module("model.layers.0.mlp.down_proj") == config
    for name in ("lm_head", "model.embed_tokens"):
        own = config.for_module(name)
        assert isinstance(own, QuantConfig)
        assert own.bits == 8
    assert config.for_module("score") is None
    assert config.for_module("model.norm") is None


@pytest.mark.parametrize("config", [BnbConfig(k, d) for k in KINDS for d in (False, True)], ids=str)
def test_the_config_survives_config_json(config: BnbConfig) -> None:
    assert BnbConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_in_8bit": True}, r"load_in_8bit \(LLM.int8\) is refused: its activations are float16"),
        ({"load_in_4bit": None}, "load_in_4bit is None; expected true"),
        ({"load_in_4bit": 1}, "load_in_4bit is 1; expected true"),
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type is 'int4'; expected nf4 or fp4"),
        ({"bnb_4bit_quant_type": ["nf4"]}, r"bnb_4bit_quant_type is \['nf4'\]; expected nf4 or fp4"),
        ({"bnb_4bit_use_double_quant": "yes"}, "bnb_4bit_use_double_quant is 'yes'; expected true or false"),
    ],
)
def test_a_wrong_config_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantError, match=message):
        BnbConfig.from_dict(BnbConfig().to_dict() | change)


@pytest.mark.parametrize("wrong", [{"kind": "nf5"}, {"kind": 4}, {"double_quant": "no"}])
def test_a_wrong_argument_is_said(wrong: dict[str, Any]) -> None:
    with pytest.raises(QuantError):
        BnbConfig(**wrong)


def test_its_absence_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        QuantError, match=r"nf4 and fp4 need bitsandbytes \(.*\): pip install 'glm4lite\[bnb\]'"
    ) as caught:
        library()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_importing_it_downloads_no_code_and_says_nothing() -> None:
    code = (
        "import sys, types\n"
        "hub = types.ModuleType('kernels')\n"
        "hub.get_kernel = lambda *a, **k: print('a kernel was fetched')\n"
        "sys.modules['kernels'] = hub\n"
        "from glm4lite_quant.bnb import library\n"
        "library().functional.quantize_4bit\n"
        "assert sys.modules['kernels'] is hub\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
