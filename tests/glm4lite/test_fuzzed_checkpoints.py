"""Checkpoints changed at random: whatever a stranger's file holds, it is read, or refused with an error of ours."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm4lite.base.errors import Glm4liteError
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.engine.engine import Engine
from glm4lite.loading.plan_report import plan
from glm4lite.measure.info import model_facts
from glm4lite.pretrained.load import load
from glm4lite.text.tokenizer import Tokenizer
from glm4lite_quant import QuantConfig, QuantError
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint

ODD: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 32, 64, 255, 2**16, 2**24, 2**31, 2**62, 2**63, 2**64, 10**18, 10**400, -(2**63)),
    *(0.0, -0.0, 0.5, 1e-300, 1e30, 1e308, float("nan"), float("inf"), True, False, None),
    *("", "x", "yarn", "NaN", "\ud800", "\x00", "\x1b[2J\n", "a" * 5000, "../x", "<|user|>", "{{ 1/0 }}"),
    *([], {}, [[]], [0], [2**62, 2**62], [0, 2**62, 2**62], {"": {}}, {"type": "yarn"}, [None], [-1, 1.5, True]),
)
"""Values that a field of any type may turn out to hold."""

JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plain and a quantized checkpoint."""
    plain = write_checkpoint(tmp_path_factory.mktemp("fuzz") / "plain", tiny_config(num_hidden_layers=1), shards=2)
    made = quantize_checkpoint(plain, plain.with_name("int4"), QuantConfig(method="minmax"), shard_bytes=60_000)
    return plain, made


def containers(value: Any) -> list[Any]:
    """Every non-empty list and object within a JSON value."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return ([value] if inner else []) + [found for item in inner for found in containers(item)]


def change_value(chance: random.Random, value: Any) -> None:
    """One entry anywhere: replaced, removed, renamed, doubled or exchanged with another."""
    place = chance.choice(containers(value))
    key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
    what = chance.choice(("odd", "odd", "odd", "near", "remove", "rename", "move"))
    if what == "remove":
        del place[key]
    elif what == "rename" and isinstance(place, dict):
        place[chance.choice([str(odd) for odd in ODD] + ["model.layers.0.mlp.down_proj.weight"])] = place.pop(key)
    elif what == "near" and type(place[key]) in (int, float):
        place[key] += chance.choice((-1, 1, 0.5, place[key]))
    elif what == "move":
        place[key] = chance.choice(containers(value) + list(ODD))
    else:
        place[key] = chance.choice(ODD)


def change_json(chance: random.Random, path: Path) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if containers(value):
            change_value(chance, value)
    try:
        path.write_text(json.dumps(value), encoding="utf-8")
    except ValueError:  # a value that was moved into itself
        path.write_text('{"a": ' * 100_000, encoding="utf-8")


def change_header(chance: random.Random, path: Path) -> None:
    """The JSON in front of a shard's data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for _ in range(chance.choice((1, 1, 2))):
        if containers(header):
            change_value(chance, header)
    try:
        text = json.dumps(header).encode()
    except ValueError:
        text = b"{}"
    path.write_bytes(struct.pack("<Q", chance.choice([len(text)] * 9 + [2**63])) + text + raw[8 + length :])


def change_bytes(chance: random.Random, path: Path) -> None:
    """Some bytes near the beginning: flipped, cut out or put in."""
    raw = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 3, 20))):
        place = chance.randrange(min(len(raw), 4000))
        what = chance.choice(("flip", "cut", "insert"))
        if what == "flip":
            raw[place] ^= 1 << chance.randrange(8)
        elif what == "cut":
            del raw[place : place + chance.choice((1, 8, 100))]
        else:
            raw[place:place] = chance.choice((b"\xef\xbb\xbf", b"\0" * 8, b"[" * 2000, b"9" * 5000, b"NaN", b'"'))
        if not raw:
            break
    path.write_bytes(raw)


def changed(chance: random.Random, folder: Path) -> str:
    """Changes one or two files; which, for the message of a failure."""
    said = []
    for _ in range(chance.choice((1, 1, 2))):
        path = chance.choice(sorted(folder.iterdir()))
        if path.suffix == ".jinja":
            how: Callable[[random.Random, Path], None] = change_bytes
        elif path.suffix == ".safetensors":
            how = chance.choice((change_header, change_header, change_header, change_bytes))
        else:
            how = chance.choice((change_json, change_json, change_json, change_bytes))
        try:
            how(chance, path)
        except (ValueError, RecursionError, struct.error):  # what was changed before is no longer JSON
            change_bytes(chance, path)
        said.append(f"{how.__name__} {path.name}")
    return ", ".join(said)


def only_own_errors(action: Callable[[], object]) -> None:
    """Runs it; its failure, if any, is an error of ours, in one line."""
    message = ""
    try:
        action()
    except (Glm4liteError, QuantError) as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 2000


def read_everything(folder: Path) -> None:
    """All ways in which a command reads a folder."""
    only_own_errors(lambda: load(folder))
    only_own_errors(lambda: model_facts(str(folder)))
    only_own_errors(lambda: plan(str(folder)))
    only_own_errors(lambda: Tokenizer.from_folder(folder).ids("a <|user|> 1", special=True))
    only_own_errors(lambda: load(folder, quant=QuantConfig(method="minmax")))


@pytest.mark.parametrize("seed", range(4))
def test_a_checkpoint_changed_at_random_is_read_or_refused(
    originals: tuple[Path, Path], tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    folder = tmp_path / "changed"
    shutil.copytree(chance.choice(originals), folder)
    what = changed(chance, folder)
    try:
        read_everything(folder)
    except BaseException as error:
        error.add_note(f"seed {seed}: {what}")
        raise


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_checkpoints_changed_at_random_are_read_or_refused(originals: tuple[Path, Path], tmp_path: Path) -> None:
    for seed in range(1000, 1400):
        folder = tmp_path / str(seed)
        folder.mkdir()
        test_a_checkpoint_changed_at_random_is_read_or_refused(originals, folder, seed)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_an_engine_reads_or_refuses_what_was_changed_at_random(originals: tuple[Path, Path], tmp_path: Path) -> None:
    for seed in range(3000, 3100):
        folder = tmp_path / str(seed)
        shutil.copytree(originals[1], folder)
        changed(random.Random(seed), folder)
        only_own_errors(lambda: Engine.load(folder))  # noqa: B023
        shutil.rmtree(folder)
