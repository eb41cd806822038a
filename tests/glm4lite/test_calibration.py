"""Calibration while a checkpoint streams: what is recorded, what is refused, and that it is the layers' own inputs."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm4lite.base.errors import CheckpointError, ConfigError
from glm4lite.base.events import Progress
from glm4lite.checkpoint import calibration, calibration_text
from glm4lite.checkpoint.calibration import Calibrator, layer_bytes
from glm4lite.checkpoint.calibration_text import BUNDLED, calibration_ids
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.load_plan import make_load_plan, read_config, skeleton
from glm4lite.checkpoint.prepare import model_class
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.cli.app import main
from glm4lite.pretrained.load import load
from glm4lite.pretrained.models import Glm4ForTokenClassification
from glm4lite_quant import Inputs, QuantConfig, QuantTensor
from glm4lite_quant.inputs import mean_square
from tests.glm4lite.checkpoints import legacy_checkpoint, tiny_config, tiny_tensors, write_checkpoint

TEXT = "What is 37 * 24? 今天天气很好。<|user|>\nprint('hello')\n" * 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def calibrator(folder: Path, text: str | None = None) -> tuple[Calibrator, Any]:
    checkpoint = Checkpoint.open(folder)
    config = read_config(checkpoint)
    plan = make_load_plan(skeleton(config, model_class(checkpoint)), checkpoint, QuantConfig())
    source = calibration_ids(checkpoint, config, text)
    return Calibrator(checkpoint, plan, config, source, lambda: None), plan


def inputs_of_the_whole_model(folder: Path, ids: Tensor) -> dict[str, Tensor]:
    """The inputs of each linear [tokens, K], from the loaded model itself."""
    model = load(folder, dtype="float32")
    found: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def note(_: Any, given: tuple[Tensor, ...], name: str = name) -> None:
                found.setdefault(name, []).append(given[0].flatten(0, -2))

            module.register_forward_pre_hook(note)
    with torch.inference_mode():
        for window in ids:
            model(window[None])
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"model_type": "glm"}, {"tie_word_embeddings": True}, {"intermediate_size": 100}],
    ids=str,
)
def test_inputs_are_what_enters_each_layer(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path / "c", tiny_config(**changes))
    own, plan = calibrator(folder)
    source = calibration_ids(Checkpoint.open(folder), read_config(Checkpoint.open(folder)), None)
    expected = inputs_of_the_whole_model(folder, source.ids)
    seen = 0
    for fill in plan.fills:
        if fill.quant is None:
            continue
        weight, inputs = own.take(fill)
        if fill.quant.bits == 4:
            assert weight is not None
            assert inputs is not None
            assert inputs.shape == (source.ids.numel(), fill.shape[1])
            assert torch.equal(weight, Checkpoint.open(folder).tensor(fill.source))
            exact = expected[fill.module]
            assert float((inputs - exact).norm()) < 0.02 * float(exact.norm())  # bfloat16's rounding
            seen += 1
    assert seen == 2 * (3 if "intermediate_size" in changes else 4)


def test_a_layer_of_float32_is_held_in_half_and_quantized_from_its_own_values(tmp_path: Path) -> None:
    tensors = tiny_tensors(tiny_config(), dtype=torch.float32)
    folder, rounded = write_checkpoint(tmp_path / "c", tensors=tensors), write_checkpoint(tmp_path / "r")
    (own, plan), (other, _) = calibrator(folder), calibrator(rounded)
    assert layer_bytes(Checkpoint.open(folder), plan) == layer_bytes(Checkpoint.open(rounded), plan)
    model = load(folder, quant="int4")
    for fill in (fill for fill in plan.fills if fill.quant is not None and fill.quant.bits == 4):
        weight, inputs = own.take(fill)
        again = other.take(fill)[1]
        assert weight is None
        assert inputs is not None
        assert again is not None
        torch.testing.assert_close(mean_square(inputs), mean_square(again), rtol=0.05, atol=1e-3)
        n, k = fill.shape
        made = QuantTensor.empty(n, k, fill.quant)
        made.quantize_rows(0, tensors[fill.source], Inputs.of(inputs))
        assert torch.equal(made.qweight, model.state_dict()[f"{fill.module}.qweight"])


def test_an_older_checkpoint_and_its_new_form_give_the_same_codes(tmp_path: Path) -> None:
    config = tiny_config(model_type="glm")
    tensors = tiny_tensors(config)
    new, old = write_checkpoint(tmp_path / "new", config, tensors), legacy_checkpoint(tmp_path / "old", config, tensors)
    one, other = (load(source, quant="int4").state_dict() for source in (new, old))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_calibrated_codes_differ_from_searched_ones_and_come_again(folder: Path) -> None:
    first, again, plain = (load(folder, quant=quant) for quant in ("int4", "int4", QuantConfig(4, method="search")))
    name = "model.layers.1.mlp.down_proj.qweight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], plain.state_dict()[name])


def test_a_classifier_is_calibrated_too(tmp_path: Path) -> None:
    config = tiny_config(architectures=["Glm4ForTokenClassification"])
    tensors = tiny_tensors(config) | {"score.weight": torch.randn(2, 64), "score.bias": torch.ones(2)}
    del tensors["lm_head.weight"]
    source = write_checkpoint(tmp_path / "bf16", config, tensors)
    model = Glm4ForTokenClassification.from_pretrained(source, quant="int4")
    assert model.config.quantization_config["calibration"]["tokens"] > 0


def test_float16_and_float32_checkpoints_are_calibrated(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float32):
        source = write_checkpoint(tmp_path / str(dtype), tensors=tiny_tensors(tiny_config(), dtype=dtype))
        assert load(source, quant="int4").config.quantization_config["method"] == "calibrated"


def test_the_multiplication_type_changes_little(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "matmul_dtype", lambda: torch.float32)
    exact, plan = calibrator(folder)
    monkeypatch.setattr(calibration, "matmul_dtype", lambda: torch.bfloat16)
    rounded, _ = calibrator(folder)
    for fill in (fill for fill in plan.fills if fill.quant is not None and fill.quant.bits == 4):
        (_, one), (_, other) = exact.take(fill), rounded.take(fill)
        assert one is not None
        assert other is not None
        torch.testing.assert_close(mean_square(one), mean_square(other), rtol=0.05, atol=1e-3)


# --- what is written down


def test_config_json_says_what_was_used(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text(TEXT, encoding="utf-8")
    for text, path in ((BUNDLED.read_text(encoding="utf-8"), None), (TEXT, own)):
        written = quantize_checkpoint(folder, tmp_path / f"q-{path is None}", "int4", calibration=path)
        made = record(written)
        assert made["method"] == "calibrated"
        assert made["calibration"]["source"] == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        assert made["calibration"]["tokens"] > 100
        assert load(written).config.quantization_config == made
    for method in ("search", "minmax"):
        made = record(quantize_checkpoint(folder, tmp_path / method, QuantConfig(4, method=method)))
        assert (made["method"], "calibration" in made) == (method, False)
    made = record(quantize_checkpoint(folder, tmp_path / "int8", "int8"))
    assert (made["method"], "calibration" in made) == ("absmax", False)


def test_a_folder_written_before_methods_were_recorded_loads(folder: Path, tmp_path: Path) -> None:
    written = quantize_checkpoint(folder, tmp_path / "q", QuantConfig(4, method="search"))
    values = json.loads((written / "config.json").read_text())
    del values["quantization_config"]["method"]
    (written / "config.json").write_text(json.dumps(values))
    for quant in (None, "int4", QuantConfig(4, method="calibrated")):
        assert load(written, quant=quant).config.quantization_config["method"] == "search"


def test_without_a_tokenizer_ids_are_random_and_it_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "tokenizer.json").unlink()
    made = record(quantize_checkpoint(folder, tmp_path / "q", "int4"))
    assert made["calibration"]["source"] == "random ids: no usable tokenizer.json"
    assert caplog.messages[0].startswith("calibrated with random token ids: ")
    assert "tokenizer.json: not found" in caplog.messages[0]


def test_a_tokenizer_of_a_larger_model_is_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Checkpoint.open(folder)
    config = read_config(checkpoint)
    config.vocab_size = 300
    ids = calibration_ids(checkpoint, config, None).ids
    assert int(ids.max()) < 300
    assert "has 384 tokens, more than config.json's 300" in caplog.messages[0]


def test_windows_are_spread_over_a_long_text_and_begin_with_the_prefix(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    source = calibration_ids(checkpoint, read_config(checkpoint), "a b c d e f g " * 4000)
    assert source.ids.shape == (calibration_text.TOKENS // 512, 512)
    assert source.ids[:, :2].tolist() == [[372, 374]] * len(source.ids)
    short = calibration_ids(checkpoint, read_config(checkpoint), "Hi")
    assert short.ids.shape[0] == 1
    assert short.record.tokens == short.ids.numel() < 10


def test_the_bundled_text_is_of_every_kind() -> None:
    text = BUNDLED.read_text(encoding="utf-8")
    assert 12_000 < len(text.encode()) < 24_000
    for part in ("<|observation|>", "在调用上述函数时", "def ", "SELECT", "#include", "the "):
        assert part in text


# --- what is refused, and what is left behind


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe", "is not UTF-8"), (None, "cannot be read: No such file")],
)
def test_a_calibration_file_that_cannot_be_used_is_refused_before_any_work(
    folder: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    for call in (
        lambda: quantize_checkpoint("org/absent", tmp_path / "q", "int4", calibration=file),
        lambda: load("org/absent", quant="int4", calibration=file),
    ):
        with pytest.raises(ConfigError, match=f"the calibration text {file} {message}"):
            call()
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("quant", ["int8", QuantConfig(4, method="search"), QuantConfig(4, method="minmax")])
def test_a_calibration_text_that_nothing_needs_is_refused(folder: Path, tmp_path: Path, quant: Any) -> None:
    with pytest.raises(ConfigError, match=r"a calibration text is given, but the method '.*' needs none"):
        quantize_checkpoint(folder, tmp_path / "q", quant, calibration=BUNDLED)
    with pytest.raises(ConfigError, match="a calibration text is given, but nothing is quantized"):
        load(folder, calibration=BUNDLED)


def test_a_calibration_text_needs_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"the calibration text cannot be used: .*tokenizer.json: not found"):
        quantize_checkpoint(folder, tmp_path / "q", "int4", calibration=BUNDLED)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--calibration", "t.txt", "--fast"), "--calibration and --fast contradict each other"),
        (("--calibration", "t.txt", "--no-calibration"), "--calibration and --no-calibration contradict each other"),
        (("--calibration", "t.txt"), "the calibration text t.txt cannot be read: No such file or directory"),
        (("--calibration", "t.txt", "--quant", "int8"), "a calibration text is given, but the method 'absmax'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["glm4lite", "quantize", "nano", "out", *options])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("option", "method"), [("--fast", "minmax"), ("--no-calibration", "search")])
def test_the_commands_flags_choose_the_method(
    folder: Path, tmp_path: Path, option: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["glm4lite", "quantize", str(folder), str(tmp_path / "q"), option])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code in (0, None)
    assert record(tmp_path / "q")["method"] == method


def test_a_stop_in_mid_calibration_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    events: list[Progress] = []

    def stop(event: Progress) -> None:
        events.append(event)
        if len(events) > 3 and events[-1].done == events[-2].done > 0:  # asked without progress: a layer is running
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(folder, tmp_path / "q", "int4", stop)
    assert sorted(tmp_path.iterdir()) == before


def test_activations_that_overflow_are_said_and_the_weight_is_searched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = tiny_tensors(tiny_config(model_type="glm"))
    tensors["model.layers.0.input_layernorm.weight"][:] = 3e38
    source = write_checkpoint(tmp_path / "c", tiny_config(model_type="glm"), tensors)
    model = load(source, quant="int4")
    plain = QuantTensor.quantize(tensors["model.layers.0.self_attn.q_proj.weight"], QuantConfig(4, method="search"))
    assert torch.equal(model.state_dict()["model.layers.0.self_attn.q_proj.qweight"], plain.qweight)
    assert "model.layers.0.self_attn.q_proj.weight: its calibration inputs are not finite" in caplog.messages[0]
