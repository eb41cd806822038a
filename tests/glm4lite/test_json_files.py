"""JSON that a stranger wrote: what is read, and what is refused in one line that says why."""

import json
from pathlib import Path

import pytest
import torch

from glm4lite.base.errors import ConfigError, Glm4liteError
from glm4lite.base.files import parse_json, read_json
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.engine.engine import Engine
from glm4lite.text.messages import Message
from glm4lite.text.template import ChatTemplate
from glm4lite.text.tokenizer import Tokenizer
from tests.glm4lite.checkpoints import write_checkpoint

SAVED_BY_WINDOWS = ("utf-8-sig", "utf-16-le", "utf-16-be")  # Notepad, PowerShell's `>`, and Notepad's third choice


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"),
        *("model.safetensors.index.json", "chat_template.jinja"),
    ],
)
@pytest.mark.parametrize("encoding", SAVED_BY_WINDOWS)
def test_a_file_that_an_editor_of_windows_saved_reads_as_without_its_mark(
    folder: Path, name: str, encoding: str
) -> None:
    prompt = [Message("user", "hi")]
    before = Engine.load(folder, quant=None)
    expected = before.chat_template().encode(before.tokenizer, prompt), before.generation_config
    text = (folder / name).read_text(encoding="utf-8")
    (folder / name).write_bytes((text if encoding == "utf-8-sig" else f"\ufeff{text}").encode(encoding))
    after = Engine.load(folder, quant=None)
    assert (after.chat_template().encode(after.tokenizer, prompt), after.generation_config) == expected
    template = ChatTemplate.from_folder(folder)
    assert template is not None
    assert template.render(prompt).startswith("[gMASK]")


REFUSED: dict[bytes, str] = {
    b'{"a": [1, {"b": NaN}]}': "a.1.b must be a finite number, found nan",
    b'{"a": -Infinity}': "a must be a finite number, found -inf",
    b'{"a": 1e999}': "a must be a finite number, found inf",
    b'{"a": ' + b"9" * 5000 + b"}": "a number has 5000 digits",
    b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}": "a is nested too deeply: more than 50",
    b'{"a": ' + b"[" * 100_000: "nested too deeply",
    b'{"a": {"b": 1, "b": 2}}': "'b' appears twice",
    b"\xff\xfe{\0}": "can't decode",
    b"\xe9{}": "can't decode",
    b" " * (17 << 20): "it has more than 16777216 bytes",
    b'{"a": 1} x': "Extra data",
}


@pytest.mark.parametrize("data", REFUSED, ids=[what[:20] for what in REFUSED.values()])
def test_what_no_config_should_hold_is_refused_with_the_reason(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=REFUSED[data]):
        parse_json(data)
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ConfigError, match=REFUSED[data]) as caught:
        read_json(tmp_path / "config.json")
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'} is not valid JSON (")
    assert str(caught.value).endswith("; correct it or download it again")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_a_config_may_hold_is_read_as_json_reads_it() -> None:
    values = {"a": [1, -2.5, 1e30, None, True, "\ud800"], "b": {"c": {}}, "n": 1000000000000000019884624838656}
    assert parse_json(json.dumps(values).encode()) == values


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("data", [b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_every_file_beside_the_weights_is_read_so(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(Glm4liteError, match=f"{name} is not valid JSON"):
        _ = Checkpoint.open(folder).generation_config, Tokenizer.from_folder(folder)


# --- weights that are no numbers


def test_the_sum_of_large_weights_is_no_reason_to_refuse_them(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_finite("lm_head.weight", torch.full((4, 4), 3e38))
    with pytest.raises(Glm4liteError, match=r"lm_head.weight in .* holds -inf at \[18, 1\]; download"):
        checkpoint.check_finite("lm_head.weight", torch.tensor([[1.0, 1.0]] * 2 + [[1.0, -torch.inf]]), 16)
