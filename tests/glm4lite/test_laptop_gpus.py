"""GPUs of laptops, by what torch would say of them: which is used, which is left out and why. None of them is here."""

from __future__ import annotations

import pytest
import torch

from glm4lite import load
from glm4lite.loading.plan_report import plan
from glm4lite.memory import machine
from glm4lite.memory.budget import Budget
from glm4lite_quant.kernels import gpu

GIB = 1 << 30
TURING, AMPERE = "GeForce GTX 1650", "GeForce RTX 3050"


def cards(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """torch finds these, with 4 GiB free each; a Turing has no kernel."""
    monkeypatch.delenv("GLM4LITE_GPU_KERNEL", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (4 * GIB, 4 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    capabilities = {TURING: (7, 5), AMPERE: (8, 6)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[names[device.index]])

    def problem(name: str, device: torch.device) -> str:
        return f"{name} needs compute capability 8.0" if names[device.index] == TURING else ""

    monkeypatch.setattr(gpu, "problem", problem)


def test_one_of_two_gpus_keeps_its_number_where_the_other_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, TURING, AMPERE)
    said: list[str] = []
    assert machine.free_gpus(True, said.append) == (0, 4 * GIB)
    why = "no kernel for int4 runs there: triton needs compute capability 8.0"
    assert said == [f"{TURING} is left out, the CPU is faster: {why}"]


@pytest.mark.parametrize("quant", ["int4", "none"])
def test_a_model_is_loaded_to_the_cpu_with_a_line_that_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, quant: str
) -> None:
    cards(monkeypatch, TURING)
    model = load("nano", quant=quant)
    assert {parameter.device.type for parameter in model.parameters()} <= {"cpu"}
    assert [line for line in caplog.messages if line.startswith(f"{TURING} is left out, the CPU is faster: ")]


def test_plan_leaves_it_out_too_and_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, TURING)
    monkeypatch.setattr(machine, "ram_bandwidth", lambda quantized: 20e9)
    monkeypatch.setattr(machine, "cpu_rate", lambda quantized: 1e12)
    report = plan("nano", budget=Budget())
    assert not report.placement.gpus
    assert any(TURING in note for note in report.assumed)
