"""GGUF files as models: their tensors, metadata, tokenizer and template, their codes, and what is refused."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from glm4lite import Glm4Config
from glm4lite.base.errors import CheckpointError
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.gguf_blocks import AFFINE, decoder
from glm4lite.checkpoint.formats.registry import open_source
from glm4lite.checkpoint.prepare import prepare
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.engine.engine import Engine
from glm4lite.gguf.companions import MOST_SPLIT, OWN_SPLIT
from glm4lite.gguf.header import BLOCKS, PLAIN
from glm4lite.measure.info import model_facts
from glm4lite.model.causal_lm import CausalLM
from glm4lite.pretrained.load import load
from glm4lite.text.messages import Message
from glm4lite.text.tokenizer import Tokenizer
from glm4lite_quant import QuantLinear
from tests.glm4lite.checkpoints import TEMPLATE, write_checkpoint, write_tokenizer
from tests.glm4lite.gguf_files import CONFIG, random_blocks, write_gguf

IDS = torch.tensor([[1, 2, 3, 50, 60, 7, 300]])
KINDS = [name for name, _, _ in BLOCKS.values() if name not in PLAIN]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))


def decoded(path: Path) -> Checkpoint:
    return prepare(open_source(path), "none", CausalLM).checkpoint


@torch.no_grad()
def logits(source: Path, **arguments: Any) -> torch.Tensor:
    return load(source, **arguments)(IDS).logits.float()


# --- blocks


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_decode_as_gguf_decodes_them(kind: str) -> None:
    data = random_blocks(kind, (6, 1024), seed=1)
    number = gguf.GGMLQuantizationType[kind]
    wanted = torch.from_numpy(gguf.quants.dequantize(data, number).copy())
    blocks = torch.from_numpy(data).unflatten(-1, (-1, gguf.GGML_QUANT_SIZES[number][1]))
    if kind in AFFINE:
        planes, codes = AFFINE[kind]
        step, low = planes(blocks)
        values = codes(blocks).unflatten(-1, (step.shape[-1], -1)) * step[..., None] - low[..., None]
    else:
        values = decoder(kind)(blocks)
    torch.testing.assert_close(values.flatten(1), wanted, rtol=0, atol=0, equal_nan=True)


def test_the_table_of_types_is_ggufs() -> None:
    for number, (name, *sizes) in BLOCKS.items():
        assert gguf.GGMLQuantizationType(number).name == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == tuple(sizes)


# --- whole files


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_tensors_have_glm4s_names_and_values(tmp_path: Path, kind: str) -> None:
    wanted = write_gguf(tmp_path / "tiny.gguf", kind)
    found = decoded(tmp_path / "tiny.gguf")
    assert set(found.names()) == wanted.keys()
    for name, values in wanted.items():
        assert torch.equal(found.tensor(name).float(), values), name


def test_a_file_computes_what_the_folder_of_its_weights_does(tmp_path: Path) -> None:
    wanted = write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    folder = write_checkpoint(tmp_path / "plain", CONFIG | {"torch_dtype": "float32"}, wanted)
    expected = logits(folder, quant="none")
    assert torch.equal(logits(tmp_path / "tiny.gguf", quant="none"), expected)
    for quant in (None, "int8"):
        error = (logits(tmp_path / "tiny.gguf", quant=quant) - expected).norm() / expected.norm()
        assert error < (0.3 if quant is None else 0.03)


@pytest.mark.parametrize("kind", AFFINE)
def test_affine_codes_are_kept(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    wanted = write_gguf(tmp_path / "tiny.gguf", kind)
    model = load(tmp_path / "tiny.gguf")
    assert "gguf: of 8 quantized weights 8 keep their codes" in caplog.messages
    values = wanted["model.layers.0.mlp.down_proj.weight"]
    linear = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(linear, QuantLinear)
    weight = linear.weight_tensor.dequantize()
    assert float((weight - values).norm() / values.norm()) < 0.01


def test_a_model_in_several_files(tmp_path: Path) -> None:
    wanted = write_gguf(tmp_path / "tiny.gguf", "Q8_0", split=5)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 2
    for source in (files[0], files[2], tmp_path):
        assert set(decoded(source).names()) == wanted.keys()
    files[1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks {files[1].name}, a part of"):
        open_source(files[0])


def test_chatglm_files_have_q_k_and_v_in_one(tmp_path: Path) -> None:
    wanted = write_gguf(tmp_path / "b.gguf", "Q8_0", architecture="chatglm")
    found = decoded(tmp_path / "b.gguf")
    assert found.config["rms_norm_eps"] == pytest.approx(CONFIG["rms_norm_eps"])
    assert set(found.names()) == wanted.keys()
    assert all(torch.equal(found.tensor(name).float(), values) for name, values in wanted.items())
    write_gguf(tmp_path / "a.gguf", "Q8_0", architecture="chatglm", context_length=CONFIG["hidden_size"])
    checkpoint = open_source(tmp_path / "a.gguf")
    assert checkpoint.config["model_type"] == "glm"
    assert checkpoint.config["rms_norm_eps"] == 1.5625e-07  # what the converter writes then is not the model's
    assert checkpoint.config["max_position_embeddings"] == 131072


def test_tokenizer_and_template_are_the_files(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    write_tokenizer(tmp_path / "plain")
    own, wanted = (
        Tokenizer.from_folder(open_source(tmp_path / "tiny.gguf").folder),
        Tokenizer.from_folder(tmp_path / "plain"),
    )
    for text in ("The answer is 888, isn't it?", "今天天气很好 <|user|>", "def f():\n    return 1"):
        assert own.ids(text) == wanted.ids(text)
        assert own.ids(text, special=True) == wanted.ids(text, special=True)
    assert own.get_vocab() == wanted.get_vocab()
    assert own.chat_template == TEMPLATE
    assert own.stop_ids == wanted.stop_ids


def test_tokenizer_and_config_are_read_of_the_file_alone(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "tiny.gguf"
    write_gguf(file, "Q8_0", split=6)
    file = next(file.parent.iterdir())
    opened = open_source(file)
    for source in (file, str(file), file.parent):
        tokenizer, config = Tokenizer.from_pretrained(source, padding_side="right"), Glm4Config.from_pretrained(source)
        assert tokenizer.ids("The answer is 888") == Tokenizer.from_folder(opened.folder).ids("The answer is 888")
        assert (tokenizer.chat_template, tokenizer.padding_side) == (TEMPLATE, "right")
        assert config.to_dict() == Glm4Config.from_pretrained(opened.folder).to_dict()
    assert Glm4Config.from_pretrained(file, num_hidden_layers=7).num_hidden_layers == 7
    write_tokenizer(file.parent)  # what lies there as a file of its own is taken
    assert Tokenizer.from_pretrained(file.parent).get_vocab() == tokenizer.get_vocab()
    file.write_bytes(b"GGUF")
    for read in (Tokenizer.from_pretrained, Glm4Config.from_pretrained):
        with pytest.raises(CheckpointError, match="is no GGUF file"):
            read(file)


def test_a_pattern_of_our_own_is_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, "Q8_0", own={OWN_SPLIT: r"\d|[a-z]+|\s|."})
    tokenizer = Tokenizer.from_pretrained(file)
    assert [tokenizer.text([number]) for number in tokenizer.ids("a1234")][1:] == list("1234")
    for bad in ("(", "a" * (MOST_SPLIT + 1)):
        write_gguf(file, "Q8_0", own={OWN_SPLIT: bad})
        refused(file, "tiny.gguf: glm4lite.tokenizer.split is .*, which is no pattern; export it again")


def test_a_template_without_tools_is_replaced_by_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(tmp_path / "tiny.gguf", "Q8_0", template="{% for m in messages %}{{ m.content }}{% endfor %}")
    template = Tokenizer.from_folder(open_source(tmp_path / "tiny.gguf").folder).chat_template
    assert isinstance(template, str)
    assert "tools" in template
    assert "chat template without tools" in caplog.text


def test_an_engine_chats_with_a_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "Q4_0")
    engine = Engine.load(tmp_path / "tiny.gguf")
    assert engine.template is not None
    prompt = engine.template.render([Message("user", "Hi")])
    assert prompt.startswith("[gMASK]<sop>")


def test_a_file_is_quantized_into_a_folder_and_described(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "Q4_0")
    folder = quantize_checkpoint(tmp_path / "tiny.gguf", tmp_path / "int4")
    assert torch.equal(logits(folder), logits(tmp_path / "tiny.gguf"))
    assert (folder / "tokenizer.json").exists()
    facts = dict(model_facts(str(tmp_path / "tiny.gguf")))
    assert facts["stored as"] == "gguf, 8 Q4_0"
    assert facts["model"] == str(tmp_path / "tiny.gguf")


# --- what is refused


def refused(path: Path, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_damaged_files_get_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "Q8_0")
    whole = path.read_bytes()
    cases = {
        whole[:100]: "is truncated: its header ends beyond the file",
        whole[:-1000]: r"has a wrong header: .* lies at \d+, of \d+ bytes of data",
        whole[:4] + struct.pack("<I", 9) + whole[8:]: "is GGUF of version 9; versions 2 and 3",
        whole[:4] + struct.pack(">I", 3) + whole[8:]: "big-endian",
        whole[:8] + struct.pack("<Q", 2**60) + whole[16:]: "speaks of 1152921504606846976 tensors",
        b"<html>" + whole[6:]: "is a web page",
        whole.replace(b"general.architecture", b"general.architecturf", 1): "is a model of 'no known kind'",
        b"GGUF": "is no GGUF file|is truncated",
    }
    for content, said in cases.items():
        path.write_bytes(content)
        refused(path, said)


def test_files_that_are_something_else_get_one_line(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "Q8_0", pre="llama-bpe")
    refused(tmp_path / "a.gguf", "cut as 'llama-bpe'; GLM-4's is 'gpt2', cut as 'glm4'")
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    refused(tmp_path, r"holds several GGUF models; give one of its files \(a.gguf, b.gguf\)")


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "Q4_0")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_down.weight")
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(np.float16("nan").tobytes())
    refused(path, r"mlp.down_proj.weight in .*tiny.gguf holds nan at \[0, 0\]")
