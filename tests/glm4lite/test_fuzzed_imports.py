"""Other tools' checkpoints and GGUF files changed at random: each is read, or refused with an error of ours."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.registry import open_source
from glm4lite.checkpoint.prepare import prepare
from glm4lite.gguf.companions import companions_folder
from glm4lite.gguf.header import read_headers
from glm4lite.gguf.model import model_config, renamed
from glm4lite.model.causal_lm import CausalLM
from glm4lite_quant import QuantConfig
from glm4lite_quant.config import KEPT
from tests.glm4lite.gguf_files import write_gguf
from tests.glm4lite.packed import Layout, write_packed
from tests.glm4lite.test_fuzzed_checkpoints import change_value, containers, only_own_errors
from tests.glm4lite.test_imports import AGAIN, LAYOUTS

STARTS: dict[str, Layout] = LAYOUTS | AGAIN
_DTYPES = (torch.int32, torch.int8, torch.uint8, torch.float16, torch.float32, torch.int64, torch.float8_e4m3fn)


READERS = ("gptq", "awq", "compressed-tensors", "auto-round", "mlx", "hqq", "fp8")
"""How the names of the layouts begin that one reader reads."""


@dataclass(frozen=True)
class Original:
    """A checkpoint of a layout, in one shard; `folder` is changed for each case and put right behind it."""

    folder: Path
    config: str
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Original]:
    """One of each layout."""
    return {name: original(tmp_path_factory.mktemp("start"), layout) for name, layout in STARTS.items()}


def original(place: Path, layout: Layout) -> Original:
    folder, plain = write_packed(place, layout)
    shutil.rmtree(plain)
    tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    return Original(folder, (folder / "config.json").read_text(encoding="utf-8"), tensors)


def own_errors_only(action: Callable[[], object], note: str) -> None:
    try:
        only_own_errors(action)
    except BaseException as error:
        error.add_note(note)
        raise


def change_tensors(chance: random.Random, tensors: dict[str, torch.Tensor]) -> None:
    """One part of a quantized weight: gone, of another type, shape, or of other values."""
    name = chance.choice([key for key in tensors if ".layers." in key and "norm" not in key and "bias" not in key])
    value, what = tensors[name], chance.choice(("gone", "type", "shape", "values", "other"))
    if what == "gone":
        del tensors[name]
    elif what == "type":
        tensors[name] = value.float().nan_to_num().clamp(-100, 100).to(chance.choice(_DTYPES))
    elif what == "shape":
        rows = chance.choice((0, 1, 8, 16, max(value.shape[0] - 1, 0) if value.dim() else 0))
        tensors[name] = value[:rows].clone() if value.dim() else value[None].clone()
    elif what == "values" and value.is_floating_point() and value.numel():
        odd = chance.choice((float("nan"), float("inf"), -1.0, 0.0, 6e4, 1e-7))
        value.view(-1)[chance.randrange(value.numel())] = odd
    elif value.numel() and value.dtype in (torch.int32, torch.int64):
        value.view(-1)[chance.randrange(value.numel())] = chance.choice((-1, 2**31 - 1, -(2**31), 7))
    else:
        tensors[name] = chance.choice(list(tensors.values())).clone()


def read_everything(folder: Path, quant: str | None) -> None:
    prepared = prepare(open_source(folder), quant, CausalLM)
    for fill in prepared.plan.fills:
        if isinstance(fill.quant, QuantConfig) and fill.quant.method == KEPT:
            prepared.checkpoint.codes(fill.source, 0, fill.shape[0], fill.quant.group_size)
        else:
            assert tuple(prepared.checkpoint.tensor(fill.source).shape) == fill.shape


def one_change(name: str, start: Original, seed: int) -> None:
    """Config or weights are changed; then all is read, or refused."""
    chance = random.Random(seed)
    config, weights = start.folder / "config.json", start.folder / "model.safetensors"
    if chance.random() < 0.5:
        values = json.loads(start.config)
        place = next(values[key] for key in ("quantization_config", "quantization") if key in values)
        if containers(place):
            change_value(chance, place)
        try:
            config.write_text(json.dumps(values), encoding="utf-8")
        except ValueError:  # a value that was moved into itself
            return
    else:
        tensors = {key: value.clone() for key, value in start.tensors.items()}
        change_tensors(chance, tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, weights)
    own_errors_only(lambda: read_everything(start.folder, chance.choice((None, "none"))), f"seed {seed}: {name}")
    if config.read_text(encoding="utf-8") != start.config:
        config.write_text(start.config, encoding="utf-8")
    else:
        save_file(start.tensors, weights)


def fuzz(originals: dict[str, Original], reader: str, seeds: Iterable[int]) -> None:
    names = [name for name in originals if name.startswith(reader)]
    for seed in seeds:
        name = names[seed % len(names)]
        one_change(name, originals[name], seed)


def test_changed_checkpoints_are_read_or_refused(originals: dict[str, Original]) -> None:
    for reader in READERS:
        fuzz(originals, reader, range(3))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("reader", READERS)
def test_many_changed_checkpoints_are_read_or_refused(originals: dict[str, Original], reader: str) -> None:
    fuzz(originals, reader, range(1000, 101_000))


# --- GGUF


def changed_bytes(chance: random.Random, whole: bytes, header: int) -> bytes:
    """The header changed in some places: flipped, overwritten with a length, cut out, put in."""
    data = bytearray(whole)
    for _ in range(chance.choice((1, 1, 2, 5))):
        place = chance.randrange(4, header)
        what = chance.choice(("flip", "flip", "number", "cut", "insert", "end"))
        if what == "flip":
            data[place] ^= 1 << chance.randrange(8)
        elif what == "number":
            data[place : place + 8] = chance.choice((0, 1, 2**31, 2**32, 2**62, 2**64 - 1)).to_bytes(8, "little")
        elif what == "cut":
            del data[place : place + chance.choice((1, 4, 8, 100))]
        elif what == "insert":
            data[place:place] = chance.randbytes(chance.choice((1, 4, 8)))
        else:
            del data[chance.randrange(len(data)) :]
            break
    return bytes(data)


def read_gguf(path: Path) -> Any:
    header = read_headers(path)
    config = model_config(path, header)
    tensors = {name: tensor for name, _, tensor in renamed(path, header, config)}
    return Checkpoint.of(path.parent, config, tensors)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A file's bytes, and how many of them are its header."""
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    write_gguf(path, "Q4_0")
    return path.read_bytes(), min(tensor.offset for tensor in read_headers(path).tensors.values())


def fuzz_gguf(gguf_file: tuple[bytes, int], path: Path, seeds: range) -> None:
    for seed in seeds:
        path.write_bytes(changed_bytes(random.Random(seed), *gguf_file))
        own_errors_only(lambda: read_gguf(path), f"seed {seed}")


def test_changed_gguf_headers_are_read_or_refused(gguf_file: tuple[bytes, int], tmp_path: Path) -> None:
    fuzz_gguf(gguf_file, tmp_path / "a.gguf", range(60))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_changed_gguf_headers_are_read_or_refused(gguf_file: tuple[bytes, int], tmp_path: Path) -> None:
    fuzz_gguf(gguf_file, tmp_path / "a.gguf", range(10_000, 110_000))


def test_changed_metadata_makes_a_folder_or_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    path = tmp_path / "a.gguf"
    write_gguf(path, "Q8_0")
    header = read_headers(path)
    config = model_config(path, header)
    for seed in range(15):
        chance = random.Random(seed)
        metadata = {key: list(value) if isinstance(value, list) else value for key, value in header.metadata.items()}
        change_value(chance, metadata)
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
        own_errors_only(lambda: companions_folder(path, metadata, config), f"seed {seed}")  # noqa: B023
