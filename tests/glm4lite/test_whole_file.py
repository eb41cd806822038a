"""Files that are whole or not there: a full disk, a read-only one, a process that is killed, other writers."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from glm4lite.base.errors import Glm4liteError
from glm4lite.base.whole_file import remove_leftovers, write_whole
from glm4lite.cli.chat import saved
from glm4lite.model.config import Glm4Config
from glm4lite.pretrained.generation.config import GenerationConfig
from glm4lite.text.messages import Message

posix = pytest.mark.skipif(os.name != "posix", reason="modes, signals and limits of POSIX")
HOUR_S = 3600


def child(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    head = "import os, resource, signal, sys\nfrom glm4lite.base.whole_file import write_whole\n"
    command = [sys.executable, "-c", head + program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_made_and_replaced_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@posix
def test_a_mode_is_kept_and_a_new_file_has_the_users_or_is_private(tmp_path: Path) -> None:
    old, new, private = tmp_path / "old", tmp_path / "new", tmp_path / "private"
    old.write_bytes(b"1")
    old.chmod(0o640)
    before = os.umask(0o027)
    try:
        write_whole(old, b"2", private=True)
        write_whole(new, b"2")
        write_whole(private, b"2", private=True)
    finally:
        os.umask(before)
    assert [mode(old), mode(new), mode(private)] == [0o640, 0o640, 0o600]


@posix
def test_a_disk_that_takes_no_more_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    limited = child(
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "try: write_whole(sys.argv[1], bytes(1 << 20))\n"
        "except OSError as error: print(error.strerror)",
        path,
    )
    assert limited.stdout == "File too large\n", limited.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fails_only_when_it_is_synced_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_while_it_is_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.json", b"new")
    assert list(tmp_path.iterdir()) == []


@posix
def test_what_a_killed_process_left_goes_with_the_next_write_once_it_is_old(tmp_path: Path) -> None:
    path = tmp_path / "a[1].json"
    write_whole(path, b"old")
    killed = child("os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\nwrite_whole(sys.argv[1], b'new')", path)
    assert killed.returncode == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - {path}
    assert path.read_bytes() == b"old"
    write_whole(path, b"newer")
    assert left.exists()  # another process may be writing it
    os.utime(left, (0, time.time() - 2 * HOUR_S))
    write_whole(path, b"newest")
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_a_folder_go_and_other_files_stay(tmp_path: Path) -> None:
    names = (".a.json.0123abcd.part", "a.json", "notes.part", ".hidden")
    for name in names:
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (0, 0))
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
    remove_leftovers(tmp_path / "missing")


@posix
def test_what_must_not_be_written_over_is_refused(tmp_path: Path) -> None:
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    with pytest.raises(OSError, match="no plain file"):
        write_whole(pipe, b"new")
    with pytest.raises(IsADirectoryError):
        write_whole(folder, b"new")
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "a.json", b"new")
    assert sorted(tmp_path.iterdir()) == [folder, pipe]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def as_nobody(program: str, path: Path) -> str:
    """What a user without rights is told, where this one can become such a user."""
    if os.geteuid() == 0:
        program = "os.setuid(65534)\n" + program
    return child(program, path).stdout


@posix
def test_a_read_only_file_and_a_read_only_folder_are_left_alone(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):  # of two workers at a time each has a folder of its own
        folder.chmod(0o755)
    program = "try: write_whole(sys.argv[1], b'new')\nexcept OSError as error: print(error.strerror)"
    open_to_all, closed = tmp_path / "open", tmp_path / "closed"
    for folder in (open_to_all, closed):
        folder.mkdir()
        (folder / "a.json").write_bytes(b"old")
    (open_to_all / "a.json").chmod(0o444)
    (closed / "a.json").chmod(0o666)
    open_to_all.chmod(0o777)
    closed.chmod(0o555)
    assert as_nobody(program, open_to_all / "a.json") == "the file is read-only\n"
    assert as_nobody(program, closed / "a.json") == "Permission denied\n"
    assert [path.read_bytes() for path in tmp_path.glob("*/*")] == [b"old", b"old"]


def test_a_link_is_replaced_and_what_it_led_to_stays(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"the cache's")
    link.symlink_to(target)
    write_whole(link, b"new")
    assert (target.read_bytes(), link.read_bytes(), link.is_symlink()) == (b"the cache's", b"new", False)


def test_a_name_as_long_as_a_disk_takes_has_room_for_its_part(tmp_path: Path) -> None:
    path = tmp_path / f"{'中' * 83}.json"
    write_whole(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_readers_and_writers_at_once_see_whole_files_only(tmp_path: Path) -> None:
    path, written = tmp_path / "a.json", [bytes([letter]) * (1 << 18) for letter in b"abcd"]
    write_whole(path, written[0])

    def write(data: bytes) -> None:
        for _ in range(10):
            write_whole(path, data)

    writers = [threading.Thread(target=write, args=(data,)) for data in written]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in written
    assert list(tmp_path.iterdir()) == [path]


def save_config(folder: Path) -> None:
    Glm4Config(num_hidden_layers=1).to_json_file(folder / "config.json")


def save_generation_config(folder: Path) -> None:
    GenerationConfig(top_k=3).save_pretrained(folder)


def save_conversation(folder: Path) -> None:
    saved.save(folder / "trip.json", saved.Saved([Message("user", "Hi")]), overwrite=True)


@pytest.mark.parametrize("save", [save_config, save_generation_config, save_conversation])
def test_whoever_saves_says_in_one_line_that_it_could_not_and_keeps_the_old_file(
    save: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Glm4liteError) as caught:
        save(tmp_path)
    assert str(caught.value) == f"{file} cannot be written: No space left on device"
    assert (file.read_bytes(), list(tmp_path.iterdir())) == (before, [file])
