"""What is kept in a folder of what was computed for prompts: its bits, who finds it again, faults, limits."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import glm4lite
from glm4lite.base.errors import ConfigError, Glm4liteError
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.cli.options import with_sizes
from glm4lite.engine import kept_prefixes, prefix_files
from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import Engine
from glm4lite.engine.kept_prefixes import FILE_BYTES, KeptPrefixes, key_of, wanted_size
from glm4lite.engine.prefix_files import USUAL_SIZE, PrefixFolder, read_head
from glm4lite.engine.prefix_pool import PrefixPool
from glm4lite.engine.sampling import SamplingParams
from glm4lite.model.step import Span
from tests.commands import FRESH, forked, python, run
from tests.glm4lite.served import wait_for

NANO = Path(glm4lite.__file__).parent / "nano"
NEW = 12
GREEDY = SamplingParams(temperature=0, max_new_tokens=NEW)
TEXT = "You are nano. One two three four five six seven eight nine ten, and then there are some more of them. "


@pytest.fixture(
    scope="module",
    params=[
        ("int4", "int8"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in (("int4", "float"), ("none", "float"))),
    ],
    ids="-".join,
)
def engine(request: pytest.FixtureRequest) -> Engine:
    quant, kv = request.param
    return Engine.load("nano", quant=quant, device="cpu", kv=kv)


@pytest.fixture(scope="module")
def int8() -> Engine:
    return Engine.load("nano", quant="int8", device="cpu")


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> int:
    """Ids of a file where a prompt is to take several."""
    monkeypatch.setattr(kept_prefixes, "MOST_IDS", 64)
    return 64


def started(engine: Engine, folder: Path, size: int = USUAL_SIZE, memory: int | None = None) -> KeptPrefixes:
    """As in a process that has just started: nothing is in memory, and the folder is what it is."""
    kept = KeptPrefixes(engine.model, "nano", key_of(engine.model, Checkpoint.open(NANO)), PrefixFolder(folder, size))
    engine.prefixes = PrefixPool(engine.model, memory, kept)
    return kept


def answer(engine: Engine, prompt: list[int]) -> tuple[list[int], int]:
    """New ids, and how many of the prompt's had to be computed."""
    generation = engine.generate(prompt, GREEDY)
    for _ in engine.pieces(generation):
        pass
    return generation.ids, generation.prefilled_tokens


def alone(engine: Engine, prompt: list[int]) -> list[int]:
    return list(Generation(engine.model, prompt, GREEDY, engine.tokenizer.stop_ids, engine.tokenizer.size))


def ids(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer.prefix_ids + engine.tokenizer.ids(text)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.kv"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- what is found


@pytest.mark.usefixtures("small_files")
def test_what_is_read_has_the_bits_it_had_in_memory_and_the_answer_is_the_same(engine: Engine, tmp_path: Path) -> None:
    prompt = ids(engine, TEXT * 8)
    kept = started(engine, tmp_path)
    said, computed = answer(engine, prompt)
    assert computed == len(prompt)
    kept.close()
    there = engine.prefixes.take([*prompt, *said])
    there.keep_common_prefix([*prompt, *said])
    started(engine, tmp_path)
    here = engine.prefixes.take([*prompt, *said])
    engine.prefixes.extend(here, [*prompt, *said])
    assert here.ids == there.ids == [*prompt, *said][: len(here.ids)]
    assert len(here.ids) == len(prompt) + len(said) - 1
    for mine, theirs in zip(here.kv.layers, there.kv.layers, strict=True):
        for read, held in zip(mine.past() or (), theirs.past() or (), strict=True):
            assert torch.equal(read, held)
    rows = [engine.model.step([Span([said[-1], 30, 31], cache.kv, 3)])[0] for cache in (here, there)]
    assert torch.equal(*rows)
    started(engine, tmp_path)
    assert answer(engine, prompt) == (said, 1)


@pytest.mark.usefixtures("small_files")
def test_conversations_that_begin_alike_share_files_and_pay_for_what_differs(engine: Engine, tmp_path: Path) -> None:
    kept = started(engine, tmp_path)
    system = ids(engine, TEXT * 5)
    one, two = ([*system, *engine.tokenizer.ids(text * 9)] for text in ("An apple, please", "Two pears"))
    shared = next(index for index, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    answer(engine, one)
    kept.close()
    kept = started(engine, tmp_path)
    said, computed = answer(engine, two)
    assert computed == len(two) - shared  # to the id, not to the block
    kept.close()
    assert said == alone(engine, two)
    total = sum(len(read_head(path).ids) for path in files(tmp_path))
    assert total <= len(one) + len(two) - shared + 2 * NEW + 2 * prefix_files.BLOCK
    for prompt in (one, two):
        started(engine, tmp_path)
        assert answer(engine, prompt)[1] == 1


@pytest.mark.usefixtures("small_files")
def test_a_conversation_that_goes_on_writes_its_new_turns_alone(int8: Engine, tmp_path: Path) -> None:
    kept, prompt, sizes = started(int8, tmp_path), ids(int8, TEXT * 6), list[int]()
    for _ in range(4):
        said, _ = answer(int8, prompt)
        kept.close()
        sizes.append(sum(len(read_head(path).ids) for path in files(tmp_path)))
        prompt = [*prompt, *said, *int8.tokenizer.ids(" Please go on, and tell me a little more of that.")]
        if len(sizes) == 2:
            kept = started(int8, tmp_path)
    grown = len(prompt) - len(ids(int8, TEXT * 6))
    assert all(before < after for before, after in itertools.pairwise(sizes))
    assert sizes[-1] - sizes[0] < grown + 4 * prefix_files.BLOCK


def test_what_memory_has_of_a_prompt_is_completed_from_the_disk(int8: Engine, tmp_path: Path) -> None:
    kept = started(int8, tmp_path)
    long = ids(int8, TEXT * 8)
    answer(int8, long)
    kept.close()
    started(int8, tmp_path)
    assert answer(int8, long[:101])[1] == 1
    assert answer(int8, long) == (alone(int8, long), 1)


def test_what_others_wrote_or_deleted_meanwhile_is_noticed(int8: Engine, tmp_path: Path) -> None:
    mine = started(int8, tmp_path)
    pool = int8.prefixes
    answer(int8, ids(int8, "something else " * 20))
    mine.close()
    theirs, prompt = started(int8, tmp_path), ids(int8, TEXT * 4)
    answer(int8, prompt)
    theirs.close()
    int8.prefixes = pool
    assert answer(int8, prompt)[1] == 1
    mine.close()
    shutil.rmtree(next(tmp_path.glob("?" * 32)))
    int8.prefixes = PrefixPool(int8.model, None, mine)
    assert answer(int8, prompt)[1] == len(prompt)
    mine.close()
    started(int8, tmp_path)
    assert answer(int8, prompt)[1] == 1  # it was written anew


@pytest.mark.usefixtures("small_files")
def test_answers_that_run_together_over_a_busy_folder_are_each_what_they_are_alone(
    int8: Engine, tmp_path: Path
) -> None:
    """Caches are taken while they are written, given up before they are, and read in every state of that."""
    chance, prompts = random.Random(5), list[list[int]]()
    for _ in range(24):
        begin = prompts[-1][: chance.randint(1, len(prompts[-1]))] if prompts and chance.random() < 0.7 else []
        prompts.append([*begin, *(chance.randint(300, 1200) for _ in range(chance.randint(20, 200)))])
    wanted = [alone(int8, prompt) for prompt in prompts]
    for _ in range(2):
        kept = started(int8, tmp_path, memory=(max(map(len, prompts)) + 128) * int8.model.model.cache_bytes)
        pending = [int8.generate(prompt, GREEDY) for prompt in prompts]
        for group in range(0, len(pending), 4):
            readers = [int8.pieces(generation) for generation in pending[group : group + 4]]
            while readers:
                reader = chance.choice(readers)
                if next(reader, StopIteration) is StopIteration:
                    readers.remove(reader)
        assert [generation.ids for generation in pending] == wanted
        kept.close()
    assert sum(generation.prefilled_tokens for generation in pending) < sum(map(len, prompts)) // 2


@pytest.mark.usefixtures("small_files")
def test_a_cache_that_is_taken_is_not_looked_at_by_the_writer(
    int8: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, pool, prompt = started(int8, tmp_path), int8.prefixes, list(range(300, 700))
    writing, go_on, write = threading.Event(), threading.Event(), kept.folder.write

    def slowly(*arguments: Any) -> Any:
        writing.set()
        go_on.wait(20)
        return write(*arguments)

    monkeypatch.setattr(kept.folder, "write", slowly)
    answer(int8, prompt)
    assert writing.wait(20)
    cache = pool.take([*prompt[:300], 299, 298])
    cache.keep_common_prefix([*prompt[:300], 299, 298])
    looked_at = list[object]()
    for layer in cache.kv.layers:
        monkeypatch.setattr(layer, "stored", looked_at.append)
    go_on.set()
    kept.close()
    assert not looked_at
    assert [list(read_head(path).ids) for path in files(tmp_path)] == [prompt[:64]]
    monkeypatch.undo()
    pool.give(cache)
    kept.close()
    assert sum(len(read_head(path).ids) for path in files(tmp_path)) == 300


# --- whose it is


def changed_weight(folder: Path) -> None:
    """Another value in one tensor; size and time stay."""
    path = sorted(folder.glob("*.safetensors"))[0]
    before = path.stat()
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    for at in range(begin, len(data), 7):
        data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_another_model_quantization_cache_or_kernel_has_another_key(
    int8: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, nano = int8.model, Checkpoint.open(NANO)
    copied, other, later = (tmp_path / name for name in ("copied", "other", "later"))
    for folder in (copied, other, later):
        shutil.copytree(NANO, folder)
    changed_weight(other)
    os.utime(next(later.glob("*.safetensors")))
    own = key_of(model, nano)
    assert own == key_of(model, nano) == key_of(model, Checkpoint.open(copied))
    keys = {own, key_of(model, Checkpoint.open(other)), key_of(model, Checkpoint.open(later))}
    for quant, kv in (("int8", "int8"), ("none", "float")):
        keys.add(key_of(Engine.load("nano", quant=quant, device="cpu", kv=kv).model, nano))
    monkeypatch.setattr(kept_prefixes, "version", lambda _: "9.9")
    keys.add(key_of(model, nano))
    monkeypatch.undo()
    monkeypatch.setenv("GLM4LITE_ISA", "scalar")
    keys.add(key_of(model, nano))
    assert len(keys) == 7


# --- faults


def flip(at: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= 0x40
        path.write_bytes(data)

    return damage


def append(path: Path, more: bytes) -> None:
    path.write_bytes(path.read_bytes() + more)


def swap(path: Path) -> None:
    other = next(one for one in files(path.parent) if one != path)
    path.write_bytes(other.read_bytes())


def place(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else where the file was."""

    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def boast(path: Path) -> None:
    """Says that it holds four billion ids."""
    data = bytearray(path.read_bytes())
    data[40:44] = b"\xff" * 4
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit in the header": flip(0.0005),
    "a flipped bit in the data": flip(0.6),
    "a flipped bit at the end": flip(1.0),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut in its header": lambda path: os.truncate(path, 50),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: append(path, b"x"),
    "another file": swap,
    "an absurd number": boast,
    "text": place(lambda path: path.write_text("hello")),
    "a folder": place(Path.mkdir),
    "a pipe": place(os.mkfifo),
    "a link to nothing": place(lambda path: path.symlink_to("nothing")),
}


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("found", ["at the start", "when it is read"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_ignored_and_said_once(
    int8: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, found: str
) -> None:
    prompt = ids(int8, TEXT * 8)
    kept = started(int8, tmp_path)
    said, _ = answer(int8, prompt)
    kept.close()
    chain = [run.segment.path for run in kept._covering(prompt)]
    kept = started(int8, tmp_path)
    if found == "when it is read":
        kept._look()
    DAMAGES[kind](chain[2])
    assert answer(int8, prompt) == (said, len(prompt) - 2 * 64)
    told = warnings(caplog)
    if kind != "a link to nothing":  # which says that there is no such file
        assert len(told) == 1
        assert str(chain[2]) in told[0]
        assert "is ignored" in told[0]
    kept.close()
    started(int8, tmp_path)
    if kind != "a folder":  # in whose place no file can be written
        assert answer(int8, prompt) == (said, 1)  # it was written anew
        assert warnings(caplog) == told


def test_a_folder_in_which_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(Glm4liteError, match="others can write there"):
        PrefixFolder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(Glm4liteError, match="cannot hold prefixes"):
        PrefixFolder(tmp_path / "file")


def test_files_are_for_this_user_alone(int8: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    kept = started(int8, folder)
    answer(int8, ids(int8, TEXT))
    kept.close()
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    assert set(modes.values()) == {0o700, 0o600}
    assert len(modes) == 4  # the lock, and a folder with one file


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_fails_costs_what_would_have_been_kept_and_is_said_once(
    int8: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: object) -> None:
        raise OSError(28, "No space left on device")

    kept, prompt = started(int8, tmp_path), ids(int8, TEXT * 4)
    monkeypatch.setattr(prefix_files, "_write_all", full)
    expected = alone(int8, prompt)
    for text in ("", "again "):
        answer(int8, ids(int8, text + TEXT * 3))
        kept.close()
    assert warnings(caplog) == [f"prompts are not kept: {tmp_path}: No space left on device"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    monkeypatch.undo()
    assert answer(int8, prompt)[0] == expected
    kept.close()
    assert files(tmp_path)


WRITES_SLOWLY = """
import sys, time
from pathlib import Path
from glm4lite.engine import prefix_files
from glm4lite.engine.engine import Engine
from tests.glm4lite.test_kept_prefixes import answer, started

engine, write = Engine.load("nano", quant="int8", device="cpu"), prefix_files._write_all
def slowly(descriptor, data):
    write(descriptor, memoryview(data)[: len(data) // 2])
    time.sleep(60)
prefix_files._write_all = slowly
kept = started(engine, Path(sys.argv[1]))
answer(engine, list(range(300, 700)))
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_process_that_is_killed_while_it_writes_leaves_nothing_wrong(int8: Engine, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITES_SLOWLY, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
        try:
            wait_for(lambda: any(part.stat().st_size for part in tmp_path.rglob(".*.part")), 60)
        finally:
            process.kill()
    assert not files(tmp_path)
    kept, prompt = started(int8, tmp_path), list(range(300, 700))
    assert answer(int8, prompt)[1] == len(prompt)
    kept.close()
    assert len(files(tmp_path)) == 1
    assert not list(tmp_path.rglob(".*.part"))
    started(int8, tmp_path)
    assert answer(int8, prompt)[1] == 1


MANY = """
import random, sys
from pathlib import Path
from glm4lite.engine import kept_prefixes
from glm4lite.engine.engine import Engine
from tests.glm4lite.test_kept_prefixes import answer, started

kept_prefixes.MOST_IDS = 64
engine = Engine.load("nano", quant="int8", device="cpu")
kept, chance = started(engine, Path(sys.argv[1]), int(sys.argv[3])), random.Random(int(sys.argv[2]))
shared = list(range(300, 460))
for number in range(25):
    answer(engine, [*shared, *(chance.randint(300, 1200) for _ in range(chance.randint(1, 300)))])
kept.close()
"""


def test_two_processes_use_a_folder_at_once_and_stay_in_its_bound(int8: Engine, tmp_path: Path) -> None:
    size = 1000 * int8.model.model.cache_bytes
    commands = [[*python(), "-c", MANY, str(tmp_path), str(number), str(size)] for number in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    sizes = list[int]()
    while any(process.poll() is None for process in processes):
        sizes.append(held(tmp_path))
        time.sleep(0.02)
    assert [(process.returncode, process.communicate()[1]) for process in processes] == [(0, "")] * 2
    assert size // 2 < max(sizes) <= size
    for path in files(tmp_path):
        read_head(path).read()
    started(int8, tmp_path)
    assert answer(int8, [*range(300, 460), 299]) == (alone(int8, [*range(300, 460), 299]), 1)


def held(folder: Path) -> int:
    total = 0
    for path in files(folder):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


# --- limits


@pytest.mark.usefixtures("small_files")
def test_the_least_recently_used_goes_first_and_no_beginning_before_its_end(int8: Engine, tmp_path: Path) -> None:
    room = 700 * int8.model.model.cache_bytes
    kept = started(int8, tmp_path, room)
    prompts = [[token, *range(400, 580)] for token in range(300, 306)]
    for prompt in prompts:
        answer(int8, prompt)
        kept.close()
        answer(int8, prompts[0])  # which stays of use
        kept.close()
        assert held(tmp_path) <= room
    found = []
    for prompt in prompts:
        probe = started(int8, tmp_path)
        probe._look()
        found.append(sum(run.end - run.begin for run in probe._covering(prompt)))
    assert found[0] == found[-1] == len(prompts[0])
    assert found[1] == 0
    reachable = set()
    for prompt in prompts:
        probe = started(int8, tmp_path)
        probe._look()
        reachable |= {run.segment.path for run in probe._covering(prompt)}
    assert reachable == set(files(tmp_path))


@pytest.mark.usefixtures("small_files")
def test_a_conversation_that_goes_on_does_not_push_its_own_beginning_out(int8: Engine, tmp_path: Path) -> None:
    kept = started(int8, tmp_path, 440 * int8.model.model.cache_bytes)
    first, other = list(range(300, 480)), list(range(500, 680))
    for prompt in (first, other, [*first, *range(700, 800)]):
        said, _ = answer(int8, prompt)
        kept.close()
    probe = started(int8, tmp_path)
    probe._look()
    assert sum(run.end - run.begin for run in probe._covering([*prompt, *said])) >= len(prompt)
    assert sum(run.end - run.begin for run in probe._covering(other)) < len(other)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("limit", ["size", "disk"])
def test_of_a_prompt_that_is_larger_than_the_room_the_beginning_is_kept_and_that_is_said(
    int8: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    room = 200 * int8.model.model.cache_bytes
    if limit == "disk":
        usage, free = shutil.disk_usage, room + prefix_files.LEAST_FREE
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free - held(tmp_path)))
    kept, prompt = started(int8, tmp_path, room if limit == "size" else USUAL_SIZE), list(range(300, 700))
    said, _ = answer(int8, prompt)
    kept.close()
    assert held(tmp_path) <= room
    started(int8, tmp_path)
    assert answer(int8, prompt) == (said, len(prompt) - 3 * 64)
    assert len(told := warnings(caplog)) == 1
    assert "has no room for all of a prompt" in told[0]


def test_what_is_too_short_to_be_worth_a_file_is_not_kept(int8: Engine, tmp_path: Path) -> None:
    kept = started(int8, tmp_path)
    list(int8.pieces(int8.generate([300, 301], SamplingParams(temperature=0, max_new_tokens=2))))
    kept.close()
    assert not files(tmp_path)


def test_unloading_writes_what_rests_and_gives_the_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM4LITE_PREFIXES", str(tmp_path))
    engine = Engine.load("nano", quant="int8", device="cpu", keep_prefixes=True)
    prompt = ids(engine, TEXT)
    answer(engine, prompt)
    cache = weakref.ref(engine.prefixes.take(prompt))
    answer(engine, prompt)
    engine.unload()
    gc.collect()
    assert cache() is None
    assert sum(len(read_head(path).ids) for path in files(tmp_path)) >= len(prompt)
    again = Engine.load("nano", quant="int8", device="cpu", keep_prefixes="20MiB")
    assert answer(again, prompt)[1] == 1


def test_a_draft_model_reads_its_part_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM4LITE_PREFIXES", str(tmp_path))
    stepped = list[int]()
    for _ in range(2):
        engine = Engine.load("nano", quant="int8", device="cpu", draft="nano", keep_prefixes=True)
        draft, prompt = engine.scheduler.draft, ids(engine, TEXT * 3)
        assert draft is not None
        step, rows = draft.model.step, list[int]()

        def counted(spans: Sequence[Span], step: Any = step, rows: list[int] = rows) -> list[torch.Tensor]:
            rows.append(sum(len(span.ids) for span in spans))
            computed: list[torch.Tensor] = step(spans)
            return computed

        monkeypatch.setattr(draft.model, "step", counted)
        answer(engine, prompt)
        engine.unload()
        stepped.append(sum(rows))
    assert stepped[0] > len(prompt)
    assert stepped[1] < len(prompt) // 2


@pytest.mark.parametrize("asked", ["1MiB", "much", 5, -1, 1.5, "12"])
def test_a_size_that_is_none_is_refused(asked: int | str) -> None:
    with pytest.raises(ConfigError):
        wanted_size(asked)
    with pytest.raises(ConfigError):
        Engine.load("nowhere", keep_prefixes=asked)  # before a model is looked for


def test_a_size_may_be_left_out() -> None:
    assert [wanted_size(asked) for asked in (None, False, True, "1GiB", FILE_BYTES)] == [
        *(None, None, USUAL_SIZE),
        *(1 << 30, FILE_BYTES),
    ]
    alone = ["--keep-prefixes=4GiB"]
    assert with_sizes(["--keep-prefixes"]) == alone
    assert with_sizes(["--keep-prefixes", "nano", "-p", "hi"]) == [*alone, "nano", "-p", "hi"]
    assert with_sizes(["--keep-prefixes", "--json"]) == [*alone, "--json"]
    for given in (["--keep-prefixes", "8GiB", "nano"], ["--keep-prefixes=1G"], ["x", "--", "--keep-prefixes"]):
        assert with_sizes(given) == given


# --- the commands


def chat(program: list[str], *more: str) -> dict[str, int]:
    """The last event of an answer of a new process."""
    options = ["chat", "nano", "--quant", "int8", "--json", "--no-tools", "--system", TEXT * 4, "-p", "Hi", *more]
    done = subprocess.run([*program, *options], capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLM4LITE_PREFIXES", str(tmp_path / "prefixes"))
    return tmp_path / "prefixes"


def test_a_chat_that_is_started_again_reads_what_it_computed(folder: Path) -> None:
    assert chat(forked())["prefilled_tokens"] > 200
    assert not folder.exists()  # off by default
    assert chat(forked(), "--keep-prefixes")["prefilled_tokens"] > 200
    again = chat(FRESH, "--keep-prefixes", "64MiB")
    assert again["prefilled_tokens"] == 1
    assert again["prompt_tokens"] > 200


def test_a_server_that_is_started_again_reads_what_it_computed_before_it_was_killed(folder: Path) -> None:
    computed = list[int]()
    for _ in range(2):
        command = [*FRESH, "serve", "nano", "--quant", "int8", "--port", "0", "--keep-prefixes"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                assert server.stderr is not None
                line = next(line for line in server.stderr if "answers at" in line)
                url = re.search(r"http://\S+/v1", line)
                assert url is not None
                messages = [{"role": "system", "content": TEXT * 4}, {"role": "user", "content": "Hi"}]
                body = {"model": "nano", "messages": messages, "max_tokens": 8, "temperature": 0}
                reply = httpx.post(f"{url[0]}/chat/completions", json=body, timeout=60).raise_for_status().json()
                usage = reply["usage"]
                cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
                computed.append(usage["prompt_tokens"] - cached)
                wait_for(lambda: bool(files(folder)), 20)
                server.send_signal(signal.SIGKILL)
                server.wait(60)
            finally:
                server.kill()
    assert computed[0] > 200
    assert computed[1] == 1


def test_what_is_kept_is_listed_and_deleted(folder: Path, int8: Engine) -> None:
    assert run("prefixes").stdout == "nothing is kept\n"
    assert not folder.exists()
    kept = started(int8, folder)
    answer(int8, ids(int8, TEXT * 2))
    kept.close()
    other = PrefixFolder(folder)
    other.write(b"o" * 16, b"o" * 16, [1, 2, 3], "zai/big (int4, float cache)", [b"12345"], ())
    told = json.loads(run("prefixes", "--json").stdout)
    assert [one["model"] for one in told["prefixes"]] == ["zai/big (int4, float cache)", "nano"]
    assert told["prefixes"][0] | {"nbytes": 0, "used": 0} == {
        "key": (b"o" * 16).hex(),
        "model": "zai/big (int4, float cache)",
        "tokens": 3,
        "nbytes": 0,
        "used": 0,
    }
    assert abs(told["prefixes"][0]["used"] - time.time()) < 600
    listed = run("prefixes").stdout
    assert re.search(r"6f6f6f6f +zai/big \(int4, float cache\) +3 +0 KiB +20\d\d-", listed)
    wrong = run("prefixes", "--delete", "nono")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: nothing is kept of 'nono'; `glm4lite prefixes` lists what is\n"
    left = run("prefixes", "--delete", "zai/big").stdout
    assert "zai" not in left
    assert "nano" in left
    assert run("prefixes", "--delete", "all").stdout == "nothing is kept\n"
    assert files(folder) == []
