"""The history of what was typed: bounded, private, and no reason for a chat to fail."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from prompt_toolkit.history import InMemoryHistory

from glm4lite.cli.chat import history
from glm4lite.cli.chat.history import PrivateHistory
from glm4lite.cli.chat.keyboard import _history


def entries(file: Path) -> list[str]:
    """Oldest first, as the next chat finds them."""
    return list(PrivateHistory(file).load_history_strings())[::-1]


def test_entries_of_several_lines_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "data" / "history"
    for text in ("one", "two\n+three\n# four", "五 \udcff"):
        PrivateHistory(file).store_string(text)
    assert entries(file) == ["one", "two\n+three\n# four", "五 ?"]


def test_long_entries_and_those_behind_a_space_are_not_kept(tmp_path: Path) -> None:
    kept = PrivateHistory(tmp_path / "history")
    for text in ("x" * (history.LONGEST + 1), " secret", "x" * history.LONGEST):
        kept.store_string(text)
    assert entries(tmp_path / "history") == ["x" * history.LONGEST]


def test_a_file_that_grew_keeps_its_newer_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST_BYTES", 10_000)
    file = tmp_path / "history"
    kept = PrivateHistory(file)
    for number in range(500):
        kept.store_string(f"question\nnumber {number}")
    found = entries(file)
    assert found == [f"question\nnumber {number}" for number in range(500 - len(found), 500)]
    assert 3_000 < file.stat().st_size <= 5_000
    assert [path.name for path in tmp_path.iterdir()] == ["history"]
    if os.name == "posix":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.skipif(os.name != "posix", reason="needs modes of files")
def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    file = tmp_path / "history"
    file.touch(mode=0o644)
    file.chmod(0o644)
    PrivateHistory(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_where_nothing_can_be_kept_that_is_said_and_the_chat_goes_on(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    said: list[str] = []
    assert isinstance(_history(tmp_path / "taken" / "history", said.append), InMemoryHistory)
    (line,) = said
    assert line.startswith(f"(what you type is not kept: {tmp_path / 'taken' / 'history'}: ")


def test_a_file_that_vanishes_costs_no_answer(tmp_path: Path) -> None:
    kept = PrivateHistory(tmp_path / "data" / "history")
    (tmp_path / "data" / "history").unlink()
    (tmp_path / "data").rmdir()
    kept.store_string("one")
    assert list(kept.load_history_strings()) == []
