"""What bench/gpu.py asks of a GPU before it measures, here of the interpreter: that it passes, and that it can fail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not tested")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set (tests/conftest.py does)", allow_module_level=True)

from bench import gpu_batched, gpu_checks
from glm4lite import Glm4Config, load
from glm4lite.runtime import cuda_graph
from glm4lite_quant.kernels.decoder import Heads
from glm4lite_quant.kernels.picking import REFERENCE
from glm4lite_quant.kernels.step_rows import SequenceRows, StepRows
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint
from tests.glm4lite.recorder import Recorder, recorded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
HEADS = {"few": Heads(6, 2, 16, 16)}
_set = StepRows.set
STEPS = (((63, 1), (130, 1)), ((62, 4), (0, 1)))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    torch.manual_seed(0)
    monkeypatch.setattr(cuda_graph, "SIZES", (1, 2, 4))
    if not CUDA:  # Triton's products take a minute in the interpreter
        monkeypatch.setattr("glm4lite_quant.linear.pick", lambda weight: REFERENCE)
    return recorded(monkeypatch)


@pytest.mark.slow
def test_products_and_attention_over_blocks_pass(recorder: Recorder) -> None:
    found = [
        *gpu_checks.products(DEVICE, n=48, k=256, rows=(1, 4, 9), groups=(32, 64)),
        *gpu_checks.attention(DEVICE, HEADS, STEPS, size=8),
    ]
    assert [check.line() for check in found if not check.passed] == []
    assert len(found) == 6 + 6


def test_attention_that_reads_anothers_block_is_found(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepRows, "set", _shifted)
    assert not all(check.passed for check in gpu_checks.attention(DEVICE, HEADS, STEPS[:1], ("float32",), size=8))


def _shifted(rows: StepRows, sequences: list[SequenceRows]) -> int:
    """Every table is its neighbour's."""
    if sequences:
        table = sequences[-1].table
        sequences = [each._replace(table=table[: len(each.table)]) for each in sequences]
    return _set(rows, sequences)


@pytest.mark.slow
def test_several_sequences_of_a_model_pass(recorder: Recorder, tmp_path: Path) -> None:
    config = Glm4Config.from_dict(tiny_config(), "config.json")
    found = list(gpu_checks.models(tmp_path, DEVICE, config, ("int4/32",), torch.float32, (1, 3)))
    assert [check.line() for check in found if not check.passed] == []
    assert [check.name for check in found][-1] == "ids, int4/32, int8 cache, 3 at once"
    assert CUDA or recorder.replays > 10


@pytest.mark.slow
def test_a_wrong_model_is_found_and_a_check_that_raises_is_a_failure(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(write_checkpoint(tmp_path / "tiny", tiny_config()), "none", device=str(DEVICE), dtype=torch.float32)
    twin = gpu_checks.dense_twin(model)
    assert gpu_checks.compared(model, twin, 2, seed=1, steps=2)[0] < 1e-5
    twin.model.layers[1].mlp.down_proj.weight *= -1
    assert gpu_checks.compared(model, twin, 2, seed=1, steps=2)[0] > gpu_checks.LOGITS

    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel\nmore")

    for name in ("products", "attention", "models"):
        monkeypatch.setattr(gpu_checks, name, broken)
    rows = gpu_checks.all_checks(DEVICE, tmp_path)
    assert rows == [{"check": "RuntimeError: no such kernel", "off": None, "passed": False}] * 3
    assert capsys.readouterr().out == "WRONG RuntimeError: no such kernel\n" * 3
    assert not gpu_checks.Check("nothing", float("nan"), 1.0).passed


@pytest.mark.slow
def test_what_is_timed_runs(recorder: Recorder, tmp_path: Path) -> None:
    for spans in STEPS:
        size = sum(count for _, count in spans)
        assert gpu_batched.attention_step(HEADS["few"], spans, "int8", size, DEVICE)().isfinite().all()
    model = load(write_checkpoint(tmp_path / "tiny", tiny_config()), "none", device=str(DEVICE), dtype=torch.float32)
    model.model.context = 400
    for of_one in (False, True):
        assert gpu_batched.step_seconds(model, 2, of_one, steps=1) > 0
