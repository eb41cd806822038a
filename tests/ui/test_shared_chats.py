"""One list of chats for the terminal and the page: each opens what the other kept, and nothing in it is lost."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm4lite.base.sentences import Sentence
from glm4lite.chat.session import ChatSession
from glm4lite.cli.chat import saved
from glm4lite.cli.chat.conversation import Conversation, Source
from glm4lite.cli.chat.loop import converse
from glm4lite.cli.chat.settings import Settings as TerminalSettings
from glm4lite.cli.terminal import Terminal
from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite.loading.load_options import LoadOptions
from glm4lite.text.messages import Message, ToolCall
from glm4lite.text.template import Begun
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite_ui.chats import Attachment, Chat, Counts, Part, Settings, Turn
from glm4lite_ui.export import as_json
from glm4lite_ui.history import cut_answer, messages
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.importing import import_chats
from glm4lite_ui.saved.shared import from_data, to_data
from glm4lite_ui.saved.store import ChatStore
from tests.glm4lite.scripted import scripted_engine
from tests.glm4lite.test_chat_commands import Lines
from tests.ui.acts import ask, wait_for_end
from tests.ui.conftest import Serve
from tests.ui.slow_model import slow_engine

COUNTS = Counts(10, 4, "stop", 1.0, 10)


def page_chat() -> Chat:
    """All that a chat of the page can hold: versions, files, thoughts, calls, a turn that failed, a dropped one."""
    chat = Chat(title="What is 3/4 of it?", settings=Settings("Be brief.", temperature=0.5, stop=["END"], always=["x"]))
    dropped = chat.ask("Old")
    dropped.parts, dropped.dropped = [Part("text", 0, "Gone", seconds=1.0)], True
    first = chat.ask("Look", [Attachment("a.txt", "one", 1)])
    first.parts = [
        Part("thinking", 0, "Hm", seconds=1.0),
        Part("text", 0, "Let me see.", seconds=1.0),
        Part("call", 0, "888", "calculator", '{"expression": "37 * 24"}', seconds=0.1),
        Part("call", 0, "Error: no", "current_time", "{}", error=True, seconds=0.1),
        Part("text", 1, "It is 888.", seconds=1.0),
    ]
    first.counts = COUNTS
    other = chat.another(first, "Look again")
    other.parts = [Part("text", 0, "Other", seconds=1.0)]
    chat.show(first)
    failed = chat.ask("Failed")
    failed.error = Sentence("It failed.")
    last = chat.ask("And?")
    last.parts = [Part("text", 0, "Yes.", seconds=1.0)]
    return chat


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ChatStore:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("GLM4LITE_CHATS", raising=False)
    monkeypatch.chdir(tmp_path)
    return ChatStore()


Talk = Callable[..., Conversation]


@pytest.fixture
def talk(nano: Engine) -> Talk:
    def begin(*replies: str) -> Conversation:
        template = nano.template
        assert template is not None
        engine = scripted_engine(nano.tokenizer, template, [f"\n{reply}<|user|>" for reply in replies])
        session, renderer = ChatSession(engine, BUILTIN_TOOLS), Terminal(sys.stdout, sys.stderr)
        settings = TerminalSettings(session, renderer, tuple(BUILTIN_TOOLS), {})
        return Conversation(session, renderer, Source("nano", LoadOptions("auto")), settings, tuple(BUILTIN_TOOLS))

    return begin


def one(store: ChatStore) -> Chat:
    (chat,) = store.find()
    return chat


def without_times(chat: Chat) -> dict[str, Any]:
    return chat.to_json() | {"updated": 0}


# --- from the page to the terminal


def test_the_terminal_lists_and_opens_the_pages_chats(
    store: ChatStore, talk: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = page_chat()
    store.save(chat)
    store.save(Chat.of(Turn("Hi"), title="Newer"))
    found = talk()
    converse(found, Lines("/load", "/load What is 3/4 of it?"))
    assert "Newer\nWhat is 3/4 of it?\n" in capsys.readouterr().err
    assert found.session.messages == messages(chat)
    assert found.session.system == "Be brief."
    assert (found.session.params.temperature, found.session.params.stop) == (0.5, ("END",))
    assert without_times(store.load(chat.id)) == without_times(chat)  # looking changed nothing


def test_what_is_said_in_the_terminal_stands_behind_what_was_said_in_the_page(store: ChatStore, talk: Talk) -> None:
    chat = page_chat()
    store.save(chat)
    found = talk("Third.", "Fourth.")
    converse(found, Lines("/load What is 3/4 of it?", "3?", "/set temperature 0.9", "/save", "4?", "/save"))
    again = one(store)
    assert [turn.user for turn in again.turns] == ["Old", "Look", "Failed", "And?", "3?", "4?"]
    assert [turn.parts[0].text for turn in again.turns[-2:]] == ["Third.", "Fourth."]
    kept = {turn.id: turn for turn in again.tree}
    assert all(kept[turn.id] == turn for turn in chat.tree)  # versions, files, thoughts and all
    assert again.settings == replace(chat.settings, temperature=0.9)
    assert (again.title, again.created) == (chat.title, chat.created)
    assert messages(again) == found.session.messages


def test_an_export_is_opened_in_the_terminal_with_all_of_the_path_shown(store: ChatStore, talk: Talk) -> None:
    chat = page_chat()
    Path("export.json").write_text(as_json(chat), "utf-8")
    found = talk("Third.")
    converse(found, Lines("/load export.json", "3?", "/save export.json", "/save ./other.json"))
    assert found.session.messages[:-2] == messages(chat)
    came = import_chats(store, Path("export.json"), "export.json")
    assert came.skipped == []
    assert [turn.user for turn in one(store).turns] == ["Old", "Look", "Failed", "And?", "3?"]


def test_chats_of_an_older_page_can_be_opened_once_the_page_was_started(store: ChatStore) -> None:
    chat = page_chat()
    (store.folder / f"{chat.id}.json").write_text(json.dumps(chat.to_json()))
    assert saved.titles() == []
    store.add_messages()
    assert saved.titles() == [chat.title]
    assert store.load(chat.id) == chat


# --- from the terminal to the page


def test_a_conversation_of_the_terminal_stands_in_the_pages_list(store: ChatStore, talk: Talk) -> None:
    found = talk('calculator\n{"expression": "37 * 24"}', "It is 888.", "Bye.")
    converse(found, Lines("/set system Be brief.", "/set seed 3", "37 * 24?", "/save sums", "Bye", "/save"))
    assert [(one.title, one.turns) for one in store.summaries()] == [("sums", 2)]
    assert [chat.title for chat in store.find("888")] == ["sums"]
    chat = one(store)
    assert chat.turns[0].parts == [
        Part("call", 0, "888", "calculator", '{"expression": "37 * 24"}', seconds=0.0),
        Part("text", 1, "It is 888.", seconds=0.0),
    ]
    assert chat.settings == Settings("Be brief.", seed=3)
    assert messages(chat) == found.session.messages
    assert store.load(chat.id) == chat  # the same ids at each reading


def test_what_both_went_on_with_stands_side_by_side(store: ChatStore, talk: Talk) -> None:
    found = talk("One.", "Two, typed.", "Three, typed.")
    converse(found, Lines("1?", "/save sums"))
    chat = one(store)
    chat.ask("2?").parts = [Part("text", 0, "Two, clicked.", seconds=1.0)]
    store.save(chat)
    converse(found, Lines("2?", "3?", "/save"))
    again = one(store)
    assert [turn.parts[0].text for turn in again.turns] == ["One.", "Two, typed.", "Three, typed."]
    assert [turn.parts[0].text for turn in again.versions(again.turns[1])] == ["Two, clicked.", "Two, typed."]
    assert len(again.tree) == 4
    store.save(again)
    assert one(store).tree == again.tree


def test_what_the_terminal_saves_while_the_page_answers_is_kept(store: ChatStore, talk: Talk, nano: Engine) -> None:
    found = talk("One.", "Two, typed.")
    converse(found, Lines("1?", "/save sums"))
    runtime = Runtime(EngineWorker(slow_engine(nano, "Two, clicked.", 0.05)), store)
    chat = one(store)
    chat.ask("2?")
    answer = runtime.answer(chat)
    converse(found, Lines("2?", "/save"))
    assert answer.over.wait(30)
    again = one(store)
    assert again.turns[1].parts[0].text == "Two, clicked."
    assert {turn.parts[0].text for turn in again.versions(again.turns[1])} == {"Two, clicked.", "Two, typed."}
    runtime.close()


def test_a_turn_that_was_deleted_in_the_page_does_not_come_back(store: ChatStore, talk: Talk) -> None:
    found = talk("One.", "Two.")
    converse(found, Lines("1?", "2?", "/save sums"))
    chat = one(store)
    chat.remove(chat.turns[1])
    store.save(chat)
    assert [turn.user for turn in one(store).turns] == ["1?"]
    store.delete(chat.id)
    assert saved.titles() == []


def test_a_file_of_the_terminal_is_imported_by_the_page_once(store: ChatStore, talk: Talk) -> None:
    found = talk("One.")
    converse(found, Lines("1?", "/save ./trip.json"))
    for expected in (1, 0):
        came = import_chats(store, Path("trip.json"), "trip.json")
        assert len(came.chats) == expected
    assert (one(store).title, messages(one(store))) == ("trip", found.session.messages)


def test_a_file_of_an_earlier_terminal_is_imported_with_its_calls(store: ChatStore) -> None:
    call = ToolCall("call_1", "calculator", "{}")
    said = [
        Message("system", "Be brief."),
        Message("user", "37 * 24?"),
        Message("assistant", "", (call,)),
        Message("tool", "888", tool_call_id="call_1", name="calculator"),
        Message("assistant", "It is 888."),
    ]
    data = {"format": "glm4lite conversation", "version": 1, "model": "nano", "settings": {"temperature": 0.25}}
    Path("old.json").write_text(json.dumps(data | {"messages": [message.to_dict() for message in said]}))
    for expected in (1, 0):
        assert len(import_chats(store, Path("old.json"), "old.json").chats) == expected
    chat = one(store)
    assert (messages(chat), chat.settings) == (said, Settings("Be brief.", temperature=0.25))
    assert chat.title == "37 * 24?"


# --- an answer that was cut in one goes on in the other


def test_an_answer_that_the_terminal_cut_can_go_on_in_the_page(store: ChatStore, talk: Talk) -> None:
    found = talk("One two three four five six.")
    converse(found, Lines("/set max_new_tokens 6", "Count", "/save sums"))
    cut = found.session.cut
    assert cut is not None
    chat = one(store)
    assert chat.turns[-1].cut
    assert cut_answer(chat) == ([Message("user", "Count")], cut)
    assert from_data(to_data(chat)) == chat  # and it stays so
    converse(talk("Whole."), Lines("/load sums", "And?", "/save"))
    assert [turn.cut for turn in one(store).turns] == [False, False]


def test_a_thought_that_the_terminal_cut_goes_on_in_the_page(store: ChatStore, talk: Talk) -> None:
    found = talk("x")
    found.session.messages[:] = [Message("user", "Why?")]
    for cut in (Begun("", "Because of"), Begun("It is", "Because of it.")):
        found.session.cut = cut
        found.session.messages[1:] = [Message("assistant", cut.text)] if cut.text else []
        converse(found, Lines("/save why"))
        chat = one(store)
        assert chat.turns[-1].cut
        assert cut_answer(chat) == ([Message("user", "Why?")], cut)
        store.delete(chat.id)
        found.file = None


@pytest.mark.parametrize("reason", ["length", "cancelled", "stop"])
def test_an_answer_that_the_page_cut_can_go_on_in_the_terminal(store: ChatStore, talk: Talk, reason: str) -> None:
    chat = Chat(title="sums")
    turn = chat.ask("Count")
    turn.parts = [Part("thinking", 0, "Hm", seconds=1.0), Part("text", 0, "One two", seconds=1.0)]
    turn.counts = replace(COUNTS, finish_reason=reason)
    store.save(chat)
    found = talk("three.")
    converse(found, Lines("/load sums"))
    assert found.session.cut == (None if reason == "stop" else Begun("One two", "Hm"))
    converse(found, Lines("/continue", "/save"))
    again = one(store)
    assert found.session.cut is None
    if reason != "stop":  # the whole answer is a version beside the one that was cut
        assert [other.cut for other in again.versions(again.turns[-1])] == [True, False]
        assert again.turns[-1].parts[-1].text == "One two\nthree."


@pytest.mark.parametrize("cut", [None, 1, {"text": 1}, {"text": "Other", "thinking": ""}, {"text": ""}])
def test_what_does_not_fit_the_messages_cuts_nothing(store: ChatStore, talk: Talk, cut: object) -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = page_chat().to_json() | {"tree": [], "shown": {}, "messages": said, "cut": cut}
    assert not from_data(data).turns[-1].cut
    Path("a.json").write_text(json.dumps(data))
    found = talk()
    converse(found, Lines("/load ./a.json"))
    assert found.session.cut is None


# --- what an earlier terminal kept elsewhere


def test_conversations_of_an_earlier_terminal_are_in_the_list_of_both(store: ChatStore, talk: Talk) -> None:
    older = store.folder.parent / "conversations"
    older.mkdir(parents=True)
    said = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")]
    data = {"format": "glm4lite conversation", "version": 1, "model": "nano", "settings": {"temperature": 0.25}}
    (older / "trip.json").write_text(json.dumps(data | {"messages": [Message(*one).to_dict() for one in said]}))
    os.utime(older / "trip.json", (1e9, 1e9))
    (older / "broken.json").write_text("{")
    (older / "foreign.json").write_text("[]")
    assert saved.titles() == ["trip"]
    assert sorted(file.name for file in older.iterdir()) == ["broken.json", "foreign.json"]  # what is no chat stays
    assert [(found.title, found.updated, found.turns) for found in store.summaries()] == [("trip", 1e9, 1)]
    assert one(store).settings == Settings("Be brief.", temperature=0.25)
    found = talk("Yes.")
    converse(found, Lines("/load trip", "And?", "/save"))
    assert [turn.user for turn in one(store).turns] == ["Hi", "And?"]
    store.delete(one(store).id)
    assert saved.titles() == []  # it does not come back


# --- what a file may hold


ODD: list[list[dict[str, Any]]] = [
    [],
    [{"role": "assistant", "content": "I begin."}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}],
    [{"role": "user", "content": "a"}, {"role": "tool", "content": "of no call"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": ""}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}],
]


@pytest.mark.parametrize("said", ODD)
def test_any_messages_become_turns_that_are_the_same_at_each_reading(said: list[dict[str, Any]]) -> None:
    data = page_chat().to_json() | {"tree": [], "shown": {}, "messages": said}
    chat = from_data(data)
    assert from_data(data) == chat
    assert from_data(to_data(chat)) == chat
    asked = [message["content"] for message in said if message["role"] == "user"]
    assert [turn.user for turn in chat.turns if turn.user or asked] == asked


@pytest.mark.parametrize("said", ["text", {"a": 1}, [1], [{"role": "x"}]])
def test_messages_that_are_none_are_said(said: object) -> None:
    with pytest.raises(ValueError, match=r"^messages: "):
        from_data(page_chat().to_json() | {"messages": said})


def test_a_long_chat_is_read_in_no_time() -> None:
    ids = ["", *(f"{place:016x}" for place in range(1, 3001))]
    tree = [Turn(f"{n}", parts=[Part("text", 0, "x", seconds=1)], id=ids[n + 1], after=ids[n]) for n in range(3000)]
    data = to_data(Chat(tree=tree))
    data["messages"] += [{"role": "user", "content": f"more {n}"} for n in range(3000)]
    began = time.process_time()
    assert len(from_data(data).turns) == 6000
    assert time.process_time() - began < 5  # each turn was looked at a few times, not beside every other


# --- in a browser


def test_the_page_shows_and_goes_on_with_what_the_terminal_saved(
    serve: Serve, visit: Callable[..., Any], store: ChatStore, talk: Talk
) -> None:
    site = serve(folder=store.folder)
    page = visit(site.url)
    found = talk("Two and two make four.")
    converse(found, Lines("2 + 2?", "/save sums"))
    page.reload()
    page.wait_for_selector("#chats a >> text=sums")
    page.click("#chats a >> text=sums")
    page.wait_for_selector("text=Two and two make four.")
    ask(page, "What is 37 * 24?")
    wait_for_end(page)
    again = talk("Bye.")
    converse(again, Lines("/load sums"))
    assert [message.content for message in again.session.messages if message.role == "user"] == [
        "2 + 2?",
        "What is 37 * 24?",
    ]


def test_the_page_goes_on_with_an_answer_that_was_cut_in_the_terminal(
    serve: Serve, visit: Callable[..., Any], store: ChatStore, talk: Talk
) -> None:
    found = talk("One two three four five six.")
    converse(found, Lines("/set max_new_tokens 6", "Count", "/set max_new_tokens default", "/save sums"))
    cut = found.session.cut
    assert cut is not None
    page = visit(serve(folder=store.folder).url)
    page.click("#chats a >> text=sums")
    page.wait_for_selector(f".parts >> text={cut.text.strip()}")
    page.get_by_role("button", name="Continue").click()
    wait_for_end(page)
    page.wait_for_selector(".foot .counts")
    (turn,) = one(store).turns
    assert turn.parts[0].text.strip().startswith(cut.text.strip())
    assert turn.counts is not None
