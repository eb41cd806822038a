"""The memory promise: N bytes of bfloat16 shards load to int4 within the quantized size plus half a GiB, never N."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.checkpoint.writer import FolderWriter, PlannedTensor
from glm4lite_quant import QuantConfig
from glm4lite_quant.kernels import native
from tests.glm4lite.checkpoints import shapes, tiny_config

ALLOWED = 512 << 20
LAYER = 2 * (4608 * 4096 + 4096 * 4096 + 27392 * 4096 + 4096 * 13696)  # bytes of one bfloat16 layer of the 9B
ROWS = 1024

LOAD = """
import json, sys, threading, time
import torch

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

bare, peak, running = anonymous(), 0, True

def sample():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.005)

sampler = threading.Thread(target=sample)
sampler.start()
from glm4lite.pretrained.load import load
begin = time.monotonic()
from glm4lite_quant import QuantConfig
quant = {"": None, "search": QuantConfig(4, method="search")}.get(sys.argv[2], sys.argv[2])
model = load(sys.argv[1], quant=quant)
seconds = time.monotonic() - begin
with torch.inference_mode():
    finite = bool(model(torch.tensor([[1, 2, 3]])).logits.isfinite().all())
running = False
sampler.join()
held = sum(value.nbytes for value in model.state_dict().values())
kernel = model.lm_head.kernel
print(json.dumps({"bare": bare, "peak": peak, "held": held, "seconds": seconds, "finite": finite, "kernel": kernel}))
"""

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc"),
    pytest.mark.skipif(native.backend() is None, reason="no native kernels: 2 GB take too long in torch"),
]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids="{} layers".format)
def big(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Layers of the 9B's shapes and a vocabulary of 32768: of four, 2.2 GB of bfloat16 in three shards."""
    config = tiny_config(
        hidden_size=4096,
        intermediate_size=13696,
        num_hidden_layers=request.param,
        num_attention_heads=32,
        head_dim=128,
        vocab_size=32768,
    )
    planned = [PlannedTensor(name, torch.bfloat16, shape) for name, shape in shapes(config).items()]
    # all of it in bfloat16 is far more than a load may take
    assert sum(tensor.nbytes for tensor in planned) >= (2 if request.param == 4 else 1.25) * 1e9
    folder = tmp_path_factory.mktemp("memory") / "big"
    noise = torch.randn(ROWS, 13696, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with FolderWriter(folder, planned, shard_bytes=800 << 20) as writer:
        for tensor in planned:
            for start in range(0, tensor.shape[0], ROWS):
                count = min(ROWS, tensor.shape[0] - start)
                rows = noise[:count, : tensor.shape[1]] if len(tensor.shape) == 2 else torch.ones(count).bfloat16()
                writer.append(tensor.name, rows)
        writer.write_json("config.json", config)
    yield folder
    for file in folder.iterdir():
        file.unlink()  # pytest keeps the folders of the last runs


def measure(folder: Path, quant: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), quant], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def report(what: str, found: dict[str, float], shards: int, allowed: float) -> None:
    mib = {name: round(found[name] / 2**20) for name in ("bare", "held", "peak")}
    print(
        f"\n{what}: {shards / 2**20:.0f} MiB of shards, weights {mib['held']} MiB, peak anonymous {mib['peak']} MiB, "
        f"bare torch {mib['bare']} MiB, allowed {allowed / 2**20:.0f} MiB, {found['seconds']:.1f} s, {found['kernel']}"
    )


@pytest.mark.parametrize("quant", ["search", pytest.param("int4", marks=pytest.mark.slow)])
def test_streaming_to_int4_peaks_at_the_quantized_size_plus_half_a_gib(
    big: Path, quant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = sum(file.stat().st_size for file in big.glob("*.safetensors"))
    assert len(list(big.glob("*.safetensors"))) > 1
    found = measure(big, quant)
    allowed = found["held"] + ALLOWED + found["bare"] + (LAYER if quant == "int4" else 0)  # calibrated: a layer more
    with capsys.disabled():
        report(f"bf16 to {'calibrated int4' if quant == 'int4' else 'int4'}", found, shards, allowed)
    assert found["finite"]
    assert found["peak"] <= allowed
    assert found["held"] < shards / 2.5


def test_a_pre_quantized_folder_is_mapped_not_copied(
    big: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = time.monotonic()
    written = quantize_checkpoint(big, tmp_path / "int4", QuantConfig(4, method="search"))
    seconds = time.monotonic() - begin
    shards = sum(file.stat().st_size for file in written.glob("*.safetensors"))
    found = measure(written, "")
    allowed = found["bare"] + ALLOWED / 2
    with capsys.disabled():
        report(f"pre-quantized (written in {seconds:.1f} s)", found, shards, allowed)
    for file in written.iterdir():
        file.unlink()
    assert found["finite"]
    assert found["peak"] <= allowed
