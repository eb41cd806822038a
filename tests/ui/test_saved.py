"""The list of chats, what is searched, what new chats start with, and what is typed but not sent."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from glm4lite.base.errors import Glm4liteError, SamplingError
from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite_ui.chats import Attachment, Chat, Part, Settings, Turn
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.preferences import LONGEST_DRAFT, Draft, Drafts, Preferences
from glm4lite_ui.saved.store import ChatStore, Summary, grouped


def chat_of(question: str, answer: str = "", **fields: object) -> Chat:
    turn = Turn(question, parts=[Part("text", 0, answer, seconds=1)])
    return Chat.of(turn, title=question, **fields)


def titles(store: ChatStore, query: str = "") -> list[str]:
    return [one.title for one in store.summaries(query)]


def test_a_search_finds_words_and_parts_of_words_in_any_case_and_script(tmp_path: Path) -> None:
    store = ChatStore(tmp_path)
    store.save(chat_of("Cafe\u0301 in Paris", "Straße"))
    store.save(chat_of("月亮有多远", "大约三十八万公里"))
    other = chat_of("Zebras")
    other.turns[0].files.append(Attachment("stripes.csv", "secret", 1))
    store.save(other)
    for query in ("café", "CAFÉ PARIS", "caf strasse", "paris  in"):
        assert titles(store, query) == ["Café in Paris".replace("é", "e\u0301")], query
    assert titles(store, "三十八") == ["月亮有多远"]
    assert titles(store, "stripes") == ["Zebras"]
    assert titles(store, "paris zebras") == titles(store, "secret") == []


def test_a_search_looks_through_every_version(tmp_path: Path) -> None:
    store, chat = ChatStore(tmp_path), chat_of("Hi", "an apple")
    chat.another(chat.turns[0]).parts = [Part("text", 0, "a pear", seconds=1)]
    store.save(chat)
    assert titles(store, "apple") == titles(store, "pear") == ["Hi"]
    assert store.summaries()[0].turns == 1


def test_the_list_follows_files_that_come_change_and_go(tmp_path: Path) -> None:
    store, other = ChatStore(tmp_path), ChatStore(tmp_path)
    first, second = chat_of("first"), chat_of("second")
    store.save(first)
    assert titles(other) == ["first"]
    store.save(second)
    assert titles(other) == ["second", "first"]
    first.title = "renamed"
    store.save(first, said=False)
    assert titles(other) == ["second", "renamed"]
    store.save(first)
    assert titles(other) == ["renamed", "second"]
    store.delete(second.id)
    assert titles(other) == ["renamed"]


def test_chats_are_read_once_not_each_time_the_list_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, read = ChatStore(tmp_path), list[str]()
    for number in range(5):
        store.save(chat_of(f"chat {number}"))
    load = store._load

    def noted(chat_id: str) -> tuple[Chat, bool]:
        read.append(chat_id)
        return load(chat_id)

    monkeypatch.setattr(store, "_load", noted)
    for query in ("", "chat 3", "absent"):
        store.summaries(query)
    assert len(read) == 5


def test_a_search_of_200_chats_of_30_messages_takes_less_than_a_tenth_of_a_second(tmp_path: Path) -> None:
    store = ChatStore(tmp_path)
    turns = [Turn("word " * 40, parts=[Part("text", 0, "another word " * 120, seconds=1)]) for _ in range(15)]
    for number in range(200):
        chat = Chat.of(*(Turn(turn.user, parts=turn.parts) for turn in turns), title=f"chat {number}")
        (tmp_path / f"{chat.id}.json").write_text(json.dumps(chat.to_json()))
    began = time.thread_time()
    assert len(store.summaries()) == 200
    assert time.thread_time() - began < 1.0  # the page is opened
    took = []
    for query in ("c", "chat 1", "chat 17 word", "absent everywhere"):
        began = time.monotonic()
        store.summaries(query)
        took.append(time.monotonic() - began)
    assert min(took) < 0.1  # the machine may be busy for a moment
    assert titles(store, "chat 173") == ["chat 173"]


def test_chats_stand_under_pinned_folders_and_days(tmp_path: Path) -> None:
    now = datetime(2026, 3, 10, 15, 0).timestamp()
    hour, day = 3600.0, 86400.0

    def one(name: str, age: float, pinned: bool = False, folder: str = "") -> Summary:
        return Summary(name, name, now - age, pinned, folder, 1)

    chats = [
        one("noon", 3 * hour), one("midnight", 15 * hour), one("yesterday", 15 * hour + 1), one("week", 7 * day),
        one("old", 8 * day), one("pin", 90 * day, pinned=True, folder="b"), one("in b", 0, folder="b"),
        one("in A", 9 * day, folder="A"),
    ]  # fmt: skip
    assert [(group.kind, group.name, [chat.id for chat in group.chats]) for group in grouped(chats, now)] == [
        ("pinned", "", ["pin"]), ("folder", "A", ["in A"]), ("folder", "b", ["in b"]),
        ("today", "", ["noon", "midnight"]), ("week", "", ["yesterday", "week"]), ("older", "", ["old"]),
    ]  # fmt: skip
    assert grouped([], now) == []
    store = ChatStore(tmp_path)
    store.save(chat_of("Hi", pinned=True, folder="Work"))
    assert [(one.pinned, one.folder) for one in store.summaries()] == [(True, "Work")]


def test_new_chats_start_with_what_was_chosen_for_them_also_after_a_restart(tmp_path: Path) -> None:
    chosen = Settings("Be brief.", temperature=0.1, tools=["calculator"], always=["python"])
    Preferences(tmp_path).use_for_new_chats(chosen)
    assert Preferences(tmp_path).new_chat == Settings("Be brief.", temperature=0.1, tools=["calculator"])
    assert chosen.always == ["python"]
    Preferences(tmp_path).use_for_new_chats(Settings())
    assert Preferences(tmp_path).new_chat == Settings()


def test_presets_have_names_and_are_replaced_and_deleted(tmp_path: Path) -> None:
    preferences = Preferences(tmp_path)
    preferences.keep_preset("  b  translator ", Settings("Translate."))
    preferences.keep_preset("Calm", Settings(temperature=0, always=["python"]))
    preferences.keep_preset("Calm", Settings(temperature=0.2))
    assert list(Preferences(tmp_path).presets.items()) == [
        ("b translator", Settings("Translate.")),
        ("Calm", Settings(temperature=0.2)),
    ]
    preferences.delete_preset("Calm")
    preferences.delete_preset("absent")
    assert list(preferences.presets) == ["b translator"]
    for name in (" ", "x" * 61):
        with pytest.raises(Glm4liteError, match="a preset needs a name of at most 60 characters"):
            preferences.keep_preset(name, Settings())


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 2}', '{"format": 1, "presets": {"a": {"seed": "x"}}}', "[" * 200_000]
)
def test_damaged_preferences_are_named_and_not_written_over(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "preferences.json").write_text(content)
    preferences = Preferences(tmp_path)
    assert preferences.presets == {}
    assert "preferences.json cannot be read" in caplog.text
    with pytest.raises(Glm4liteError, match="move it away"):
        preferences.keep_preset("a", Settings())
    assert (tmp_path / "kept" / "preferences.json").read_text() == content


def test_a_draft_outlives_a_restart_and_goes_when_it_is_empty(tmp_path: Path) -> None:
    chat_id = Chat().id
    Drafts(tmp_path).keep(chat_id, Draft("half a question\n  你好", Settings("Be brief.")))
    assert Drafts(tmp_path).of(chat_id) == Draft("half a question\n  你好", Settings("Be brief."))
    Drafts(tmp_path).keep(chat_id, Draft())
    assert list((tmp_path / "kept").iterdir()) == []
    Drafts(tmp_path).keep(chat_id, Draft("old"))
    file = next((tmp_path / "kept").iterdir())
    os.utime(file, (1, 1))
    assert Drafts(tmp_path).of(chat_id) == Draft()


def test_a_draft_that_is_too_long_or_damaged_or_of_a_strange_chat_harms_nothing(tmp_path: Path) -> None:
    drafts, chat_id = Drafts(tmp_path), Chat().id
    with pytest.raises(Glm4liteError, match="1,000,000 characters"):
        drafts.keep(chat_id, Draft("x" * (LONGEST_DRAFT + 1)))
    with pytest.raises(Glm4liteError, match="not the name of a chat"):
        drafts.keep("../../x", Draft("x"))
    assert drafts.of("../../x") == Draft()
    drafts.keep(chat_id, Draft("x"))
    next((tmp_path / "kept").iterdir()).write_text("{")
    assert drafts.of(chat_id) == Draft()


@pytest.fixture
def runtime(nano: Engine, tmp_path: Path) -> Iterator[Runtime]:
    runtime = Runtime(EngineWorker(nano), ChatStore(tmp_path))
    yield runtime
    runtime.close()


def test_setting_a_value_saves_no_empty_chat_but_is_kept_for_its_first_message(runtime: Runtime) -> None:
    chat_id = Chat().id
    runtime.set(chat_id, Settings("Be brief.", temperature=0, max_new_tokens=4))
    runtime.type(chat_id, "Half")
    assert runtime.store.summaries() == []
    again = Runtime(runtime.worker, ChatStore(runtime.store.folder))
    assert again.open(chat_id).settings == Settings("Be brief.", temperature=0, max_new_tokens=4)
    assert again.drafts.of(chat_id).text == "Half"
    chat = again.change(chat_id)
    chat.ask("Half a question")
    assert again.answer(chat).over.wait(30)
    assert again.store.load(chat_id).settings.system == "Be brief."
    assert again.drafts.of(chat_id) == Draft("Half")
    again.type(chat_id, "")
    assert list((again.store.folder / "kept").iterdir()) == []
    before = again.store.summaries()[0].updated
    again.set(chat_id, Settings("Other."))
    assert again.open(chat_id).settings == Settings("Other.")
    assert again.store.summaries()[0].updated == before  # its place in the list


def test_a_value_that_cannot_be_used_is_not_kept(runtime: Runtime) -> None:
    with pytest.raises(SamplingError, match="top_p must be"):
        runtime.set(Chat().id, Settings(top_p=7))
    assert not (runtime.store.folder / "kept").exists()


def test_a_new_chat_has_the_chosen_settings_and_its_own_from_then_on(runtime: Runtime) -> None:
    runtime.preferences.use_for_new_chats(Settings("Be brief."))
    chat = runtime.open(Chat().id)
    assert chat.settings == Settings("Be brief.")
    chat.settings.always.append("python")
    assert runtime.open(Chat().id).settings == Settings("Be brief.")


def test_a_deleted_chat_takes_its_draft_along(runtime: Runtime) -> None:
    chat = chat_of("Hi")
    runtime.store.save(chat)
    runtime.type(chat.id, "more")
    runtime.delete(chat.id)
    assert list((runtime.store.folder / "kept").iterdir()) == []
