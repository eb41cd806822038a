"""from_pretrained under Transformers' names: each is mapped to what a load has, or refused by name with the reason."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4lite import Glm4Config, Glm4ForCausalLM, Glm4ForSequenceClassification, Glm4Model
from glm4lite.base.errors import CheckpointError, ConfigError, HubError
from glm4lite.loading.load_options import LoadOptions
from glm4lite.pretrained.base import Glm4PreTrainedModel
from glm4lite.pretrained.load import load
from glm4lite.pretrained.models import Glm4ForTokenClassification
from glm4lite.pretrained.transformers_names import request
from glm4lite_quant import BnbConfig, BnbLinear, QuantConfig, QuantLinear
from tests.glm4lite.checkpoints import tiny_config, tiny_tensors, write_checkpoint

transformers = pytest.importorskip("transformers", reason="transformers is the oracle (test extra)")

IDS = torch.tensor([[372, 374, 377, 10, 65, 70, 378]])
CONFIG = tiny_config(intermediate_size=128)  # bitsandbytes' blocks of 64 fit it
SCORE = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)).bfloat16()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", CONFIG)


@pytest.fixture(scope="module")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier of three labels."""
    tensors = tiny_tensors(CONFIG) | {"score.weight": SCORE}
    del tensors["lm_head.weight"]
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    config = CONFIG | {"architectures": ["Glm4ForSequenceClassification"]} | labels
    return write_checkpoint(tmp_path_factory.mktemp("head") / "tiny", config, tensors)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def options_of(**names: Any) -> LoadOptions:
    return request("nano", names).options


# --- every name


def names_of_transformers() -> set[str]:
    """All that its from_pretrained takes: its parameters, and what it takes out of **kwargs."""
    source = inspect.getsource(transformers.PreTrainedModel.from_pretrained)
    signature = inspect.signature(transformers.PreTrainedModel.from_pretrained)
    older = re.search(r"for name in \[(.*?)\]", source)
    assert older
    taken = re.findall(r'kwargs\.pop\(\s*"(\w+)"', source) + re.findall(r'"(\w+)"', older[1])
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    declared = [name for name, parameter in signature.parameters.items() if parameter.kind in kinds]
    return {name for name in (*declared, *taken) if not name.startswith("_") and name != "cls"}


def test_no_name_that_transformers_has_is_unknown() -> None:
    names = names_of_transformers()
    assert {"device_map", "quantization_config", "subfolder", "low_cpu_mem_usage", "attn_implementation"} - names <= {
        "attn_implementation"
    }
    for name in sorted(names):
        source = None if name == "pretrained_model_name_or_path" else "nano"
        request(source, {name: "nano" if source is None else None})


def test_no_key_of_the_config_that_transformers_has_is_unknown() -> None:
    for name in inspect.signature(transformers.Glm4Config).parameters:
        if name not in ("kwargs", "dtype", "transformers_version", "chunk_size_feed_forward", "is_encoder_decoder"):
            assert Glm4Config.knows(name) or name == "model_type", name


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"torch_dtype": torch.float16}, "dtype float16 is refused: GLM-4's activations reach 68000"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported; use auto, float32 or bfloat16"),
        (
            {"dtype": "float32", "torch_dtype": torch.bfloat16},
            "dtype='float32' and torch_dtype=torch.bfloat16 contradict",
        ),
        ({"device": "cpu", "device_map": "cuda:0"}, "device='cpu' and device_map='cuda:0' contradict each other"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "device_map names cpu, cuda:0: which layers lie on which"),
        ({"device_map": {"": "cpu", "lm_head": "disk"}}, "device_map names 'disk': give ram"),
        ({"device_map": {}}, "device_map is empty"),
        ({"device_map": "mps"}, "device 'mps' is not supported; use auto, cpu, cuda or cuda:N"),
        ({"device_map": "cbu"}, "device 'cbu' is not known; use auto, cpu, cuda or cuda:N"),
        ({"device_map": -1}, "device_map is -1; use 0 for the first GPU, or 'cpu'"),
        ({"device_map": True}, "device_map is True; use 'auto', a device, or a dict"),
        ({"max_memory": {"gpu": 1}}, "max_memory has a size for 'gpu'; devices are 'cpu' and the numbers of GPUs"),
        ({"max_memory": {}}, "max_memory is {}; use a dict such as"),
        ({"max_memory": {"cpu": "4 elephants"}}, "'4 elephants' is not a size"),
        ({"max_memory": {"cpu": "4GiB"}, "ram": "4GiB"}, "max_memory and ram say the same; leave one out"),
        ({"max_memory": {0: "4GiB", 1: "8GiB"}}, "max_memory gives the GPUs different sizes"),
        ({"max_memory": {1: "4GiB"}}, "max_memory lists the GPUs 1; hide the others with CUDA_VISIBLE_DEVICES"),
        ({"quant": "int4", "quantization_config": BnbConfig()}, "quant and quantization_config say the same"),
        ({"quant": "int4", "load_in_8bit": True}, "quant and load_in_8bit say the same; leave one out"),
        (
            {"load_in_4bit": True, "quantization_config": BnbConfig()},
            "load_in_4bit and quantization_config say the same; leave one out",
        ),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit contradict each other"),
        ({"load_in_4bit": 1}, "load_in_4bit"),
        ({"bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type says how to quantize, but nothing asks for it"),
        ({"quantization_config": {"load_in_4bits": True}}, "did you mean 'load_in_4bit'?"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config asks for 'gptq'"),
        ({"quantization_config": {"quant_method": "glm4lite", "bits": 4}}, "quantization_config.* is missing"),
        ({"quantization_config": "nf4"}, "quantization_config is 'nf4'; give a BitsAndBytesConfig, its dict"),
        ({"quantization_config": {}}, "sets neither load_in_4bit nor load_in_8bit"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}}, "is 'nf5'; use nf4 or fp4"),
        (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float16},
            "bnb_4bit_compute_dtype float16 is refused: GLM-4's activations reach 68000",
        ),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, "4-bit weights are held as uint8"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]}, "llm_int8_skip_modules names 'lm_head'"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "GLM-4 overflows float16"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation='flash_attention_2' is not supported"),
        ({"trust_remote_code": True}, "trust_remote_code=True is not supported: nothing is run"),
        ({"use_safetensors": False}, "only safetensors are read, since pickle files can run code"),
        ({"weights_only": False}, "weights_only=False is not supported"),
        ({"variant": "fp16"}, "variant='fp16' is not supported: only model.safetensors or its index is read"),
        ({"state_dict": {}}, "make the model of its config"),
        ({"key_mapping": {"a": "b"}}, "key_mapping="),
        ({"tp_plan": "auto"}, "a model runs in one process here"),
        ({"proxies": {"https": "http://proxy"}}, "set HTTPS_PROXY in the environment"),
        ({"use_auth_token": "hf_x"}, "its name is token"),
        ({"low_cpu_mem_usage": "yes"}, "low_cpu_mem_usage is 'yes'; use True or False"),
        ({"output_loading_info": 1}, "output_loading_info is 1; use True or False"),
        ({"ignore_mismatched_sizes": 1}, "ignore_mismatched_sizes is 1; use True or False"),
        ({"revison": "main"}, "from_pretrained knows no 'revison'; did you mean 'revision'?"),
        ({"num_label": 3}, "from_pretrained knows no 'num_label'; did you mean 'num_labels'?"),
        ({"torch_dtyp": None}, "from_pretrained knows no 'torch_dtyp'; did you mean 'torch_dtype'?"),
        ({"config": 5}, "config is 5; give a Glm4Config, Transformers' own, or a folder"),
        ({"config": Glm4Config(), "num_labels": 3}, "num_labels is given beside config; set it on the config instead"),
        ({"pretrained_model_name_or_path": "nano"}, "the model is given twice"),
        ({"generation_config": {"num_beams": 4}}, "num_beams=4 is not supported"),
        ({"subfolder": "../other"}, "subfolder is '../other'; use a path within the model"),
        ({"revision": ""}, "revision is ''; use a branch, a tag or a commit"),
        ({"token": 5}, "token must be a token's text"),
        ({"cache_dir": ""}, "cache_dir is ''; use a folder"),
        ({"local_files_only": True, "force_download": True}, "local_files_only and force_download contradict"),
    ],
    ids=str,
)
def test_what_a_load_does_not_have_is_refused_in_one_line(names: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, HubError), match=message) as caught:
        Glm4ForCausalLM.from_pretrained("nano", **names)
    assert "\n" not in str(caught.value)
    assert "hf_x" not in str(caught.value)


def test_no_model_is_one_line() -> None:
    with pytest.raises(ConfigError, match="the model is None; give a folder, a Hub repo id, or nano"):
        Glm4ForCausalLM.from_pretrained()
    assert Glm4Model.from_pretrained(pretrained_model_name_or_path="nano").config.name_or_path == "nano"


# --- where, and in what


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        ({"torch_dtype": "float32"}, torch.float32),
        ({"torch_dtype": torch.float32, "dtype": "float32"}, torch.float32),
        ({"dtype": None, "torch_dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.bfloat16, "torch_dtype": "auto"}, torch.bfloat16),
    ],
    ids=str,
)
def test_both_names_of_a_type_say_it(folder: Path, names: dict[str, Any], dtype: torch.dtype) -> None:
    assert Glm4ForCausalLM.from_pretrained(folder, **names).dtype == dtype


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_one_device_by_any_map_of_it(device_map: Any) -> None:
    assert options_of(device_map=device_map).target == torch.device("cpu")


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential", None])
def test_a_planned_map_is_planned(device_map: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert options_of(device_map=device_map).target is None
    evenly = bool(device_map) and device_map.startswith("balanced")
    assert any("layers are not spread evenly" in message for message in caplog.messages) == evenly


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, as far as arguments are checked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.usefixtures("gpus")
def test_gpus_are_named_as_in_transformers() -> None:
    maps: list[Any] = [1, "cuda:1", torch.device("cuda", 1), {"": 1}]
    assert {options_of(device_map=device_map).target for device_map in maps} == {torch.device("cuda", 1)}
    assert options_of(device_map="cuda").target == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="device 'cuda:2' was asked for, but there are 2 CUDA devices"):
        options_of(device_map=2)


@pytest.mark.usefixtures("gpus")
def test_max_memory_becomes_the_budget() -> None:
    both = options_of(device_map="auto", max_memory={0: "8GiB", 1: "8GiB", "cpu": "30GiB"})
    assert (both.target, both.budget.gpu_memory, both.budget.ram) == (None, 8 << 30, 30 << 30)
    first = options_of(max_memory={0: 1 << 30, "cpu": 1 << 31})
    assert (first.target, first.budget.gpu_memory) == (torch.device("cuda", 0), 1 << 30)
    none = options_of(max_memory={"cpu": "4GB"})
    assert (none.target, none.budget.gpu_memory, none.budget.ram) == (torch.device("cpu"), None, 4 * 10**9)


def test_what_asks_for_nothing_else_is_taken(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = logits(load(folder))
    found = Glm4ForCausalLM.from_pretrained(
        folder,
        low_cpu_mem_usage=True,
        offload_state_dict=True,
        offload_buffers=False,
        attn_implementation="sdpa",
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        cache_dir="somewhere",
        revision="main",
        proxies={},
    )
    assert torch.equal(logits(found), wanted)
    assert not caplog.messages


def test_what_is_done_otherwise_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Glm4ForCausalLM.from_pretrained(folder, offload_folder="offload", revision="v2")
    assert caplog.messages == [
        "offload_folder 'offload' is not used: layers on disk are read from the checkpoint",
        f"revision is not used: {folder} is a folder of this machine",
    ]


# --- quantization_config


def bits_and_bytes(**settings: Any) -> Any:
    return transformers.BitsAndBytesConfig(**settings)


@pytest.mark.parametrize("form", ["object", "dict", "keywords"])
@pytest.mark.parametrize(
    ("settings", "quant"),
    [
        ({"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}, BnbConfig("nf4")),
        ({"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}, BnbConfig("fp4", True)),
    ],
    ids=["nf4", "fp4 double"],
)
def test_four_bits_as_transformers_asks_for_them(
    folder: Path, form: str, settings: dict[str, Any], quant: BnbConfig
) -> None:
    pytest.importorskip("bitsandbytes")
    asked: dict[str, Any] = {"load_in_4bit": True, **settings}
    if form != "keywords":
        config = bits_and_bytes(**asked)
        asked = {"quantization_config": config if form == "object" else config.to_dict()}
    model = Glm4ForCausalLM.from_pretrained(folder, **asked)
    assert isinstance(model.model.layers[0].mlp.down_proj, BnbLinear)
    assert torch.equal(logits(model), logits(load(folder, quant=quant, dtype="bfloat16")))


def test_the_type_to_compute_in_is_the_activations_type(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("bitsandbytes")
    assert options_of(quantization_config=bits_and_bytes(load_in_4bit=True)).activations == torch.float32
    asked = {"quantization_config": bits_and_bytes(load_in_4bit=True), "dtype": torch.bfloat16}
    assert options_of(**asked).activations == torch.bfloat16
    assert caplog.messages[-1].startswith("bnb_4bit_compute_dtype is not used: products are computed in")


@pytest.mark.parametrize("form", ["object", "keyword"])
def test_eight_bits_are_ours_and_said(folder: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    named = {"quantization_config": bits_and_bytes(load_in_8bit=True)} if form == "object" else {"load_in_8bit": True}
    model = Glm4ForCausalLM.from_pretrained(folder, **named)
    assert torch.equal(logits(model), logits(load(folder, quant="int8")))
    said = "load_in_8bit: all weights, embedding and head too, become glm4lite's own int8, not LLM.int8"
    assert [message for message in caplog.messages if message.startswith(said)]


def test_modules_that_are_skipped_stay_as_they_are_also_when_saved(folder: Path, tmp_path: Path) -> None:
    model = Glm4ForCausalLM.from_pretrained(folder, load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert isinstance(model.model.layers[0].mlp.down_proj, QuantLinear)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_our_own_configs_are_taken_too(folder: Path) -> None:
    wanted = QuantConfig(bits=8, group_size=64)
    for given in (wanted, wanted.to_dict()):
        assert options_of(quantization_config=given).wanted == wanted


# --- config


def test_keys_of_the_config_are_changed_as_by_transformers(folder: Path) -> None:
    changes: dict[str, Any] = {"attention_dropout": 0.5, "num_labels": 3, "pad_token_id": None}
    ours = Glm4ForSequenceClassification.from_pretrained(folder, rope_theta=5000.0, **changes).config
    oracle = transformers.Glm4ForSequenceClassification.from_pretrained(folder, **changes).config
    for name in ("attention_dropout", "num_labels", "id2label", "label2id", "pad_token_id"):
        assert getattr(ours, name) == getattr(oracle, name), name
    assert ours.rope_theta == 5000.0
    labels = {0: "no", 1: "yes", 2: "maybe"}
    for cls in (Glm4ForSequenceClassification, transformers.Glm4ForSequenceClassification):
        named = cls.from_pretrained(folder, id2label=labels, label2id={v: k for k, v in labels.items()})
        assert (named.config.num_labels, named.config.id2label) == (3, labels)
        assert named.score.weight.shape == (3, 64)


def test_a_config_is_taken_instead_of_the_folders(folder: Path) -> None:
    other = transformers.Glm4Config.from_pretrained(folder, rms_norm_eps=0.5)
    wanted = logits(transformers.Glm4ForCausalLM.from_pretrained(folder, config=other, dtype=torch.float32))
    mine = Glm4Config.from_pretrained(folder, rms_norm_eps=0.5)
    nearer: dict[str, Any] = {"rms_norm_eps": 0.5}
    for config, changes in ((other, {}), (mine, {}), (folder, nearer), (str(folder), nearer)):
        model = Glm4ForCausalLM.from_pretrained(folder, config=config, dtype="float32", **changes)
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
        assert model.config is not config
    quantized = load(folder, quant="int8").config
    with pytest.raises(ConfigError, match=r"config has a quantization_config, but .* is not quantized; take it out"):
        Glm4ForCausalLM.from_pretrained(folder, config=quantized)


def test_a_generation_config_is_taken(folder: Path) -> None:
    given = {"max_new_tokens": 7, "eos_token_id": 5}
    assert Glm4ForCausalLM.from_pretrained(folder, generation_config=given).generation_config.max_new_tokens == 7


# --- heads


@pytest.mark.parametrize(
    ("head", "source", "options"),
    [
        ("ForCausalLM", "folder", {}),
        ("ForSequenceClassification", "folder", {}),
        ("ForTokenClassification", "folder", {"num_labels": 5}),
        ("ForSequenceClassification", "with_head", {}),
        ("ForSequenceClassification", "with_head", {"num_labels": 5, "ignore_mismatched_sizes": True}),
        ("Model", "with_head", {}),
        ("Model", "folder", {}),
    ],
)
def test_loading_info_is_what_transformers_tells(
    request: pytest.FixtureRequest, head: str, source: str, options: dict[str, Any]
) -> None:
    place = request.getfixturevalue(source)
    classes: dict[str, type[Glm4PreTrainedModel]] = {
        "ForCausalLM": Glm4ForCausalLM,
        "ForSequenceClassification": Glm4ForSequenceClassification,
        "ForTokenClassification": Glm4ForTokenClassification,
        "Model": Glm4Model,
    }
    oracle_class = getattr(transformers, f"Glm4{head}")
    ours, found = classes[head].from_pretrained(place, output_loading_info=True, **options)
    _, wanted = oracle_class.from_pretrained(place, output_loading_info=True, **options)
    assert found == wanted
    assert not any(parameter.is_meta for parameter in ours.parameters())


def test_a_new_head_is_said_and_drawn(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Glm4ForTokenClassification.from_pretrained(folder, num_labels=50)
    assert any("score.weight, score.bias is not in the checkpoint" in message for message in caplog.messages)
    assert 0.015 < float(model.score.weight.detach().float().std()) < 0.025
    assert not model.score.bias.any()


@pytest.mark.parametrize("hidden", [64, 96])  # of 96 columns bitsandbytes makes nothing
@pytest.mark.parametrize("stored", [False, True], ids=["new head", "stored head"])
def test_a_bias_beside_a_plain_matrix_is_of_its_type(tmp_path: Path, stored: bool, hidden: int) -> None:
    pytest.importorskip("bitsandbytes")
    config = CONFIG | {"hidden_size": hidden, "architectures": ["Glm4ForTokenClassification"]}
    tensors = tiny_tensors(config)
    if stored:
        tensors |= {"score.weight": torch.ones(2, hidden).bfloat16(), "score.bias": torch.ones(2).bfloat16()}
    model = Glm4ForTokenClassification.from_pretrained(write_checkpoint(tmp_path, config, tensors), quant="nf4")
    assert model.dtype == torch.bfloat16
    assert logits(model).isfinite().all()


def test_a_head_of_other_labels_is_an_error_or_made_anew(with_head: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert torch.equal(Glm4ForSequenceClassification.from_pretrained(with_head).score.weight, SCORE)
    with pytest.raises(CheckpointError, match=r"\[3, 64\], num_labels=5 needs \[5, 64\]; load with num_labels=3"):
        Glm4ForSequenceClassification.from_pretrained(with_head, num_labels=5)
    caplog.clear()
    model = Glm4ForSequenceClassification.from_pretrained(with_head, num_labels=5, ignore_mismatched_sizes=True)
    assert model.score.weight.shape == (5, 64)
    assert any("score.weight has another shape in the checkpoint" in message for message in caplog.messages)


@pytest.mark.parametrize("quant", [None, "int8"])
def test_any_tensor_of_another_shape_can_start_anew(folder: Path, quant: str | None) -> None:
    model, info = Glm4ForCausalLM.from_pretrained(
        folder, quant, vocab_size=384, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, _, _ in info["mismatched_keys"]} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert logits(model).shape == (1, 7, 384)
    assert logits(model).isfinite().all()
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    assert not embedding[model.config.pad_token_id].any()
    with pytest.raises(CheckpointError, match=r"no tensor of .* has the shape that the config says"):
        Glm4ForCausalLM.from_pretrained(
            folder, hidden_size=32, head_dim=8, intermediate_size=48, ignore_mismatched_sizes=True
        )


def test_the_trunk_saved_alone_is_found(folder: Path, tmp_path: Path) -> None:
    oracle = transformers.Glm4Model.from_pretrained(folder, dtype=torch.float32)
    oracle.save_pretrained(tmp_path / "trunk")
    with torch.no_grad():
        wanted = oracle(IDS).last_hidden_state
        found = Glm4Model.from_pretrained(tmp_path / "trunk")(IDS).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    head = Glm4ForSequenceClassification.from_pretrained(tmp_path / "trunk")
    assert head.score.weight.shape == (2, 64)
