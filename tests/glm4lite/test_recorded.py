"""What real writers stored of a weight decodes to what they decode it to; tests/glm4lite/recorded/make.py made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.decoded import DecodedCheckpoint
from glm4lite.checkpoint.formats.registry import declared_format
from glm4lite.checkpoint.shard import read_header
from glm4lite_quant import QuantConfig, QuantTensor
from glm4lite_quant.config import KEPT

FOLDER = Path(__file__).with_name("recorded")


def cases() -> list[tuple[str, str]]:
    found = []
    for file in sorted(FOLDER.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found += [(file.stem, name) for name in json.loads(opened.metadata()["configs"])]
    return found


def test_every_writer_is_there() -> None:
    assert {writer for writer, _ in cases()} == {"auto_round", "compressed_tensors", "hqq", "mlx"}


@pytest.mark.parametrize(("writer", "case"), cases(), ids=str)
def test_weights_decode_as_their_writer_decodes_them(tmp_path: Path, writer: str, case: str) -> None:
    with safe_open(FOLDER / f"{writer}.safetensors", "pt") as opened:
        config = json.loads(opened.metadata()["configs"])[case]
        names = [name for name in opened.keys() if name.startswith(f"{case}/layer.")]  # noqa: SIM118
        tensors = {name.removeprefix(f"{case}/"): opened.get_tensor(name) for name in names}
        wanted = opened.get_tensor(f"{case}/decoded").float()
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    source = Checkpoint.of(tmp_path, config, read_header(file))
    declared = declared_format(config)
    assert declared is not None
    known, given = declared
    checkpoint, _, quant = known.adapt(source, known.config(given), None, False)
    assert isinstance(checkpoint, DecodedCheckpoint)
    assert checkpoint.names() == ["layer.weight"]
    digits = 2e-2 if checkpoint.dtype("layer.weight") == "BF16" else 1e-3  # of the type in which the writer decodes
    torch.testing.assert_close(checkpoint.tensor("layer.weight").float(), wanted, rtol=digits, atol=digits * 0.05)
    own = checkpoint.quant_for("layer.weight", quant) if isinstance(quant, QuantConfig) else None
    if own is not None and own.method == KEPT:
        weight = QuantTensor.empty(wanted.shape[0], wanted.shape[1], own)
        lost = weight.take_codes(0, checkpoint.codes("layer.weight", 0, len(wanted), own.group_size))
        kept = ~lost
        assert bool(kept[:3].all())
        torch.testing.assert_close(weight.dequantize()[kept], wanted[kept], rtol=0, atol=0.01)
