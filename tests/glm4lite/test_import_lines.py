"""Every format that can be read says in one line what became of its weights, or why they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4lite.base.errors import Glm4liteError
from glm4lite.checkpoint.formats.registry import FORMATS
from glm4lite.pretrained.load import load
from glm4lite_quant import BnbConfig, BnbTensor, QuantError
from glm4lite_quant.bnb import available
from tests.glm4lite import packed
from tests.glm4lite.checkpoints import tiny_tensors, write_checkpoint
from tests.glm4lite.gguf_files import write_gguf
from tests.glm4lite.packed import Layout, write_packed
from tests.glm4lite.test_imports import AGAIN, LAYOUTS

Write = Callable[[Path], Path]


def in_layout(layout: Layout) -> Write:
    return lambda folder: write_packed(folder, layout)[0]


def in_gguf(kind: str) -> Write:
    def write(folder: Path) -> Path:
        folder.mkdir()
        write_gguf(folder / "tiny.gguf", kind)
        return folder / "tiny.gguf"

    return write


def by_bitsandbytes(folder: Path, kind: str = "nf4") -> Path:
    from glm4lite.checkpoint.formats.bitsandbytes import tensors_of

    tensors = tiny_tensors(packed.CONFIG)
    for name in [name for name in tensors if name.removesuffix(".weight").rpartition(".")[2] in packed.LINEARS]:
        if tensors[name].dim() == 2:
            rows, columns = tensors[name].shape
            weight = BnbTensor.empty(rows, columns, BnbConfig("nf4"), torch.device("cpu"))
            weight.quantize_rows(0, tensors[name])
            tensors |= tensors_of(name, weight, torch.bfloat16)
    declared = BnbConfig("nf4").to_dict() | {"bnb_4bit_quant_type": kind}
    return write_checkpoint(folder, packed.CONFIG | {"quantization_config": declared}, tensors)


@dataclass(frozen=True)
class Case:
    """A format's checkpoints: one whose codes are kept, one that is quantized again, one that is refused, and why."""

    kept: Write | None
    again: Write | None
    refused: Write
    said: str
    count: int = 12


def declaring(layout: Layout, **changes: Any) -> Write:
    return in_layout(replace(layout, declared=dict(layout.declared) | changes))


def with_unknown_blocks(folder: Path) -> Path:
    path = in_gguf("Q8_0")(folder)
    data = path.read_bytes()
    name = b"blk.0.ffn_down.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # dimensions' number, two of them, the type
    path.write_bytes(data[:at] + (99).to_bytes(4, "little") + data[at + 4 :])
    return path


CASES = {
    "gptq": Case(
        in_layout(LAYOUTS["gptq"]), in_layout(AGAIN["gptq, 8 bits"]), declaring(LAYOUTS["gptq"], bits=16), "bits is 16"
    ),
    "awq": Case(in_layout(LAYOUTS["awq"]), None, declaring(LAYOUTS["awq"], version="marlin"), "version is 'marlin'"),
    "compressed-tensors": Case(
        in_layout(LAYOUTS["compressed-tensors"]),
        in_layout(AGAIN["compressed-tensors, int8"]),
        declaring(LAYOUTS["compressed-tensors"], format="marlin-24"),
        "format is 'marlin-24'",
    ),
    "auto-round": Case(
        in_layout(LAYOUTS["auto-round"]),
        in_layout(AGAIN["auto-round, 8 bits"]),
        declaring(LAYOUTS["auto-round"], data_type="mx_fp"),
        "data_type is 'mx_fp'",
    ),
    "mlx": Case(
        in_layout(LAYOUTS["mlx"]), in_layout(AGAIN["mlx, 6 bits"]), declaring(LAYOUTS["mlx"], mode="nvfp4"), "mode is"
    ),
    "hqq": Case(
        in_layout(LAYOUTS["hqq"]),
        in_layout(AGAIN["hqq, 8 bits"]),
        declaring(LAYOUTS["hqq"], quant_config={"weight_quant_params": {"nbits": 1, "group_size": 32, "axis": 1}}),
        "nbits is 1",
    ),
    "fp8": Case(
        None, in_layout(AGAIN["fp8, in blocks"]), declaring(AGAIN["fp8, in blocks"], weight_block_size=[0]), "expected"
    ),
    "gguf": Case(in_gguf("Q4_0"), in_gguf("Q8_0"), with_unknown_blocks, "has the type 99", count=8),
    "bitsandbytes": Case(None, by_bitsandbytes, lambda folder: by_bitsandbytes(folder, "nf5"), "nf5"),
}
BOTH = [(method, way) for method, case in CASES.items() for way in ("kept", "again") if getattr(case, way)]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))


def skip_without(method: str) -> None:
    if method == "bitsandbytes" and not available():
        pytest.skip("bitsandbytes is not installed: none of its weights can be made")


def lines(source: Path, method: str, caplog: pytest.LogCaptureFixture, quant: str | None) -> list[str]:
    caplog.clear()
    load(source, quant=quant)
    return [line for line in caplog.messages if line.startswith(f"{method}: ")]


def test_every_format_is_here() -> None:
    assert CASES.keys() == {known.method for known in FORMATS}


@pytest.mark.parametrize(("method", "way"), BOTH)
def test_one_line_says_what_became_of_the_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, way: str
) -> None:
    skip_without(method)
    source, count = getattr(CASES[method], way)(tmp_path / "in"), CASES[method].count
    said = f"{method}: of {count} quantized weights {count}"
    int4 = "keep their codes" if way == "kept" else "are decoded and quantized again"
    for quant, what in (("int4", int4), ("int8", "are decoded and quantized again"), ("none", "are decoded")):
        assert lines(source, method, caplog, quant) == [f"{said} {what}"]


@pytest.mark.parametrize("method", CASES)
def test_one_line_says_why_it_is_refused(tmp_path: Path, method: str) -> None:
    skip_without(method)
    source = CASES[method].refused(tmp_path / "in")
    with pytest.raises((Glm4liteError, QuantError), match=CASES[method].said) as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_a_format_that_nobody_knows_is_named(tmp_path: Path) -> None:
    source = in_layout(LAYOUTS["gptq"])(tmp_path)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"]["quant_method"] = "quip"
    (source / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(Glm4liteError, match="quip"):
        load(source)
