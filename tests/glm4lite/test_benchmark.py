"""glm4lite bench: what it reports is what the model does, and what cannot be measured is refused before any work."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4lite import load
from glm4lite.base.errors import BenchmarkError, ContextLengthError
from glm4lite.base.events import Progress
from glm4lite.cli.app import main
from glm4lite.measure import benchmark as module
from glm4lite.measure.benchmark import Benchmark, Spread, benchmark
from glm4lite.measure.inventory import read_bytes
from glm4lite_quant import QuantError
from glm4lite_quant.kernels import native
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint

KEYS = {
    *("prefill_tokens_per_s", "decode_tokens_per_s", "read_gb_per_s", "bound_fraction", "load_s"),
    *("peak_rss_bytes", "peak_anon_bytes", "kernels", "memory_gb_per_s", "threads", "versions"),
    *("prefill_tokens_per_s_min", "decode_tokens_per_s_max"),
}


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "beyond_caches", lambda: 8 << 20)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> object:
    monkeypatch.setattr(sys, "argv", ["glm4lite", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code


def test_json_is_one_object_with_the_promised_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "bench", "nano", "--prompt-tokens", "8", "--new-tokens", "4", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found.keys() >= KEYS
    assert sum(found["kernels"].values()) == 31  # 5 layers of 6 linears, and the head
    assert found["prefill_tokens_per_s_min"] <= found["prefill_tokens_per_s"] <= found["prefill_tokens_per_s_max"]
    assert found["bound_fraction"] == pytest.approx(found["read_gb_per_s"] / found["memory_gb_per_s"])
    expected = found["decode_tokens_per_s"] * found["read_bytes_per_token"] / 1e9
    assert found["read_gb_per_s"] == pytest.approx(expected)


def test_a_folder_without_a_tokenizer_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "bare", tiny_config(), tokenizer=False)
    assert run(monkeypatch, "bench", folder, "--prompt-tokens", "4", "--new-tokens", "2", "--quant", "none") == 0
    shown = capsys.readouterr().out
    assert "torch bfloat16" in shown or "torch float32" in shown
    assert "of the bound" in shown


@pytest.mark.parametrize("quant", ["int4", "int8", "none"])
def test_read_bytes_are_all_linears_and_the_cache_but_not_the_embedding(quant: str) -> None:
    model = load("nano", quant=quant, dtype="float32")
    state = model.state_dict()
    weights = {
        name: tensor
        for name, tensor in state.items()
        if "_proj." in name or name.startswith("lm_head.")
        if not name.endswith("bias")
    }
    cache = 2 * 5 * 2 * 64 * 4  # keys and values, layers, heads, dimensions, float32
    assert read_bytes(model, 10) == {"cpu": sum(tensor.nbytes for tensor in weights.values()) + 10 * cache}


def test_progress_counts_the_repetitions() -> None:
    seen: list[Progress] = []
    benchmark("nano", "int8", 4, 2, seen.append, repetitions=2)
    assert [(one.done, one.total) for one in seen if one.stage == "bench"] == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("prompt_tokens", "new_tokens", "error"),
    [(0, 8, BenchmarkError), (8, 1, BenchmarkError), (4090, 8, ContextLengthError)],
)
def test_counts_that_cannot_be_measured_are_refused(
    prompt_tokens: int, new_tokens: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_checkpoint", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(error):
        benchmark("nano", None, prompt_tokens, new_tokens)


def test_the_whole_context_can_be_used_and_no_more(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "short", tiny_config(max_position_embeddings=64), tokenizer=False)
    assert benchmark(folder, "none", 60, 4, repetitions=1).prefill.median > 0
    with pytest.raises(ContextLengthError, match="61 prompt tokens and 4 new ones do not fit"):
        benchmark(folder, "none", 61, 4)


@pytest.mark.parametrize("threads", [1, 2])
def test_reading_memory_reads_all_of_it(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM4LITE_THREADS", str(threads))
    data = torch.arange((9 << 20) // 8 // 64 * 64)  # more than one block, whole steps
    assert native.read_all(data) == int(data.sum())


def test_without_the_library_torch_reads_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM4LITE_KERNELS", "/nowhere/kernels.so")
    assert native.read_all(torch.arange(64)) == 64 * 63 // 2


def test_threads_are_those_of_torch_and_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_threads", None)  # put back afterwards
    monkeypatch.setenv("GLM4LITE_THREADS", "2")
    before, environment = torch.get_num_threads(), dict(os.environ)
    try:
        native.set_threads(1)
        assert (torch.get_num_threads(), native.thread_count()) == (1, 1)
        assert os.environ == environment  # a child's threads are its own
    finally:
        torch.set_num_threads(before)
    with pytest.raises(QuantError, match="0 threads cannot be used"):
        native.set_threads(0)


def test_the_bound_is_the_sum_of_what_each_device_takes_at_least() -> None:
    gives, rate = Spread(10.0, 10.0, 10.0), Spread(5.0, 5.0, 5.0)
    reads = {"cpu": 10**9, "cuda:0": 10**9}
    found = Benchmark(
        "x", 100, 2, 1, {}, 1.0, rate, rate, reads, gives, {}, 0, 0, 0,
        disk_bytes_per_token=10**8, disk=Spread(0.5, 0.5, 0.5), bus_bytes_per_prompt=2 * 10**9, bus=gives,
        gpu=Spread(100.0, 100.0, 100.0), gpu_peak_bytes={"cuda:0": 1 << 30}, decoding={"cuda:0": "one CUDA graph"},
    )  # fmt: skip
    assert found.least_seconds == pytest.approx({"cpu": 0.2, "cuda:0": 0.01})  # the disk is slower than memory
    assert found.bound_fraction == pytest.approx(0.21 * 5)
    assert found.bus_gb_per_s == pytest.approx(2 * 5 / 100)
    lines = dict(found.lines())
    assert lines["of the bound"] == "105% (a token takes at least: cpu 200.0 ms, cuda:0 10.0 ms)"
    assert lines["decoding on cuda:0"] == "one CUDA graph"
    assert lines["bus carries"].endswith("gives 10.0 GB/s: 1%")
    assert found.to_json()["gpu_gb_per_s"] == 100.0
