"""Bits a weight, or memory to fit: which codec each module gets, that none is larger than asked, and what is said."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm4lite.base.errors import CheckpointError, ConfigError
from glm4lite.base.sizes import parse_size
from glm4lite.checkpoint.calibration_text import calibration_ids
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.codec_choice import Aim, Option, candidates_of, choose, solve
from glm4lite.checkpoint.prepare import Prepared, model_class, prepare
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.checkpoint.sensitivity import measured
from glm4lite.checkpoint.streaming import Meter
from glm4lite.cli.app import main
from glm4lite.export.export import export_checkpoint
from glm4lite.loading.plan_report import plan
from glm4lite.loading.requirements import average_bits, requirements_of
from glm4lite.measure.info import model_facts
from glm4lite.measure.inventory import kernel_names
from glm4lite.memory.budget import Budget
from glm4lite.pretrained.load import load
from glm4lite.pretrained.models import Glm4Model
from glm4lite_quant import Codec, QuantConfig, QuantTensor
from tests.glm4lite.checkpoints import tiny_config, tiny_tensors, write_checkpoint

NANO = Path(__file__).parents[2] / "glm4lite" / "nano"


def prepared(folder: Path = NANO) -> Prepared[Any]:
    checkpoint = Checkpoint.open(folder)
    return prepare(checkpoint, QuantConfig(), model_class(checkpoint))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano in 4.25 bits a weight."""
    return quantize_checkpoint(NANO, tmp_path_factory.mktemp("mixed") / "nano", aim=Aim(4.25))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


def codec_bytes(folder: Path) -> int:
    """Of all tensors that belong to quantized weights, as they lie in the files."""
    checkpoint = Checkpoint.open(folder)
    modules = [name.removesuffix(".qweight") for name in checkpoint.names() if name.endswith(".qweight")]
    parts = ("qweight", "scales", "mins", "row_scale", "row_min")
    names = [f"{module}.{part}" for module in modules for part in parts if f"{module}.{part}" in checkpoint]
    return sum(checkpoint.nbytes(name) for name in names)


# --- the solver


def test_the_choice_is_the_least_loss_that_brute_force_finds_or_a_step_from_it() -> None:
    generator = random.Random(1)
    exact = 0
    for _ in range(200):
        options = [
            [Option(generator.randint(1, 30), generator.random()) for _ in range(generator.randint(1, 5))]
            for _ in range(generator.randint(1, 5))
        ]
        least = sum(min(several)[0] for several in options)
        budget = least + generator.randint(0, 60)
        picked = [several[at] for several, at in zip(options, solve(options, budget), strict=True)]
        assert sum(option.nbytes for option in picked) <= budget
        best = min(
            sum(option.loss for option in every)
            for every in itertools.product(*options)
            if sum(option.nbytes for option in every) <= budget
        )
        loss = sum(option.loss for option in picked)
        step = max(
            max(several, key=lambda one: one.loss).loss - min(one.loss for one in several) for several in options
        )
        assert best <= loss + 1e-12
        assert loss <= best + step
        exact += loss <= best * (1 + 1e-9)
    assert exact > 150


def test_at_a_corner_of_the_hull_nothing_is_better() -> None:
    """Convex curves, as codecs have them: with what the first so many edges take the choice is the best there is."""
    curves = [[Option(4 + bits, scale * 0.25**bits) for bits in range(5)] for scale in (1.0, 7.0, 0.3)]
    edges = sorted(
        ((later.loss - one.loss) for curve in curves for one, later in itertools.pairwise(curve)),
    )
    for taken in range(len(edges) + 1):
        picked = [curve[at] for curve, at in zip(curves, solve(curves, 12 + taken), strict=True)]
        assert math.isclose(sum(option.loss for option in picked), 8.3 + sum(edges[:taken]))


def test_an_option_that_costs_more_and_loses_more_is_never_taken() -> None:
    assert solve([[Option(1, 1.0), Option(2, 3.0), Option(3, 0.5)]], 2) == [0]
    assert solve([[Option(3, 1.0), Option(3, 0.5)]], 3) == [1]


# --- what is measured


def test_the_loss_is_the_kl_divergence_that_small_errors_make(tiny: Path) -> None:
    """Of one module at a time, by the model itself, over the same tokens; to second order, so at many bits."""
    found = prepared(tiny)
    config = found.config
    ids = calibration_ids(found.checkpoint, config, None).ids[:4]
    model = load(tiny, dtype="float32")

    def log_probabilities() -> Tensor:
        with torch.inference_mode():
            return torch.cat([model(window[None]).logits[0].float() for window in ids]).log_softmax(-1)

    right = log_probabilities()
    codec = Codec(4, 32)
    plan_of, candidates = candidates_of(found, Aim(6.0))
    source = calibration_ids(found.checkpoint, config, None)
    losses = measured(found.checkpoint, plan_of, config, source, candidates, Meter("measure", 1, None)).losses
    told, true = [], []
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        for layer in range(2):
            module = f"model.layers.{layer}.{name}"
            weight: Any = model.get_submodule(module).weight
            before = weight.detach().clone()
            weight.data = QuantTensor.quantize(before, QuantConfig(4, method="search")).dequantize()
            other = log_probabilities()
            weight.data = before
            true.append(float((right.exp() * (right - other)).sum(-1).mean()))
            told.append(losses[module][codec])
    ratios = [one / other for one, other in zip(told, true, strict=True)]
    assert all(0.4 < ratio < 2.5 for ratio in ratios), ratios
    assert 0.6 < sum(told) / sum(true) < 1.6


def test_every_weight_gets_what_its_kind_may_have() -> None:
    codecs = choose(prepared(), Aim(5.0), None).codecs
    for module, codec in codecs.items():
        leaf = module.rpartition(".")[2]
        assert codec.group_size == 32 or leaf not in ("q_proj", "k_proj", "v_proj")
        assert codec.bits >= 4 or leaf not in ("lm_head", "embed_tokens")


# --- nothing is larger than was asked for


@pytest.mark.parametrize("bits", [3.5, 4.25, 6.1])
def test_bits_are_those_of_the_files_to_the_byte(bits: float, tmp_path: Path) -> None:
    folder = quantize_checkpoint(NANO, tmp_path / "q", aim=Aim(bits))
    plan_of = prepare(Checkpoint.open(folder), None, model_class(Checkpoint.open(folder))).plan
    weights = sum(math.prod(fill.shape) for fill in plan_of.fills if fill.parts)
    allowed = int(bits * weights / 8)
    assert 0 <= allowed - codec_bytes(folder) < 0.01 * allowed
    assert average_bits(Checkpoint.open(folder), plan_of) == 8 * codec_bytes(folder) / weights


@pytest.mark.parametrize(
    ("context", "kv"),
    [(512, "auto"), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((512, "int8"), (64, "float")))],
)
def test_what_fits_is_what_a_plan_counts(
    context: int, kv: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    budget = Budget(context=context, kv=kv)
    least = least_that_fits(budget)
    for size in (least, least + 300_000, least + (1 << 30)):
        folder = quantize_checkpoint(NANO, tmp_path / f"{size}", aim=Aim(None, size, budget))
        tight = kv == "auto" and size < least + (1 << 30)
        told = plan(folder, budget=replace(budget, kv="int8") if tight else budget)
        cpu = told.placement.share("cpu")
        assert told.placement.fits
        assert ("--kv int8" in caplog.text) == tight
        caplog.clear()
        assert cpu.held + cpu.mapped <= size
        if size < least + (1 << 30):
            assert size - cpu.held - cpu.mapped < 150_000


def least_that_fits(budget: Budget) -> int:
    with pytest.raises(ConfigError, match=r"the smallest that can be had takes ([0-9.]+)MiB") as caught:
        choose(prepared(), Aim(None, 1 << 20, budget), None)
    return parse_size(str(caught.value).partition("can be had takes ")[2].partition(",")[0])


def test_a_model_that_fits_while_it_loads_is_limited_to_that(capsys: pytest.CaptureFixture[str]) -> None:
    model = load(NANO, fit="1GiB", context=256)
    assert model.context == 256
    with pytest.raises(ConfigError, match=r"nano.* does not fit 300.0 MiB: the smallest that can be had takes \d+MiB"):
        load(NANO, fit="300MiB", context=256)


def test_a_plan_beforehand_takes_what_the_folder_then_does(mixed: Path) -> None:
    """A plan reads no weight, so other modules may have the bits; together they are as many."""
    told = plan(NANO, aim=Aim(4.25))
    assert told.choice is not None
    assert told.needs.quant.endswith(" bits")
    assert abs(told.needs.weight_bytes - requirements_of(Checkpoint.open(mixed)).weight_bytes) < 0.01 * codec_bytes(
        mixed
    )
    held = sum(tensor.nbytes for tensor in load(mixed).state_dict().values())
    assert plan(mixed).needs.weight_bytes == held


# --- from a checkpoint to answers


def test_a_folder_says_each_modules_codec_and_its_weights_have_it(mixed: Path) -> None:
    config = json.loads((mixed / "config.json").read_text())["quantization_config"]
    stored = QuantConfig.from_dict(config)
    assert stored.mixed
    assert config["format"] == 1
    assert any(isinstance(own, dict) and set(own) == {"bits", "group_size"} for own in config["exceptions"].values())
    assert config["calibration"]["tokens"] > 100
    model = load(mixed)
    seen = set()
    for name, module in model.named_modules():
        if hasattr(module, "weight_tensor"):
            weight = module.weight_tensor
            seen.add((weight.bits, weight.group_size))
            own = stored.for_module(name)
            assert own is not None
            assert (own.bits, own.group_size) == (weight.bits, weight.group_size)
    assert len(seen) > 2


def test_loaded_and_quantized_before_are_the_same_bytes_and_come_again(mixed: Path, tmp_path: Path) -> None:
    again = quantize_checkpoint(NANO, tmp_path / "again", aim=Aim(4.25))
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in mixed.iterdir()
    }
    with torch.inference_mode():  # measuring takes gradients all the same
        one, other = load(mixed).state_dict(), load(NANO, bits=4.25).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_its_layers_are_computed_by_the_native_kernels_and_say_what_torch_says(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(3, 40)[None]
    model = load(mixed)
    assert all(name.startswith(("native", "reference")) for name in kernel_names(model))
    layer = model.model.layers[0]
    if any(name.startswith("native") for name in kernel_names(model)):
        assert layer.runner.fuses(layer)
    with torch.inference_mode():
        found = model(ids).logits
        expected_logits = decoded(mixed)(ids).logits
    assert (found - expected_logits).abs().max() < 0.05 * expected_logits.abs().max()


def decoded(folder: Path) -> Any:
    """The same weights in float32."""
    model, coded = load(NANO, dtype="float32"), load(folder)
    for name, module in coded.named_modules():
        if hasattr(module, "weight_tensor"):
            model.get_submodule(name).weight.data = module.weight_tensor.dequantize()
    return model


def test_the_trunk_alone_and_a_tied_head_have_their_codecs(tmp_path: Path) -> None:
    tied = write_checkpoint(tmp_path / "tied", tiny_config(tie_word_embeddings=True))
    folder = quantize_checkpoint(tied, tmp_path / "q", aim=Aim(5.0))
    model: Any = load(folder)
    assert model.lm_head.weight_tensor.bits == model.model.embed_tokens.weight_tensor.bits
    trunk: Any = Glm4Model.from_pretrained(folder)
    assert torch.equal(trunk.layers[1].mlp.down_proj.qweight, model.model.layers[1].mlp.down_proj.qweight)


def test_a_chat_answers_in_mixed_bits(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(["chat", str(mixed), "-p", "What is 37 * 24?"], capsys)[0].count("888")


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What a command writes to stdout and stderr; it ends well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["glm4lite", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
    out, err = capsys.readouterr()
    assert caught.value.code in (0, None), err
    return out, err


def test_info_says_briefly_what_a_mixed_folder_holds(mixed: Path) -> None:
    stored = dict(model_facts(str(mixed)))["stored as"]
    bits, _, counted = stored.partition(" bits a weight on average: ")
    assert 4.2 < float(bits) <= 4.25
    counts = [int(one.partition(" of int")[0]) for one in counted.split("; ")]
    assert sum(counts) == len([name for name in Checkpoint.open(mixed).names() if name.endswith(".qweight")])


# --- what else takes such a folder


def test_it_is_exported_or_refused_in_a_line(mixed: Path, tmp_path: Path) -> None:
    for to, name in (("hf", "hf"), ("compressed-tensors", "ct"), ("gguf", "x.gguf")):
        written = export_checkpoint(mixed, tmp_path / name, to)
        model = load(written)
        with torch.inference_mode():
            ids = torch.arange(3, 40)[None]
            given, own = model(ids).logits.float(), load(mixed)(ids).logits
        assert (given.log_softmax(-1).exp() * (given.log_softmax(-1) - own.log_softmax(-1))).sum(-1).mean() < 0.6


# --- what is refused, in a line


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"bits": 7, "group_size": 32},
            r"bits is 7; use one of 2, 3, 4, 5, 6, 8 \(in exceptions\['model.layers.0.*'\]\)",
        ),
        ({"bits": 3, "group_size": 48}, "group_size is 48; use one of 32, 64, 128"),
        ({"bits": 3}, "expected bits and group_size"),
        ({"bits": True, "group_size": 32}, "bits is True"),
        ({"bits": 3, "group_size": 32, "kind": "vq"}, "expected bits and group_size"),
        ("3", "is '3'; use one of"),
        (2, "is stored in int., groups of .*, but config.json says int2, groups of"),
        ({"bits": 2, "group_size": 128}, "is stored in int., groups of .*, but config.json says int2, groups of 128"),
    ],
)
def test_a_config_json_that_lies_about_a_codec_is_refused(mixed: Path, own: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in mixed.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    values = json.loads((mixed / "config.json").read_text())
    exceptions = values["quantization_config"]["exceptions"]
    values["quantization_config"]["exceptions"] = {"model.layers.0.mlp.down_proj": own} | {
        name: value for name, value in exceptions.items() if name != "model.layers.0.mlp.down_proj"
    }
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises((ConfigError, CheckpointError), match=message):
        load(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "nano", "OUT", "--bits", "3.5", "--fit", "1GiB"), "bits and fit contradict each other"),
        (("quantize", "nano", "OUT", "--bits", "x"), "bits is 'x'; use a number from 2 to 8.5, such as 3.5"),
        (("quantize", "nano", "OUT", "--bits", "nan"), "bits is nan; use a number from 2 to 8.5"),
        (("quantize", "nano", "OUT", "--bits", "16"), "bits is 16; use a number from 2 to 8.5, such as 3.5"),
        (("quantize", "nano", "OUT", "--bits", "2"), r"bits is 2; .*nano takes 2\.98 at least"),
        (("quantize", "nano", "OUT", "--fit", "12"), "'12' has no unit; give a size such as 12GiB"),
        (("quantize", "nano", "OUT", "--fit", "1MiB"), "does not fit 1.0 MiB: the smallest that can be had takes"),
        (("quantize", "nano", "OUT", "--bits", "3.5", "--quant", "int8"), "--bits and --quant contradict each other"),
        (("quantize", "nano", "OUT", "--bits", "3.5", "--fast"), "--bits and --fast contradict each other"),
        (("quantize", "nano", "OUT", "--fit", "1GiB", "--group-size", "64"), "--fit and --group-size contradict"),
        (("quantize", "nano", "OUT", "--bits", "3.5", "--context", "64"), "--context and --kv are counted for --fit"),
        (("plan", "nano", "--bits", "3.5", "--quant", "int8"), "quant and bits contradict each other"),
        (("chat", "nano", "-p", "x", "--bits", "3.5", "--quant", "int8"), "quant and bits contradict each other"),
        (("pull", "org/x", "--bits", "3.5", "--quant", "int8"), "--quant and --bits contradict each other"),
        (("chat", "MIXED", "-p", "x", "--bits", "3.5"), "is quantized already; load it as it is, without bits"),
        (("plan", "MIXED", "--fit", "1GiB"), "is quantized already; plan it as it is, without fit"),
        (("quantize", "MIXED", "OUT", "--bits", "3.5"), "is quantized already; quantize the original checkpoint"),
        (("chat", "MIXED", "-p", "x", "--quant", "int4"), "is quantized to a number of bits for each weight already"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    mixed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = {"OUT": str(tmp_path / "out"), "MIXED": str(mixed)}
    monkeypatch.setattr("sys.argv", ["glm4lite", *(named.get(one, one) for one in arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    error = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2
    assert len(error) == 1, error
    assert re.search(message, error[0]), error
    assert not (tmp_path / "out").exists()


def test_a_classifier_has_no_answers_to_measure(tmp_path: Path) -> None:
    config = tiny_config(architectures=["Glm4ForSequenceClassification"])
    tensors = {**tiny_tensors(config), "score.weight": torch.randn(2, 64)}
    del tensors["lm_head.weight"]
    source = write_checkpoint(tmp_path / "c", config, tensors)
    with pytest.raises(ConfigError, match=r"bits measures a language model's answers, which .* has none of"):
        quantize_checkpoint(source, tmp_path / "q", aim=Aim(4.0))
