"""Pre-quantized folders: written whole or not at all, mapped back in place, the same logits bit for bit."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from glm4lite.base.errors import CheckpointError, ConfigError
from glm4lite.base.events import Progress
from glm4lite.checkpoint import partial, writer
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.model.config import Glm4Config
from glm4lite.pretrained.load import load
from glm4lite.pretrained.models import Glm4ForTokenClassification
from glm4lite_quant import QuantConfig, QuantLinear
from tests.commands import python
from tests.glm4lite.checkpoints import legacy_checkpoint, tiny_config, tiny_tensors, write_checkpoint

IDS = torch.tensor([[372, 374, 377, 10, 65, 70, 378]])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


@pytest.mark.parametrize("quant", ["int4", "int8"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"intermediate_size": 100}], ids=str)
def test_a_pre_quantized_folder_gives_bit_equal_logits(tmp_path: Path, quant: str, changes: dict[str, Any]) -> None:
    source = write_checkpoint(tmp_path / "bf16", tiny_config(**changes))
    direct = load(source, quant=quant)
    written = quantize_checkpoint(source, tmp_path / "streamed", quant)
    direct.save_pretrained(tmp_path / "saved")
    expected = logits(direct)
    assert torch.equal(logits(load(written)), expected)
    assert torch.equal(logits(load(written, quant=quant)), expected)
    assert torch.equal(logits(load(tmp_path / "saved")), expected)


def test_the_written_folder_is_an_ordinary_checkpoint(folder: Path, tmp_path: Path) -> None:
    written = quantize_checkpoint(folder, tmp_path / "q", "int4")
    config = json.loads((written / "config.json").read_text())
    assert config.pop("quantization_config")["bits"] == 4
    assert config == tiny_config()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (written / name).read_bytes() == (folder / name).read_bytes()
    assert written.stat().st_mode & 0o777 == 0o777 & ~writer._umask()
    checkpoint = Checkpoint.open(written)
    with safe_open(written / "model.safetensors", "pt") as theirs:  # the format's own reader agrees
        assert set(theirs.keys()) == set(checkpoint.names())
        for name in theirs.keys():  # noqa: SIM118 - not a dict
            assert torch.equal(theirs.get_tensor(name), checkpoint.tensor(name))
    stem = "model.layers.0.mlp.down_proj"
    assert {name for name in checkpoint.names() if name.startswith(stem)} == {
        f"{stem}.{part}" for part in ("qweight", "scales", "mins", "row_scale", "row_min")
    }


def test_shards_are_split_and_indexed(folder: Path, tmp_path: Path) -> None:
    written = quantize_checkpoint(folder, tmp_path / "q", "int4", shard_bytes=20_000)
    shards = sorted(path.name for path in written.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert torch.equal(logits(load(written)), logits(load(folder, quant="int4")))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_quantized_weights_lie_in_the_mapped_file(folder: Path, tmp_path: Path) -> None:
    model = load(quantize_checkpoint(folder, tmp_path / "q", "int4"))
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(tmp_path / "q") in line:
            start, stop = line.split()[0].split("-")
            spans.append((int(start, 16), int(stop, 16)))
    weights = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(weights) == 13
    for module in weights:
        for tensor in module.weight_tensor.tensors().values():
            assert any(start <= tensor.data_ptr() < stop for start, stop in spans)
            assert tensor.data_ptr() % tensor.element_size() == 0
        assert module.qweight.data_ptr() % 64 == 0


def test_a_legacy_checkpoint_becomes_one_of_today(tmp_path: Path) -> None:
    config = tiny_config(model_type="glm")
    source = legacy_checkpoint(tmp_path / "legacy", config, tiny_tensors(config))
    written = quantize_checkpoint(source, tmp_path / "q", "int8")
    values = json.loads((written / "config.json").read_text())
    assert values["model_type"] == "glm"
    assert Glm4Config.from_dict(values).num_key_value_heads == 2
    assert torch.equal(logits(load(written)), logits(load(source, quant="int8")))


def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    config = tiny_config(architectures=["Glm4ForTokenClassification"])
    tensors = tiny_tensors(config) | {"score.weight": torch.randn(2, 64), "score.bias": torch.ones(2)}
    del tensors["lm_head.weight"]
    source = write_checkpoint(tmp_path / "bf16", config, tensors)
    written = quantize_checkpoint(source, tmp_path / "q", "int4")
    model = Glm4ForTokenClassification.from_pretrained(written)
    assert torch.equal(logits(model), logits(Glm4ForTokenClassification.from_pretrained(source, quant="int4")))


def test_progress_counts_the_source(folder: Path, tmp_path: Path) -> None:
    events: list[Progress] = []
    quantize_checkpoint(folder, tmp_path / "q", "int4", events.append)
    size = sum(tensor.nbytes for tensor in tiny_tensors(tiny_config()).values())
    assert events[-1] == Progress("quantize", size, size, "bytes")


# --- what is refused, and what is left behind


def test_a_destination_that_is_taken_is_refused(folder: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(folder, taken, "int4")
    assert str(caught.value) == f"{taken} exists and is not empty; choose another folder or remove it first"
    assert [path.name for path in taken.iterdir()] == ["note.txt"]


def test_an_empty_destination_is_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert load(quantize_checkpoint(folder, tmp_path / "empty", "int4"))


def test_a_quantized_source_is_refused(folder: Path, tmp_path: Path) -> None:
    written = quantize_checkpoint(folder, tmp_path / "q", "int8")
    with pytest.raises(ConfigError) as caught:
        quantize_checkpoint(written, tmp_path / "again", "int4")
    assert str(caught.value) == f"{written} is quantized already; quantize the original checkpoint"
    with pytest.raises(ConfigError) as caught:
        load(written, quant="int4")
    assert str(caught.value) == (
        f"{written}/config.json is quantized to int8 in groups of 32 already; load it without quant, "
        "or quantize the original checkpoint"
    )


@pytest.mark.parametrize(
    "quant",
    ["none", "int8", QuantConfig(4, 64), QuantConfig(4, 32, (("lm_head", 8),))],
    ids=["none", "int8", "64", "rules"],
)
def test_another_quant_than_the_stored_one_is_refused(folder: Path, tmp_path: Path, quant: str | QuantConfig) -> None:
    written = quantize_checkpoint(folder, tmp_path / "q", "int4")
    with pytest.raises(ConfigError) as caught:
        load(written, quant=quant)
    assert str(caught.value).startswith(f"{written}/config.json is quantized to int4 in groups of 32 already; ")
    assert load(written, quant=None)
    assert load(written, quant=QuantConfig(4, 32))
    assert load(folder, quant="none")


def test_a_legacy_checkpoint_without_token_ids_keeps_it_so(tmp_path: Path) -> None:
    config = tiny_config(model_type="glm")
    source = legacy_checkpoint(tmp_path / "legacy", config, tiny_tensors(config))
    values = json.loads((source / "config.json").read_text()) | {"pad_token_id": None, "eos_token_id": None}
    (source / "config.json").write_text(json.dumps(values))
    written = load(quantize_checkpoint(source, tmp_path / "q", "int8")).config
    assert (written.pad_token_id, written.eos_token_ids) == (None, [])


def test_quantizing_to_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quant 'none' leaves nothing to do; use int4 or int8"):
        quantize_checkpoint(folder, tmp_path / "q", "none")


def test_a_missing_part_of_a_quantized_weight_is_named(folder: Path, tmp_path: Path) -> None:
    written = quantize_checkpoint(folder, tmp_path / "q", "int4")
    path = written / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    del tensors["model.layers.0.mlp.down_proj.mins"]
    write_checkpoint(written, json.loads((written / "config.json").read_text()), tensors, shards=1, tokenizer=False)
    with pytest.raises(CheckpointError) as caught:
        load(written)
    assert str(caught.value) == (
        f"model.layers.0.mlp.down_proj.weight in {path}: mins is missing from an int4 weight; "
        "download it or quantize the original again"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_stop_leaves_nothing_behind(folder: Path, tmp_path: Path, error: type[BaseException]) -> None:
    before = sorted(tmp_path.iterdir())

    def stop(event: Progress) -> None:
        if event.done > event.total // 2:
            raise error

    with pytest.raises(error):
        quantize_checkpoint(folder, tmp_path / "q", "int4", stop)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EACCES])
def test_an_error_of_the_progress_callback_is_not_taken_for_the_disks(
    folder: Path, tmp_path: Path, number: int
) -> None:
    before = sorted(tmp_path.iterdir())

    def broken(_: Progress) -> None:
        raise OSError(number, "of the callback")

    with pytest.raises(OSError, match="of the callback") as caught:
        quantize_checkpoint(folder, tmp_path / "q", "int4", broken)
    assert caught.value.errno == number
    assert sorted(tmp_path.iterdir()) == before


def test_a_companion_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "LICENSE").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(folder, tmp_path / "q", "int4")
    assert str(caught.value) == f"{folder}/LICENSE cannot be read (Is a directory); make it readable or remove it"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["x" * 300, "~nosuchuser/q"])
def test_a_destination_that_cannot_be_is_said_before_any_work(folder: Path, tmp_path: Path, name: str) -> None:
    destination = name if name.startswith("~") else tmp_path / name
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*\); choose another folder"):
        quantize_checkpoint(folder, destination, "int4")


def test_quant_and_destination_are_checked_before_the_source_is_looked_for(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quant is 'int3'"):
        quantize_checkpoint("org/absent", tmp_path / "q", "int3")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize_checkpoint("org/absent", folder, "int4")
    choices: list[dict[str, Any]] = [{"quant": "int3"}, {"dtype": "float16"}, {"device": "abacus"}]
    for wrong in choices:
        with pytest.raises(ConfigError, match=next(iter(wrong.values()))):
            load("org/absent", **wrong)


def test_a_source_that_breaks_midway_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())

    def cut(event: Progress) -> None:
        shard = folder / "model-00002-of-00002.safetensors"
        os.truncate(shard, 3000)

    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors ended while .* was read; download"):
        quantize_checkpoint(folder, tmp_path / "q", "int4", cut)
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    tool = shutil.which("mount")
    command = [tool or "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if tool is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_any_work(folder: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(200_000))
    events: list[Progress] = []
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(folder, small_disk / "q", "int4", events.append)
    assert str(caught.value).startswith(f"{small_disk}/q needs 100 KiB, 60 KiB are free on that disk; free some space")
    assert events == []
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_disk_that_fills_while_quantizing_leaves_nothing_behind(folder: Path, small_disk: Path) -> None:
    filler = small_disk / "filler"

    def fill(_: Progress) -> None:
        if not filler.exists():
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass  # until the disk is full

    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(folder, small_disk / "q", "int4", fill)
    assert str(caught.value) == (
        f"{small_disk}/q cannot be written: the disk is full; 100 KiB are needed, free some space and run it again "
        "(nothing was left behind)"
    )
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_folder_that_cannot_be_written_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(folder, tmp_path / "file" / "q", "int4")
    assert str(caught.value) == f"{tmp_path}/file/q cannot be written (File exists); choose another folder"


def killed_while_writing(folder: Path, target: Path, number: int, ignored: int = 0) -> tuple[int, str]:
    """The exit code and stderr of `glm4lite quantize`, which gets the signal when its partial folder is there."""
    code = (
        "import os, signal, sys, threading\n"
        "from glm4lite.checkpoint import quantize as quantized\n"
        "if int(sys.argv[2]): signal.signal(int(sys.argv[2]), signal.SIG_IGN)\n"
        "write, number = quantized._write_fill, int(sys.argv[1])\n"
        "def ended(*args):\n"
        "    write(*args)\n"
        "    os.kill(os.getpid(), number)\n"
        "quantized._write_fill = ended\n"
        "sys.argv = ['glm4lite', 'quantize', *sys.argv[3:], '--no-calibration']\n"
        "from glm4lite.cli.app import main\n"
        "main()\n"
    )
    command = [*python(), "-c", code, str(int(number)), str(int(ignored)), str(folder), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX signals")
def test_a_signal_cleans_up_as_ctrl_c_does(folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert killed_while_writing(folder, tmp_path / "q", signal.SIGTERM) == (143, "")
    assert killed_while_writing(folder, tmp_path / "q", signal.SIGHUP) == (129, "")
    assert killed_while_writing(folder, tmp_path / "q", signal.SIGINT)[0] == 130
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX signals")
def test_under_nohup_a_closed_terminal_ends_nothing(folder: Path, tmp_path: Path) -> None:
    code, said = killed_while_writing(folder, tmp_path / "q", signal.SIGHUP, ignored=signal.SIGHUP)
    assert code == 0, said
    assert (tmp_path / "q" / "config.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="no locks that end with their process")
def test_what_a_killed_run_left_is_removed_by_the_next(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert killed_while_writing(folder, tmp_path / "other", signal.SIGKILL)[0] == -signal.SIGKILL
    (left,) = tmp_path.glob(".*.partial-*")
    quantize_checkpoint(folder, tmp_path / "q", "int4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "tiny"]
    assert not list((tmp_path / "q").glob(".*"))
    assert [line for line in caplog.messages if line.startswith(f"removed {left} (")]


def test_what_is_still_written_or_not_known_is_left_alone(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    living = partial.partial_folder(tmp_path / "q")
    (living.path / "shard").write_bytes(b"half")
    (old := tmp_path / ".q.partial-abcdefgh").mkdir()
    (tmp_path / ".link.partial-abcdefgh").symlink_to(folder)
    quantize_checkpoint(folder, tmp_path / "q", "int4")
    assert (living.path / "shard").read_bytes() == b"half"
    assert old.exists()
    assert (folder / "config.json").exists()
    assert f"{old} (0 KiB) may be left of an earlier run; remove it if none writes it" in caplog.messages
    living.discard()
    assert not living.path.exists()


@pytest.mark.parametrize("there", [True, False], ids=["to an empty folder", "to nothing"])
def test_a_link_is_written_where_it_leads(there: bool, folder: Path, tmp_path: Path) -> None:
    real = tmp_path / "disk" / "real"
    (real if there else real.parent).mkdir(parents=True)
    (tmp_path / "q").symlink_to(real)
    quantize_checkpoint(folder, tmp_path / "q", "int4")
    assert (tmp_path / "q").is_symlink()
    assert Checkpoint.open(real).names() == Checkpoint.open(tmp_path / "q").names()


def test_a_loop_of_links_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "q").symlink_to("q")
    with pytest.raises(CheckpointError, match=r"q cannot be written \(Too many levels of symbolic links\)"):
        quantize_checkpoint(folder, tmp_path / "q", "int4")


def test_a_folder_inside_the_source_is_written(folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    quantize_checkpoint(folder, folder / "int4", "int4")
    assert {path.name for path in folder.iterdir()} == before | {"int4"}


def test_a_read_only_disk_is_said_before_any_work(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint("org/absent", small_disk / "q", "int4")
    assert str(caught.value) == (f"{small_disk}/q cannot be written ({small_disk} is read-only); choose another folder")


def test_a_limit_of_file_sizes_is_said(folder: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before, limits = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="its files are larger than `ulimit -f` or that disk allows"):
            quantize_checkpoint(folder, tmp_path / "q", "int4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before
