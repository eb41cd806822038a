"""Loading: what ends up in the model, in which type, quantized or not, from every kind of checkpoint."""

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glm4lite.base.errors import ContextLengthError
from glm4lite.base.events import Progress
from glm4lite.checkpoint import streaming
from glm4lite.engine.engine import Engine
from glm4lite.loading.plan_report import plan
from glm4lite.measure.info import model_facts
from glm4lite.memory import system
from glm4lite.memory.budget import Budget
from glm4lite.pretrained.load import load
from glm4lite.pretrained.models import (
    Glm4ForCausalLM,
    Glm4ForSequenceClassification,
    Glm4ForTokenClassification,
    Glm4Model,
)
from glm4lite_quant import QuantConfig, QuantEmbedding, QuantError, QuantLinear, QuantTensor, host
from tests.glm4lite.checkpoints import legacy_checkpoint, tiny_config, tiny_tensors, write_checkpoint

IDS = torch.tensor([[372, 374, 377, 10, 65, 70, 378]])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


def test_an_unquantized_model_holds_the_checkpoints_tensors(folder: Path) -> None:
    model: Any = load(folder)
    assert isinstance(model, Glm4ForCausalLM)
    assert not model.training
    tensors = tiny_tensors(tiny_config())
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert torch.equal(state[name], expected), name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_dtype_is_the_checkpoints_unless_asked_for(folder: Path, tmp_path: Path) -> None:
    wide = write_checkpoint(tmp_path / "f32", tensors=tiny_tensors(tiny_config(), dtype=torch.float32))
    assert {value.dtype for value in load(folder).parameters()} == {torch.bfloat16}
    assert {value.dtype for value in load(wide).parameters()} == {torch.float32}
    assert {value.dtype for value in load(folder, dtype="float32").parameters()} == {torch.float32}
    assert {value.dtype for value in load(wide, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_float16_checkpoint_is_widened_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = tiny_tensors(tiny_config(), dtype=torch.float16)
    folder = write_checkpoint(tmp_path, tensors=tensors)
    model = load(folder)
    assert caplog.messages == [f"{folder} stores float16: read as float32, because GLM-4 overflows float16"]
    assert torch.equal(model.state_dict()["model.norm.weight"], tensors["model.norm.weight"].float())
    assert load(folder, quant="int4").get_submodule("lm_head")


@pytest.mark.parametrize(
    "config", [QuantConfig(4, method="search"), QuantConfig(4, method="minmax"), QuantConfig(8)], ids=lambda c: c.method
)
def test_streamed_weights_equal_weights_quantized_whole(
    folder: Path, config: QuantConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 64 * 2 * 48)
    model = load(folder, quant=config)
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            weight = tiny_tensors(tiny_config())[f"{name}.weight"]
            rule = config.for_module(name)
            assert rule is not None
            for part, expected in QuantTensor.quantize(weight, rule).tensors().items():
                assert torch.equal(module.state_dict()[part], expected), (name, part)
            count += 1
    assert count == 2 * 6 + 2


def test_a_quantized_model_keeps_small_tensors_in_float32(folder: Path) -> None:
    model: Any = load(folder, quant="int4")
    floats = {name for name, value in model.state_dict().items() if value.dtype != torch.uint8}
    assert {model.state_dict()[name].dtype for name in floats} == {torch.float32}
    expected = tiny_tensors(tiny_config())["model.layers.0.self_attn.q_proj.bias"].float()
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, expected)
    assert not any(value.requires_grad for value in model.parameters())
    assert logits(model).dtype == torch.float32
    assert logits(load(folder, quant="int4", dtype="bfloat16")).dtype == torch.bfloat16


def test_int8_logits_are_near_the_unquantized_ones(folder: Path) -> None:
    exact = logits(load(folder, dtype="float32"))
    error = (logits(load(folder, quant="int8")) - exact).norm() / exact.norm()
    assert error < 0.05


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_tied_head_is_the_embedding(tmp_path: Path, dtype: str) -> None:
    folder = write_checkpoint(tmp_path, tiny_config(tie_word_embeddings=True))
    plain: Any = load(folder, dtype=dtype)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    quantized: Any = load(folder, quant="int8")
    assert quantized.lm_head.qweight.data_ptr() == quantized.model.embed_tokens.qweight.data_ptr()
    error = (logits(quantized) - logits(plain)).norm() / logits(plain).float().norm()
    assert error < 0.05


def test_a_stored_head_of_a_tied_model_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_checkpoint(tmp_path, tiny_config(tie_word_embeddings=True), tiny_tensors(tiny_config()))
    model: Any = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert caplog.messages == ["lm_head.weight is not used: the config ties the head to the embedding"]


def test_layers_of_odd_width_stay_and_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_checkpoint(tmp_path, tiny_config(intermediate_size=100))
    model: Any = load(folder, quant="int4")
    assert caplog.messages == [
        "not quantized, because their input width is not a multiple of 32: "
        "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj"
    ]
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[0].mlp.gate_up_proj, QuantLinear)
    assert logits(model).isfinite().all()


def test_a_legacy_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    config = tiny_config(model_type="glm", architectures=["GlmForCausalLM"])
    tensors = tiny_tensors(config)
    today = load(write_checkpoint(tmp_path / "hf", config, tensors))
    legacy = load(legacy_checkpoint(tmp_path / "legacy", config, tensors))
    assert torch.equal(logits(legacy), logits(today))


def test_a_classifier_from_a_chat_checkpoint_starts_a_new_head_and_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = Glm4ForSequenceClassification.from_pretrained(folder)
    assert caplog.messages == [
        "lm_head.weight is not used: Glm4ForSequenceClassification has no such head",
        "score.weight is not in the checkpoint and starts from random values: train it before use",
    ]
    assert model.score.weight.shape == (2, 64)
    assert 0 < model.score.weight.float().std() < 0.1
    assert logits(model).shape == (1, 2)


@pytest.mark.parametrize("quant", [None, "int4"])
def test_a_stored_classification_head_is_read(tmp_path: Path, quant: str | None) -> None:
    config = tiny_config(architectures=["Glm4ForTokenClassification"], num_labels=3)
    tensors = tiny_tensors(config)
    del tensors["lm_head.weight"]
    tensors |= {"score.weight": torch.randn(3, 64).bfloat16(), "score.bias": torch.ones(3).bfloat16()}
    model: Any = Glm4ForTokenClassification.from_pretrained(write_checkpoint(tmp_path, config, tensors), quant=quant)
    assert torch.equal(model.score.weight.bfloat16(), tensors["score.weight"])
    assert logits(model).shape == (1, 7, 3)


def test_a_token_classifiers_dropout_is_the_configs(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_config(hidden_dropout=0.25))
    assert Glm4ForTokenClassification.from_pretrained(folder).dropout.p == 0.25


def test_the_bare_trunk_is_loaded_too(folder: Path) -> None:
    trunk = Glm4Model.from_pretrained(folder)
    assert torch.equal(trunk.state_dict()["norm.weight"], tiny_tensors(tiny_config())["model.norm.weight"])
    assert isinstance(Glm4Model.from_pretrained(folder, quant="int4").get_submodule("embed_tokens"), QuantEmbedding)


def test_progress_counts_every_byte_once(folder: Path) -> None:
    events: list[Progress] = []
    load(folder, quant="int4", progress=events.append)
    size = sum(tensor.nbytes for tensor in tiny_tensors(tiny_config()).values())
    done = [event.done for event in events]
    assert done == sorted(done)
    assert events[-1] == Progress("load", size, size, "bytes")


def test_an_exception_from_progress_stops_the_load(folder: Path) -> None:
    class Stop(Exception):
        pass

    calls = []

    def stop(event: Progress) -> None:
        calls.append(event)
        if len(calls) == 3:
            raise Stop

    with pytest.raises(Stop):
        load(folder, quant="int4", progress=stop)
    assert len(calls) == 3


def test_a_good_load_says_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "glm4lite"):
        load(folder, quant="int4")
    assert caplog.messages == []


GIB = 1 << 30


def cgroups(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


CGROUPS: dict[str, tuple[str, dict[str, str], int]] = {
    "v2, a container": ("0::/\n", {"memory.max": f"{GIB}", "memory.current": f"{GIB // 2}"}, GIB // 2),
    "v2, cache can be dropped": (
        "0::/\n",
        {"memory.max": f"{GIB}", "memory.current": f"{GIB}", "memory.stat": f"anon 5\nfile {GIB // 4}\n"},
        GIB // 4,
    ),
    "v2, a limit further up": (
        "0::/a/b\n",
        {"a/memory.max": f"{GIB}", "a/memory.current": "0", "a/b/memory.max": "max", "a/b/memory.current": "0"},
        GIB,
    ),
    "v1": (
        "4:memory:/job\n0::/\n",
        {"memory/job/memory.limit_in_bytes": f"{GIB}", "memory/job/memory.usage_in_bytes": f"{GIB // 4}"},
        3 * GIB // 4,
    ),
    "no limit": ("0::/\n", {"memory.max": "max", "memory.current": f"{GIB}"}, 4 * GIB),
    "nothing there": ("0::/gone\n", {}, 4 * GIB),
    "not understood": ("x\n", {"memory.max": "?", "memory.current": "?"}, 4 * GIB),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_free_memory_is_what_the_machine_and_the_control_group_allow(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, files, free = CGROUPS[case]
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=4 * GIB))
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(free=1 << 20))
    monkeypatch.setattr(host, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(host, "CGROUPS", cgroups(tmp_path / "cgroup", files))
    assert system.available() == free + (1 << 20)


def test_a_kernel_that_is_not_known_is_not_taken_for_a_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM4LITE_ISA", "mmx")
    with pytest.raises(QuantError, match="GLM4LITE_ISA is 'mmx'; use one of"):
        load("nano", quant="int4")


def test_loading_imports_no_compiler() -> None:
    code = "import sys; from glm4lite import load; load('nano'); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"  # torch takes a second to import it, to draw values of the meta device


def test_the_cards_own_yarn_lengthens_what_is_loaded_planned_and_answered(tmp_path: Path) -> None:
    """GLM-4's README adds rope_scaling to config.json and nothing else."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    folder = write_checkpoint(tmp_path / "yarn", tiny_config(max_position_embeddings=64, rope_scaling=scaling))
    engine = Engine.load(folder, quant=None)
    assert engine.model.context == 256
    generation = engine.generate(list(range(200)), engine.params(max_new_tokens=3, temperature=0.0))
    assert len(list(generation)) <= 3
    assert load(folder, context=250).context == 250
    assert plan(str(folder), budget=Budget(context=250)).placement.context == 250
    with pytest.raises(ContextLengthError, match="the context is 257 tokens; this model takes 1 to 256"):
        plan(str(folder), budget=Budget(context=257))
    assert ("context", "256 tokens (YaRN, 4 x 64, in short texts too), 256 bytes of bfloat16 cache each") in (
        model_facts(str(folder))
    )
